"""Every command in the README exists, and is run by a test; its links and messages are real."""

import ast
import re

import pytest

from tests.command_lines import ROOT, problems

README = (ROOT / "README.md").read_text(encoding="utf-8")
RUSSIAN = (ROOT / "README.ru.md").read_text(encoding="utf-8")
both = pytest.mark.parametrize("text", [README, RUSSIAN], ids=["english", "russian"])

# What runs each command for real, with small stand-ins for data and models. Every option that the
# README shows for a command is named in one of its files.
RUN_BY = {
    "make demo": "test_readme_commands.py::test_target_runs_its_commands",
    "make adapters": "test_readme_commands.py::test_adapters_script_builds_what_is_missing",
    "make adapters-demo": "test_readme_commands.py::test_target_runs_its_commands",
    "make test": "test_readme_commands.py::test_target_runs_its_commands",
    "make check": "test_readme_commands.py::test_target_runs_its_commands",
    "make bench": "test_readme_commands.py::test_target_runs_its_commands",
    "scripts/setup.sh": "test_setup.py::test_complete_machine_passes",
    "scripts/pipeline.sh": "test_setup.py::test_pipeline_runs_a_stage_and_skips_it_the_second_time",
    "scripts/examples/summarize_notes.sh": "test_examples.py::test_every_note_has_a_summary_or_says_why_not",
    "scripts/examples/format_commit_messages.sh": "test_examples.py::test_bodies_are_wrapped_and_trailers_kept",
    "scripts/examples/csv_answers.sh": "test_examples.py::test_csv_keeps_its_cells_and_gains_three",
    "integration.chat": "test_chat.py::test_conversation_and_commands "
    "test_chat_terminal.py::test_call_is_run_only_when_approved "
    "test_ask.py::test_usage_errors_are_exit_2 "
    "test_ask_route.py::test_each_line_goes_to_its_adapter_and_answers_stay_in_order",
    "integration.ask": "test_ask.py::test_json_prints_the_object_of_the_contract "
    "test_ask.py::test_plain_lines_strings_and_objects_are_prompts "
    "test_ask.py::test_output_is_resumed "
    "test_ask_route.py::test_each_line_goes_to_its_adapter_and_answers_stay_in_order",
    "integration.router train": "test_router.py::test_train_explain_evaluate",
    "integration.router explain": "test_router.py::test_train_explain_evaluate",
    "integration.router evaluate": "test_router.py::test_train_explain_evaluate",
    "scripts.prepare_data": "test_rehearsal.py::test_every_command_succeeds",
    "scripts.train_lora": "test_rehearsal.py::test_every_command_succeeds "
    "test_readme_commands.py::test_looking_before_training",
    "torchrun scripts.train_lora": "test_distributed.py::test_two_processes_take_the_steps_of_one "
    "test_readme_commands.py::test_launchers_take_their_lines",
    "accelerate launch scripts.train_lora": "test_readme_commands.py::test_launchers_take_their_lines",
    "scripts.evaluate_model": "test_train_lora.py::test_tuned_model_is_measured_to_be_better "
    "test_evaluate_model.py::test_a_published_file_is_asked_of_base_and_tuned "
    "test_evaluate_model.py::test_other_rows_in_any_shape",
    "scripts.report": "test_report.py::test_command_prints_the_path",
    "scripts.evaluate_prompt": "test_evaluate_prompt.py::test_prompt_that_helps_is_exit_0",
    "scripts.evaluate_tools": "test_evaluate_tools.py::test_every_contender_is_asked_and_written",
    "scripts.evaluate_adapters": "test_evaluate_adapters.py::"
    "test_base_instruction_and_adapter_are_asked_and_written",
    "scripts.make_tool_data": "test_make_tool_data.py::test_command_prints_rows_or_a_report",
    "scripts.benchmark train": "test_benchmark.py::test_failing_contender_is_named",
    "scripts.benchmark chat": "test_benchmark_chat.py::test_everything_is_measured_on_a_real_model",
    "scripts.benchmark export": "test_benchmark_export.py::test_both_sides_make_the_same_product",
    "scripts.benchmark adapters": "test_readme_commands.py::test_benchmark_of_adapters_says_what_to_build",
    "export.export_gguf": "test_export_gguf.py::test_menu_tells_sizes_and_writes_nothing "
    "test_export_gguf.py::test_size_limit_picks_the_best_type_that_fits "
    "test_merged_weights.py::test_weights_are_read_from_the_command_line "
    "test_adapter_notebooks.py::test_merge",
    "export.verify_gguf": "test_verify_gguf.py::test_good_file_passes_against_its_adapter",
    "export.export_lora_gguf": "test_export_lora_gguf.py::"
    "test_command_replaces_a_file_and_tells_its_path_and_size",
    "export.merge_adapter": "test_merge_adapter.py::test_merged_folder_loads_and_has_trainings_tokenizer",
    "export.export_base": "test_export_base.py::test_second_run_keeps_files_and_damage_is_mended",
    "export.export_embedding": "test_export_embedding.py::test_whole_file_of_the_same_model_is_kept",
}
SUBCOMMANDS = ("integration.router", "scripts.benchmark")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def shell_lines(text: str) -> list[str]:
    return [line for one in blocks(text, "bash") for line in one.splitlines() if line.strip()]


def prose(text: str) -> str:
    """The text without code blocks and comments."""
    text = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(text))


def commands(line: str) -> list[tuple[str, list[str]]]:
    """Name each command of a line, and the options that stand behind it."""
    found = []
    for command in re.finditer(
        r"(?:(torchrun|accelerate launch)|python)\b(.*?) -m ([\w.]+)([^|;<>]*)", line
    ):
        words = [command[1], command[3]] if command[1] else [command[3]]
        if command[3] in SUBCOMMANDS:
            words.append(command[4].split()[0])
        found.append((" ".join(words), re.findall(r"(?<= )--[\w-]+", command[2] + command[4])))
    for script in re.finditer(r"(?:^|[ |])(scripts/[\w./]+\.sh)([^|<>]*)", line):
        found.append((script[1], re.findall(r"(?<= )--[\w-]+", script[2])))
    found += [(f"make {target}", []) for target in re.findall(r"^make ([\w-]+)", line)]
    return found


def shown_commands(text: str) -> dict[str, set[str]]:
    """Give each command of a text with its options, from the blocks and from the prose."""
    found: dict[str, set[str]] = {}
    for line in [*shell_lines(text), *code_spans(text)]:
        for name, options in commands(line):
            found.setdefault(name, set()).update(options)
    return found


def mentions(source: str, command: str) -> bool:
    """Whether a test's file names a command: its script, its make target, its module (imported too)."""
    words = [word for word in command.split() if word not in ("torchrun", "accelerate", "launch")]
    if words[0] == "make" or words[0].endswith(".sh"):
        return all(word.rpartition("/")[2] in source for word in words)
    folder, _, module = words[0].partition(".")
    imported = rf"{folder}\.{module}\b|from {folder} import [^\n]*\b{module}\b"
    return bool(re.search(imported, source)) and all(f'"{word}"' in source for word in words[1:])


def untested(shown: dict[str, set[str]]) -> list[str]:
    """Name commands without a test, tests that are not there, and options that no test names."""
    found = []
    for command, options in shown.items():
        sources = ""
        for test in RUN_BY.get(command, "").split():
            file, _, function = test.partition("::")
            path = ROOT / "tests" / file
            source = path.read_text(encoding="utf-8") if path.is_file() else ""
            if function not in [getattr(node, "name", "") for node in ast.parse(source).body]:
                found.append(f"{command}: there is no {test}")
            sources += source
        if not mentions(sources, command):
            found.append(f"{command}: no test runs it")
        found += [f"{command}: no test names {one}" for one in options if one not in sources]
    return found


def test_every_command_is_run_by_a_test():
    shown = shown_commands(README)
    assert len(shown) > 30
    assert untested(shown) == []
    assert set(RUN_BY) == set(shown)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("python -m integration.aks", "integration.aks: no test runs it"),
        ("python -m scripts.benchmark tools", "scripts.benchmark tools: no test runs it"),
        ("python -m export.export_base x --modle", "export.export_base: no test names --modle"),
        ("make sandwich", "make sandwich: no test runs it"),
    ],
)
def test_untested_command_is_noticed(line, problem):
    assert untested(shown_commands(f"```bash\n{line}\n```")) == [problem]


def test_missing_test_is_noticed(monkeypatch):
    monkeypatch.setitem(RUN_BY, "make demo", "test_readme.py::test_sandwich")
    assert untested({"make demo": set()}) == [
        "make demo: there is no test_readme.py::test_sandwich"
    ]


@both
def test_commands_exist(text):
    lines = [*shell_lines(text), *filter(commands, code_spans(text))]
    assert len(lines) > 60
    assert [problem for line in lines for problem in problems(line)] == []


@pytest.mark.parametrize(
    "line",
    [
        "python -m integration.ask --modle x",
        "python -m integration.aks",
        "python -m integration.router trian",
        "python -m integration.router train --encodre x",
        "printf x | python -m integration.ask --jsonl | python -m integration.router explane",
        "make sandwich",
        "scripts/pipline.sh x",
    ],
)
def test_wrong_command_is_noticed(line):
    assert problems(line)


# First screen, links, messages ----------------------------------------------------------------------


@both
def test_first_screen_has_the_command_and_lines_of_the_transcript(text):
    assert re.match(r".*\]\(README(\.ru)?\.md\)", text)
    assert "make demo" in "\n".join(text.splitlines()[:20])
    first, _, rest = text.partition("<!-- demo:start -->")
    transcript, _, after = rest.partition("<!-- demo:end -->")
    assert "demo:" not in after
    (shown,) = blocks(first, "text")
    assert "Held-out loss" in shown
    assert [line for line in shown.splitlines() if line not in transcript.splitlines()] == []


def missing_targets(text: str) -> list[str]:
    """Links to files that are not there, and to headings that the text does not have."""
    headings = re.findall(r"^#+ (.*)", prose(text), flags=re.MULTILINE)
    # As GitHub makes anchors.
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return [
        target
        for target in re.findall(r"\]\(([^)]+)\)", text)
        if not (target[1:] in anchors if target.startswith("#") else (ROOT / target).is_file())
    ]


@both
def test_links_lead_somewhere(text):
    assert missing_targets(text) == []
    assert missing_targets("# One, two\n[a](#one-two) [b](#one) [c](nowhere.md)") == [
        "#one",
        "nowhere.md",
    ]
    names = [name for span in code_spans(text) for name in re.findall(r"^[\w.-]+\.yaml$", span)]
    assert len(set(names)) >= len(list((ROOT / "scripts/recipes").iterdir()))
    places = [
        ROOT / folder / name for name in names for folder in ("scripts/recipes", "integration")
    ]
    assert {path.name for path in places if path.is_file()} == set(names)


def test_every_recipe_is_in_the_table():
    table = README.partition("## Which recipe")[2].partition("\n## ")[0]
    for path in (ROOT / "scripts/recipes").iterdir():
        assert f"`{path.name}`" in table


def test_messages_of_the_troubleshooting_are_those_of_the_code():
    rows = README.partition("## Troubleshooting")[2].partition("\n## ")[0].split("\n| ")[2:]
    messages = [
        message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])
    ]
    assert len(messages) > 25
    paths = [
        path for name in ("scripts", "export", "integration") for path in (ROOT / name).iterdir()
    ]
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in paths if path.suffix in (".py", ".sh")
    )
    assert [message for message in messages if message not in sources] == []
    assert "no usable Pyhton" not in sources
