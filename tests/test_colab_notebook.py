"""The Colab notebook runs from top to bottom, on the embedded model and on a stand-in for Colab."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from scripts.recipe import TrainingRecipe, parse_recipe
from tests.command_lines import ROOT
from tests.notebooks import (
    check_form,
    code_cells,
    execute,
    printed,
    small_notebook,
    wrong_commands,
)

NOTEBOOK = ROOT / "scripts/colab_train.ipynb"
ANSWERED = {
    "Name three rivers in Europe.": "The Danube, the Rhine and the Loire.",
    "What is recursion?": "A function that calls itself until a base case is reached.",
    "How do I boil an egg?": "Put it into boiling water for seven minutes.",
    "What does HTTP mean?": "It is short for Hypertext Transfer Protocol.",
    "Give me a synonym of quick.": "Rapid is a good synonym.",
    "Who wrote Hamlet?": "William Shakespeare wrote it around 1600.",
    "Why is the sky blue?": "Air scatters short wavelengths more than long ones.",
    "What is seven times eight?": "Seven times eight is fifty-six.",
    "Where do penguins live?": "Most of them live in the southern hemisphere.",
    "Translate bread into French.": "Bread is called pain in French.",
}
# The fewest and shortest that every stage takes.
SMALLEST = {
    "MODEL": "smollm2",
    "TIME_BUDGET": "",
    "QUANTIZATION": "Q8_0",
    "HELD_OUT_ROWS": 2,
    "EVAL_PROMPTS": 1,
    "MORE_FLAGS": "--tool-rows 0 --max-steps 2 --warmup-steps 0 --eval-answer-tokens 8",
}
RUN = "smollm2-135m-cpu"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def with_settings(notebook: nbformat.NotebookNode, **settings: Any) -> nbformat.NotebookNode:
    """Add a cell that overrides settings, as papermill does."""
    source = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    at = next(at for at, cell in enumerate(notebook.cells) if cell.id == "settings")
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(source))
    return notebook


def unchecked(notebook: nbformat.NotebookNode) -> list[str]:
    """Commands of ours whose failure would not stop the cells after them."""
    found = []
    for cell in code_cells(notebook).values():
        lines = [line.strip() for line in cell.source.splitlines() if line != "keep()"]
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if re.match(r"!.*(python|git|\.sh)\b", line) and following != "stop_if_failed()":
                found.append(line)
    return found


def test_form():
    notebook = check_form(NOTEBOOK, most_cells=20)
    # Without this Colab starts a machine that has no GPU.
    assert notebook.metadata.accelerator == "GPU"
    assert notebook.metadata.colab.gpuType == "T4"
    path = re.search(r"colab\.research\.google\.com/github/OWNER/\w+/blob/main/([\w./]+)\)",
                     notebook.cells[0].source)[1]  # fmt: skip
    assert ROOT / path == NOTEBOOK


def test_commands_exist_and_each_is_checked():
    notebook = read()
    sources = "\n".join(cell.source for cell in notebook.cells)
    assert len(re.findall(r"^ *!python -m", sources, flags=re.MULTILINE)) >= 6
    assert wrong_commands(notebook) == []
    assert unchecked(notebook) == []


def test_wrong_option_and_unchecked_command_are_noticed():
    wrong = small_notebook("!python -m scripts.train_lora {FLAGS} --preveiw 1\nkeep()")
    assert wrong_commands(wrong) == ["--preveiw"]
    assert unchecked(wrong) == ["!python -m scripts.train_lora {FLAGS} --preveiw 1"]


class Drive:
    """In place of ``google.colab``: mounts an empty folder and notes what is downloaded."""

    def __init__(self, folder: Path) -> None:
        self.content = folder / "content"
        self.content.mkdir()
        self.modules, self.downloads = folder / "modules", folder / "downloads.txt"
        package = self.modules / "google/colab"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "drive.py").write_text(
            "import pathlib\n"
            "def mount(path):\n    pathlib.Path(path, 'MyDrive').mkdir(parents=True, exist_ok=True)\n"
        )
        (package / "files.py").write_text(
            "import pathlib\n"
            "def download(name):\n"
            "    assert pathlib.Path(name).is_file()\n"
            f"    with open({str(self.downloads)!r}, 'a') as notes:\n        print(name, file=notes)\n"
        )

    @property
    def kept(self) -> Path:
        return self.content / "drive/MyDrive/tomeforge"

    def place(self, notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
        """Let a notebook use this folder where Colab has ``/content``."""
        for cell in notebook.cells:
            cell.source = cell.source.replace("/content", str(self.content))
        return notebook


@pytest.fixture
def colab(tmp_path, monkeypatch) -> Drive:
    drive = Drive(tmp_path)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-test")
    monkeypatch.setenv("PYTHONPATH", str(drive.modules))
    monkeypatch.delenv("TOMEFORGE_OUTPUTS", raising=False)
    return drive


@pytest.fixture
def variables(colab, tmp_path, monkeypatch):
    """What cells without commands leave behind, run in this process from a folder of its own."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(colab.modules))
    for name in ("QUANTIZATION", "TOMEFORGE_OUTPUTS"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)

    def run(in_colab: bool, **settings: Any) -> dict[str, Any]:
        names: dict[str, Any] = {"os": os, "Path": Path, "IN_COLAB": in_colab}
        cells = code_cells(colab.place(read()))
        exec(cells["settings"].source, names)
        names |= settings
        exec(cells["folders"].source, names)
        for module in [name for name in sys.modules if name.startswith("google.colab")]:
            monkeypatch.delitem(sys.modules, module)
        return names

    return run


def resolved(names: dict[str, Any]) -> TrainingRecipe:
    return parse_recipe("", shlex.split(names["FLAGS"]))[0]


@pytest.mark.parametrize("model", ["tinyllama", "mistral", "smollm2"])
def test_settings_become_a_recipe(variables, model):
    recipe = resolved(variables(False, MODEL=model))
    assert model in recipe.run_name
    assert (recipe.time_budget, recipe.max_eval_rows, recipe.eval_prompts) == ("55m", 40, 24)
    assert (recipe.checkpoint_dir, recipe.output_root) == ("", "outputs")
    assert os.environ["TOMEFORGE_OUTPUTS"] == "outputs"
    more = {"DATASET": "my rows.jsonl", "RUN_NAME": "mine", "TIME_BUDGET": ""}
    recipe = resolved(variables(False, MODEL=model, MORE_FLAGS="--lora-r 32", **more))
    assert (recipe.dataset_name, recipe.run_name, recipe.lora_r) == ("my rows.jsonl", "mine", 32)
    assert recipe.time_budget == ""
    with pytest.raises(SystemExit):
        resolved(variables(False, MODEL=model, MORE_FLAGS="--lora-ranks 32"))


def test_drive_holds_checkpoints_and_whole_files(variables, colab):
    names = variables(True)
    run, kept = names["RUN"], names["KEPT"]
    assert resolved(names).checkpoint_dir == str(colab.kept / "checkpoints")
    assert kept == colab.kept / run.name
    (run / "adapter").mkdir(parents=True)
    for at, name in enumerate(("adapter/weights", "provenance.json")):
        (run / name).write_text(name)
        os.utime(run / name, (at, at))
    names["keep"]()
    copies = [kept / "adapter/weights", kept / "provenance.json"]
    times = [path.stat().st_mtime_ns for path in copies]
    assert times[0] <= times[1]
    assert not list(kept.rglob("*.part"))
    names["keep"]()  # nothing is new
    assert [path.stat().st_mtime_ns for path in copies] == times
    (run / "adapter/weights").write_text("trained on")
    os.utime(run / "adapter/weights", (times[0] / 1e9 + 9,) * 2)
    names["keep"]()
    assert copies[0].read_text() == "trained on"
    # What is there is not replaced by an older copy; a new runtime gets all of it.
    (run / "provenance.json").write_text("newer")
    variables(True)
    assert (run / "provenance.json").read_text() == "newer"
    shutil.rmtree(run)
    variables(True)
    assert (run / "adapter/weights").read_text() == "trained on"
    assert (run / "provenance.json").read_text() == "provenance.json"
    # Without Drive all stays on this machine.
    names = variables(True, USE_DRIVE=False)
    assert names["KEPT"] is None
    assert resolved(names).checkpoint_dir == ""


def git(folder: Path, *words: str) -> None:
    name = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    subprocess.run(["git", *name, *words], cwd=folder, check=True, capture_output=True)


@pytest.mark.model
def test_install_on_colab(colab, tmp_path):
    origin = tmp_path / "origin"
    (origin / "scripts").mkdir(parents=True)
    (origin / "scripts/pipeline.sh").touch()
    setup = origin / "scripts/setup.sh"
    setup.write_text('#!/bin/sh\necho "set-up with $PYTHON"\n[ ! -e /content/broken ]\n')
    setup.write_text(setup.read_text().replace("/content", str(colab.content)))
    setup.chmod(0o755)
    git(origin, "init", "--quiet")
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "--message", "first")
    source = code_cells(colab.place(read()))["install"].source
    named = source.replace('REPOSITORY = ""', f"REPOSITORY = {str(origin)!r}")
    # Twice: the second time there is a clone already.
    text = execute(small_notebook(named, named), tmp_path)
    assert text.count("set-up with python3") == 2
    assert text.count("Cloning into") == 1
    assert f"working directory {colab.content / 'tomeforge'}" in text
    with pytest.raises(CellExecutionError, match="write the address"):
        execute(small_notebook(source), tmp_path)
    (colab.content / "broken").touch()
    with pytest.raises(CellExecutionError, match="exit code 1"):
        execute(small_notebook(named), tmp_path)


@pytest.mark.model
def test_on_an_own_machine_it_stays_in_the_clone(tmp_path, monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.setenv("TOMEFORGE_OUTPUTS", str(tmp_path))
    cells = code_cells(read())
    sources = [cells[name].source for name in ("install", "settings", "folders")]
    # From scripts/, where Jupyter starts a notebook that is opened there.
    text = execute(small_notebook(*sources), ROOT / "scripts")
    assert f"working directory {ROOT}\n" in text
    run = tmp_path / "tinyllama-1.1b-colab"
    assert f"results in {run}, kept in {run}\n" in text
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CellExecutionError, match="exit code 2"):
        execute(small_notebook(*sources, "!exit 2\nstop_if_failed()"))


def make_checkout(folder: Path) -> Path:
    """The repository as Colab would have cloned it, with a set-up that has nothing to do."""
    (folder / "scripts").mkdir(parents=True)
    (folder / "outputs").mkdir()
    for name in ("export", "integration", "tools", "requirements.txt", "outputs/models"):
        (folder / name).symlink_to((ROOT / name).resolve())
    for path in (ROOT / "scripts").iterdir():
        if path.name not in ("setup.sh", "__pycache__"):
            (folder / "scripts" / path.name).symlink_to(path)
    (folder / "scripts/setup.sh").write_text("#!/bin/sh\necho setup: nothing to do\n")
    (folder / "scripts/setup.sh").chmod(0o755)
    return folder


def shortest(colab: Drive, rows: Path) -> nbformat.NotebookNode:
    notebook = colab.place(with_settings(read(), **SMALLEST, DATASET=str(rows)))
    install = code_cells(notebook)["install"]
    install.source = install.source.replace('REPOSITORY = ""', 'REPOSITORY = "is cloned already"')
    return notebook


@pytest.mark.model
@pytest.mark.timeout(600)  # all stages: about 80 s of one core
def test_from_conversations_to_a_chat_on_colab(colab, default_model_dir, tmp_path, monkeypatch):
    # Threads of several processes that wait for each other are slower than one thread each.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    checkout = make_checkout(colab.content / "tomeforge")
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": prompt, "response": text} for prompt, text in ANSWERED.items()]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    notebook = shortest(colab, rows)
    text = execute(notebook, tmp_path, seconds_a_cell=300)
    cells = code_cells(notebook)
    assert "setup: nothing to do" in printed(cells["install"])
    assert "trained tokens are" in printed(cells["data"])
    assert "PASS" in printed(cells["train"])
    assert "train: 2 steps in" in printed(cells["train"])
    assert "image/png" in cells["curve"].outputs[0].data
    assert re.search(r"ok +mean_kl", printed(cells["certificate"]))
    (page,) = (one.data["text/html"] for one in cells["report"].outputs if "data" in one)
    assert page.startswith("<div><iframe srcdoc=")
    answer = re.search(r"\{.*\}", printed(cells["chat"]), flags=re.DOTALL)[0]
    assert json.loads(answer)["error"] is None
    assert "error:" not in text
    run, kept = checkout / "outputs" / RUN, colab.kept / RUN
    assert (checkout / colab.downloads.read_text().strip()).name == "report.html"
    assert not (run / "checkpoints").exists()
    assert list((colab.kept / "checkpoints" / RUN).glob("*/checkpoint-2/complete.json"))
    for name in ("adapter/adapter_model.safetensors", "gguf/certificate.json", "report.html"):
        assert (kept / name).read_bytes() == (run / name).read_bytes()

    # A new runtime: its disk is empty, Drive is not. Nothing is made a second time.
    made = {path: path.stat().st_mtime_ns for path in kept.rglob("*") if path.suffix == ".gguf"}
    shutil.rmtree(run)
    notebook = shortest(colab, rows)
    for cell_id in ("data", "curve", "evaluate", "report", "chat", "download"):
        notebook.cells.remove(code_cells(notebook)[cell_id])
    execute(notebook, tmp_path)
    cells = code_cells(notebook)
    assert "is up to date" in printed(cells["train"])
    assert "wrote Q8_0" not in printed(cells["export"])
    assert "every file has its certificate" in printed(cells["certificate"])
    assert made == {path: path.stat().st_mtime_ns for path in made}
