"""The three notebooks about adapters run from top to bottom, on stand-ins for the trained adapters."""

import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient.exceptions import CellExecutionError, CellTimeoutError

from tests.command_lines import ROOT
from tests.conftest import make_adapter
from tests.notebooks import (
    check_form,
    code_cells,
    execute,
    small_notebook,
    stored,
    wrong_commands,
)

NOTEBOOKS = sorted((ROOT / "scripts").glob("adapters_*.ipynb"))
NAMES = ("json", "coding", "support")
# The first cells after the title, in every notebook: what Colab needs, where we are, what is missing.
COMMON = ("colab", "paths", "build")
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == [
        "adapters_1_load_switch", "adapters_2_merge", "adapters_3_router",
    ]  # fmt: skip


@by_name
def test_form(path):
    check_form(path, most_cells=15)
    first, cells = (nbformat.read(one, 4) for one in (NOTEBOOKS[0], path))
    for name in COMMON:
        assert code_cells(cells)[name].source == code_cells(first)[name].source


def test_output_left_in_a_cell_is_noticed():
    notebook = small_notebook("1 + 1")
    assert stored(notebook) == []
    notebook.cells[0].execution_count = 1
    assert stored(notebook) == [notebook.cells[0].id]


@by_name
def test_commands_exist(path):
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells)
    assert len(re.findall(r"python -m", text)) >= 1
    assert wrong_commands(notebook) == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("%%bash\npython -m export.merge_adapter x \\\n  --outptu y", "--outptu"),
        ("%%bash\npython -m integration.router trian", "no such subcommand"),
        ("%%bash\nx=$(python -m export.merge_adaptr x)", "no module"),
        ("%%bash\nscripts/adaptors.sh", "scripts/adaptors.sh"),
    ],
)
def test_wrong_command_is_noticed(source, problem):
    (found,) = wrong_commands(small_notebook(source))
    assert problem in found


@pytest.fixture(scope="module")
def outputs(default_model_dir, embedding_gguf, tmp_path_factory) -> Path:
    """A folder as ``scripts/adapters.sh`` leaves it, with random adapters too weak to harm answers."""
    from export.export_base import main as export_base
    from export.export_lora_gguf import main as export_lora

    folder = tmp_path_factory.mktemp("outputs")
    (folder / "models").mkdir()
    (folder / "models" / embedding_gguf.name).symlink_to(embedding_gguf.resolve())
    for seed, name in enumerate(NAMES, 1):
        run = folder / f"smollm2-135m-{name}-cpu"
        make_adapter(run / "adapter", default_model_dir.resolve(), seed=seed, lora_alpha=2)
        (run / "gguf").mkdir()
        target = run / "gguf" / f"SmolLM2-135M-Instruct-{name}-cpu-v1.0-F16-LoRA.gguf"
        assert export_lora([str(run / "adapter"), "--output", str(target)]) == 0
    base = ["--output", str(folder / "smollm2-135m-base/gguf"), "--threads", "2"]
    assert export_base([str(default_model_dir), *base]) == 0
    return folder


@pytest.fixture
def run(outputs, monkeypatch):
    """Execute a notebook of ours in the folder of stand-ins."""
    monkeypatch.setenv("TOMEFORGE_OUTPUTS", str(outputs))
    # Whoever runs the tests on Colab has no repository to fetch.
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)

    def execute_named(name: str, folder: Path = ROOT) -> str:
        return execute(nbformat.read(ROOT / f"scripts/{name}.ipynb", 4), folder)

    return execute_named


def listed_examples() -> str:
    """The configuration without the rows of data sets."""
    text = (ROOT / "integration/adapters.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    for one in (*config["adapters"], config["base"]):
        one.pop("examples_from", None)
    return yaml.safe_dump(config, allow_unicode=True)


@pytest.mark.model
def test_load_and_switch(run, outputs):
    # From scripts/, where Jupyter starts a notebook that is opened there.
    text = run("adapters_1_load_switch", ROOT / "scripts")
    for label in ("base", *NAMES):
        assert f"--- {label}\n" in text
        assert re.search(rf"^{label} +bit for bit as before", text, flags=re.MULTILINE)
    assert re.search(r"^switch, median of 2000: +[\d.]+ µs", text, flags=re.MULTILINE)
    assert len(re.findall(r": error: .*\(exit code [23]\)$", text, flags=re.MULTILINE)) == 7
    assert not (outputs / "half-an-adapter.gguf").exists()


@pytest.mark.model
def test_merge(run, outputs):
    text = run("adapters_2_merge")
    assert re.search(r"^coding +\d\.\de-\d+ ", text, flags=re.MULTILINE)
    assert re.search(r"^json:0.5\+coding:0.5 +\d\.\de-\d+ ", text, flags=re.MULTILINE)
    assert re.search(r"^merged .* MB, reads +\d+, writes +\d+ tokens/s", text, flags=re.MULTILINE)
    assert "FROM " in text  # the Modelfile
    assert (outputs / "merged/coding-16bit/config.json").is_file()
    # The twin of its check: without its adapter, the base is another model.
    (apart,) = re.findall(r"^base +(\d\.\de[+-]\d+) ", text, flags=re.MULTILINE)
    assert float(apart) > 1e-4


@pytest.mark.model
def test_router(run, outputs):
    notebook = nbformat.read(ROOT / "scripts/adapters_3_router.ipynb", 4)
    # On the listed examples alone: with all that they come from, training takes a minute.
    train, command = code_cells(notebook)["train"], "router train "
    small = outputs / "listed.yaml"
    small.write_text(listed_examples(), encoding="utf-8")
    assert command in train.source
    train.source = train.source.replace(command, f"{command}--config {small} ")
    text = execute(notebook)
    accuracy = re.search(r"^\d+ of \d+ right: ([\d.]+)%", text, flags=re.MULTILINE)
    assert accuracy
    # Far over chance (25 %): the examples were learnt. How good the whole router is, others measure.
    assert float(accuracy[1]) > 60
    assert "latency: median" in text
    assert "route: json - " in text
    assert "-> coding (goes on with coding" in text
    assert text.rindex("adapter: chess") < text.rindex("adapter: support")
    report = json.loads((outputs / "router/report.json").read_text(encoding="utf-8"))
    assert "chess" not in report["classes"]


@pytest.mark.model
@pytest.mark.parametrize(
    ("sources", "problem"),
    [
        (("x = 1", "raise ValueError('no such place')"), "no such place"),
        (
            ("%%bash\nset -e\npython -m integration.router train --encodre x\necho on",),
            "exit status 2",
        ),
        (("%%bash\nset -eo pipefail\npython -m integration.router explain | cat",), "exit status"),
    ],
)
def test_broken_cell_is_noticed(sources, problem):
    with pytest.raises(CellExecutionError, match=problem):
        execute(small_notebook(*sources))


@pytest.mark.model
def test_cell_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    pid_file = tmp_path / "pid"
    with pytest.raises(CellTimeoutError):
        execute(small_notebook(f"%%bash\necho $$ > {pid_file}\nsleep 300"), seconds_a_cell=4)
    assert not Path("/proc", pid_file.read_text().strip()).exists()
