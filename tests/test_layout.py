"""The design's import rules, and commands whose --help needs no heavy library."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"tools", "integration", "export", "scripts", "tests"}
HEAVY = {"torch", "transformers", "unsloth", "llama_cpp"}
FORBIDDEN = {
    "tools": {"torch", "transformers", "unsloth", "llama_cpp", *FOLDERS - {"tools"}},
    "integration": {"unsloth", "torch", "transformers", "scripts", "export", "tests"},
    "export": {"unsloth", "peft", "tools", "integration", "scripts", "tests"},
    "scripts": {"export", "integration", "tests"},
}
COMMANDS = sorted(
    f"{path.parent.name}.{path.stem}"
    for folder in FORBIDDEN
    for path in (ROOT / folder).glob("*.py")
    if "run_command(main)" in path.read_text(encoding="utf-8")
)


def imported_modules(source: str) -> set[str]:
    """Top-level names of everything a source imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def broken_rules(folder: str, source: str, name: str = "module.py") -> set[str]:
    found = imported_modules(source)
    forbidden = found & FORBIDDEN[folder]
    if folder == "integration" and name.startswith("huggingface_"):  # the one back end that may
        forbidden -= {"torch", "transformers"}
    if folder == "export":
        forbidden |= {name for name in found if name.startswith("langchain")}
    return forbidden


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_folder_imports_only_what_the_design_allows(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    broken = {
        str(path): rules
        for path in files
        if (rules := broken_rules(folder, path.read_text(), path.name))
    }
    assert broken == {}


@pytest.mark.parametrize(
    ("folder", "source", "rule"),
    [
        ("tools", "import torch", "torch"),
        ("integration", "def f():\n    from scripts.recipe import x", "scripts"),
        ("export", "from langchain_core.tools import tool", "langchain_core"),
        ("scripts", "import export.lora_math", "export"),
    ],
)
def test_import_check_finds_a_broken_rule(folder, source, rule):
    assert broken_rules(folder, source) == {rule}


def test_every_folder_is_a_package():
    assert [name for name in FOLDERS if not (ROOT / name / "__init__.py").is_file()] == []


def help_output(module: str) -> subprocess.CompletedProcess:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{module}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    code = exit.code\n"
        f"print('HEAVY', sorted(set(sys.modules) & {HEAVY!r}), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.parametrize("module", COMMANDS)
def test_help_answers_without_heavy_imports(module):
    done = help_output(module)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert "HEAVY []" in done.stderr


def test_heavy_import_would_be_seen(tmp_path):
    (tmp_path / "heavy_command.py").write_text("import torch\nprint('usage:')\n")
    done = subprocess.run(
        [sys.executable, "-c", "import heavy_command, sys; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.endswith("True\n")


def test_the_contract_commands_are_there():
    contract = "scripts.prepare_data scripts.train_lora scripts.evaluate_model scripts.benchmark "
    contract += (
        "export.export_gguf export.merge_adapter export.export_lora_gguf export.verify_gguf "
    )
    contract += "integration.chat integration.ask"
    assert set(contract.split()) <= set(COMMANDS)
