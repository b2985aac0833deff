"""Set-up names what a machine lacks before anything is downloaded; the pipeline checks its words."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def script(path: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", path, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.fixture
def tools_path(tmp_path):
    """A PATH with the usual programs; a test takes away or replaces some."""
    folder = tmp_path / "bin"
    folder.mkdir()
    names = (
        "bash sh env g++ c++ cmake df awk sed sort head cut cat sha256sum grep "
        "uname getconf dirname mktemp date"
    )
    for name in names.split():
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    # A link to a virtual environment's Python would forget its environment.
    replace(folder, "python3", f'exec "{sys.executable}" "$@"')
    return folder


def replace(folder: Path, name: str, text: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text("#!/bin/sh\n" + text)
    (folder / name).chmod(0o755)


def check(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return script("scripts/setup.sh", "--check", PATH=str(folder), **environment)


def test_complete_machine_passes(tools_path):
    done = check(tools_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"g++": None, "c++": None}, "no C++ compiler"),
        ({"cmake": None}, "no CMake"),
        ({"cmake": "echo cmake version 3.16.3"}, "CMake is too old: got 3.16.3"),
        ({"df": "echo head; echo x 9 9 1048576 9 /"}, "got 1 GiB free, expected 5 GiB"),
        ({"python3": "exit 1"}, "no usable Python"),
    ],
)
def test_what_is_missing_is_named_in_one_line(tools_path, broken, message):
    for name, text in broken.items():
        if text is None:
            (tools_path / name).unlink()
        else:
            replace(tools_path, name, text)
    done = check(tools_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_second_run_is_quick(tools_path):
    if not (ROOT / ".venv/tomeforge-setup").is_file():
        pytest.skip("this checkout was not set up by scripts/setup.sh")
    started = time.monotonic()
    done = script("scripts/setup.sh")
    assert done.returncode == 0
    assert "nothing to do" in done.stderr
    assert time.monotonic() - started < 5


class Fetch:
    """A function of set-up that fetches something, over a Python that only notes its calls."""

    def __init__(self, folder: Path, version: str, function: str, fake: str) -> None:
        self.folder, self._calls, self.fails = folder, folder / "calls", folder / "fails"
        replace(folder, "python", f'echo "$*" >>{self._calls}\n{fake}[ ! -e {self.fails} ]\n')
        self._source = (
            f"set -e; say() {{ :; }}; eval \"$(sed -n '/^{version}=/p; "
            f"/^{function}()/,/^}}/p' scripts/setup.sh)\"; {function}"
        )

    def run(self) -> int:
        own = {"PY": str(self.folder / "python"), "SHARE_DIR": str(self.folder)}
        command = ["bash", "-c", self._source]
        return subprocess.run(command, cwd=ROOT, env=os.environ | own, check=False).returncode

    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()

    def is_whole_or_nothing(self, target: str) -> bool:
        """Fails once and leaves nothing, succeeds, and has nothing to do the third time."""
        self.fails.touch()
        failed = self.run() != 0 and not (self.folder / target).exists()
        self.fails.unlink()
        calls = len(self.calls())
        done = self.run() == 0 and len(self.calls()) > calls
        calls = len(self.calls())
        return failed and done and self.run() == 0 and len(self.calls()) == calls


def test_mistral_tokenizers_are_fetched_once_and_whole(tmp_path):
    fake = (
        'while [ "$1" != --target ]; do shift; done\n'
        'mkdir -p "$2/mistral_common-${3#*==}.dist-info"\n'
    )
    fetch = Fetch(tmp_path, "MISTRAL_COMMON_VERSION", "install_test_tokenizers", fake)
    assert fetch.is_whole_or_nothing("mistral-common")
    assert all("--no-deps" in call for call in fetch.calls())
    assert len(list((tmp_path / "mistral-common").glob("mistral_common-*.dist-info"))) == 1


def test_sentence_splitter_is_fetched_once_and_whole(tmp_path):
    inside = "$5/llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english"
    fake = f'[ "$2" = zipfile ] || exit 0\nmkdir -p "{inside}"; touch "{inside}/abbrev_types.txt"\n'
    fetch = Fetch(tmp_path, "LLAMA_INDEX_VERSION", "install_punkt", fake)
    assert fetch.is_whole_or_nothing("nltk_data/tokenizers/punkt_tab")
    assert sum("pip download" in call for call in fetch.calls()) == 2
    assert (tmp_path / "nltk_data/tokenizers/punkt_tab/english/abbrev_types.txt").is_file()


def test_mistral_tokenizers_are_not_importable():
    spec = importlib.util.find_spec("mistral_common")
    share = Path(sys.prefix) / "share/mistral-common"
    assert spec is None or not str(spec.origin).startswith(str(share))


def test_unknown_argument_is_exit_2():
    assert script("scripts/setup.sh", "--force").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe given"),
        (["nowhere.yaml"], "does not exist"),
        (["scripts/recipes/smollm2-135m-cpu.yaml", "--from", "cook"], "unknown stage 'cook'"),
        (["scripts/recipes/smollm2-135m-cpu.yaml", "--from"], "needs a stage"),
        (
            ["scripts/recipes/smollm2-135m-cpu.yaml", "--from", "export", "--to", "train"],
            "comes after",
        ),
        (["scripts/recipes/smollm2-135m-cpu.yaml", "--fast"], "unknown option"),
    ],
)
def test_pipeline_usage_errors(arguments, message):
    done = script("scripts/pipeline.sh", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_pipeline_runs_a_stage_and_skips_it_the_second_time(tmp_path):
    recipe = "scripts/recipes/smollm2-135m-cpu.yaml"
    arguments = [recipe, "--from", "prepare", "--to", "prepare"]
    first = script("scripts/pipeline.sh", *arguments, TOMEFORGE_OUTPUTS=str(tmp_path))
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "smollm2-135m-cpu/data/train.jsonl").is_file()
    second = script("scripts/pipeline.sh", *arguments, TOMEFORGE_OUTPUTS=str(tmp_path))
    assert "up to date" in second.stderr
