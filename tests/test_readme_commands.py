"""Commands of the README that no other test runs: make, adapters.sh, looking before training, code."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts._cli import MODEL, CommandError
from tests.command_lines import ROOT, problems
from tests.tiny_runs import write_recipe

README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUP = "scripts/setup.sh"
PYTHON = ".venv/bin/python"
# Notes what it was called with; fails where it is told to.
RECORDER = """#!/usr/bin/env bash
echo "$0 $*" | sed "s|$PWD/||; s/ *$//" >>calls
[ "$2" != scripts.default_model ] || echo base
[ -z "$FAIL" ] || [[ "$0 $*" != *"$FAIL"* ]]
"""
BENCHMARKS = [f"{PYTHON} -m scripts.benchmark {kind}" for kind in ("train", "chat", "export")]


@pytest.fixture
def tree(tmp_path) -> Path:
    """The Makefile and the scripts, over programs that only note their calls."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / PYTHON).parent.mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "scripts/recipes").symlink_to(ROOT / "scripts/recipes")
    for name in (PYTHON, SETUP, "scripts/adapters.sh", "scripts/pipeline.sh"):
        (tmp_path / name).write_text(RECORDER)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run(tree: Path, *command: str, fail: str = "") -> tuple[int, list[str]]:
    """Run a command in the tree; give its exit code and the calls it came to."""
    (tree / "calls").unlink(missing_ok=True)
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    env.pop("TOMEFORGE_OUTPUTS", None)
    done = subprocess.run(
        command, cwd=tree, env=env | {"FAIL": fail}, capture_output=True, text=True, check=False
    )
    return done.returncode, (tree / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("target", "calls"),
    [
        ("demo", [f"{PYTHON} -m scripts.demo"]),
        ("adapters", ["scripts/adapters.sh"]),
        ("adapters-demo", ["scripts/adapters.sh", f"{PYTHON} -m scripts.adapters_demo"]),
        ("test", [f"{PYTHON} -m pytest -n auto --dist loadscope --no-loadscope-reorder"]),
        (
            "check",
            [f"{PYTHON} -m {words}" for words in ("ruff check .", "ruff format --check .", "mypy")],
        ),
        ("bench", BENCHMARKS),
    ],
)
def test_target_runs_its_commands(tree, target, calls):
    assert f"make {target}\n" in README
    assert run(tree, "make", target) == (0, [SETUP, *calls])
    assert [problem for call in calls if " -m scripts" in call for problem in problems(call)] == []
    # Nothing begins where set-up failed.
    code, called = run(tree, "make", target, fail="setup")
    assert (code != 0, called) == (True, [SETUP])


def test_missed_benchmark_does_not_keep_the_others_from_running(tree):
    code, calls = run(tree, "make", "bench", fail="benchmark chat")
    assert (code != 0, calls) == (True, [SETUP, *BENCHMARKS])


def test_adapters_script_builds_what_is_missing(tree):
    shutil.copy(ROOT / "scripts/adapters.sh", tree / "scripts")
    code, calls = run(tree, "scripts/adapters.sh")
    assert code == 0
    assert [problem for call in calls for problem in problems(call)] == []
    trained = [shlex.split(call)[1] for call in calls if call.startswith("scripts/pipeline.sh")]
    recipes = [
        f"scripts/recipes/smollm2-135m-{name}-cpu.yaml" for name in ("json", "coding", "support")
    ]
    assert trained == recipes
    modules = re.findall(r"-m ([\w.]+)", "\n".join(calls))
    rest = ["scripts.default_model", "export.export_base", "export.export_embedding"]
    assert modules == ["export.export_lora_gguf"] * 3 + [*rest, "integration.router"]
    # A LoRA GGUF that is not older than its adapter is kept.
    (lora,) = re.findall(r"--output (\S*json\S*-LoRA\.gguf)", "\n".join(calls))
    adapter = tree / "outputs/smollm2-135m-json-cpu/adapter/adapter_model.safetensors"
    for path in (adapter, tree / lora):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    code, calls = run(tree, "scripts/adapters.sh", "json")
    assert code == 0
    assert not any("export_lora_gguf" in call for call in calls)
    os.utime(tree / lora, (0, 0))
    assert any("export_lora_gguf" in call for call in run(tree, "scripts/adapters.sh", "json")[1])
    # An adapter that did not become one ends it.
    assert run(tree, "scripts/adapters.sh", "json", fail="--to train")[0] != 0


def launcher_line(program: str) -> list[str]:
    (line,) = re.findall(rf"^{program} .*", README, flags=re.MULTILINE)
    return shlex.split(line)


@pytest.mark.parametrize("program", ["torchrun", "accelerate"])
def test_launchers_take_their_lines(program):
    """The launchers' own parsers; that two processes train as one, test_distributed shows."""
    from scripts.recipe import parse_recipe

    words = launcher_line(program)
    if program == "torchrun":
        from torch.distributed.run import parse_args

        options = parse_args(words[1:])
        processes = int(options.nproc_per_node)
    else:
        from accelerate.commands.launch import launch_command_parser

        assert words[1] == "launch"
        options = launch_command_parser().parse_args(words[2:])
        processes = options.num_processes
    assert (processes, options.module, options.training_script) == (2, True, "scripts.train_lora")
    recipe, _ = parse_recipe("", options.training_script_args)
    assert recipe.run_name == "mistral-7b-colab"
    assert recipe.gradient_accumulation_steps % processes == 0


def test_wrong_option_of_a_launcher_is_noticed():
    from accelerate.commands.launch import launch_command_parser

    words = launcher_line("accelerate")
    words[words.index("--num_processes")] = "--num_procesess"
    with pytest.raises(SystemExit):
        launch_command_parser().parse_args(words[2:])


def test_benchmark_of_adapters_says_what_to_build(tmp_path, monkeypatch):
    from scripts import benchmark

    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError, match="build them: make adapters") as caught:
        benchmark.main(["adapters"])
    assert caught.value.exit_code == MODEL


@pytest.mark.model
def test_looking_before_training(tiny_model_dir, tmp_path, capsys):
    from scripts import train_lora

    recipe = write_recipe(tmp_path, tiny_model_dir, backend="peft")
    shown = ["--config", str(recipe), "--run-name", "mine", "--learning-rate", "1e-4"]
    shown += ["--dataset-name", str(tmp_path / "rows.jsonl")]
    assert train_lora.main([*shown, "--preview", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("<|im_start|>user") == 3
    assert "24 rows" in captured.err
    drive = tmp_path / "drive"
    plan = ["--dry-run", "--json", "--time-budget", "55m", "--checkpoint-dir", str(drive)]
    assert train_lora.main([*shown, *plan]) == 0
    captured = capsys.readouterr()
    assert '"budget_seconds": 3300.0' in captured.out
    assert "24 of 24 rows fit into 55m" in captured.err
    assert not (tmp_path / "outputs/mine/adapter").exists()


@pytest.mark.model
def test_langchain_code_runs(embedded_gguf):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    code, count = re.subn(r'"outputs/[^"]+\.gguf"', repr(str(embedded_gguf)), code)
    assert count == 1
    names: dict[str, object] = {}
    exec(code.replace("\nagent.invoke(", "\nanswer = agent.invoke("), names)
    question, *rest = names["answer"]["messages"]
    assert question.content.startswith("Wrap this")
    assert rest[-1].type == "ai"
