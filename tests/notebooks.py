"""Read notebooks, run them, and hold their commands against the commands that there are."""

import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

from tests.command_lines import ROOT, problems

SECONDS_A_CELL = 120


def code_cells(notebook: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def commands(source: str) -> list[str]:
    """Lines of a cell, those that a backslash continues joined."""
    return re.sub(r"\\\n\s*", "", source).splitlines()


def stored(notebook: nbformat.NotebookNode) -> list[str]:
    """Cells that keep what a run left."""
    return [
        cell.id
        for cell in code_cells(notebook).values()
        if cell.outputs or cell.execution_count is not None or cell.metadata
    ]


def wrong_commands(notebook: nbformat.NotebookNode) -> list[str]:
    lines = [line for cell in notebook.cells for line in commands(cell.source)]
    return [problem for line in lines for problem in problems(line)]


def check_form(path: Path, most_cells: int) -> nbformat.NotebookNode:
    """Give a notebook that is as a fresh clone should have it."""
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len(notebook.cells) <= most_cells
    assert stored(notebook) == []
    # As nbformat writes it, so that a run and a "clear all outputs" leave the file as it was.
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook) + "\n"
    return notebook


def execute(
    notebook: nbformat.NotebookNode, folder: Path = ROOT, seconds_a_cell: int = SECONDS_A_CELL
) -> str:
    """Run a notebook in a kernel of its own; give all that its cells printed."""
    with tempfile.TemporaryDirectory() as sockets:
        # Files instead of TCP ports: nothing else on the machine can get in the way.
        transport = {"transport": "ipc", "ip": str(Path(sockets, "kernel"))}
        NotebookClient(
            notebook,
            config=Config({"KernelManager": transport}),
            timeout=seconds_a_cell,
            startup_timeout=SECONDS_A_CELL,
            resources={"metadata": {"path": str(folder)}},
        ).execute()
    return "".join(printed(cell) for cell in code_cells(notebook).values())


def printed(cell: nbformat.NotebookNode) -> str:
    """What a cell that ran has printed."""
    return "".join(output.get("text", "") for output in cell.outputs)


def small_notebook(*sources: str) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.v4.new_notebook(cells=cells)
