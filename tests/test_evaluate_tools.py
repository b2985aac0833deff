"""The evaluation of tool calls with stand-ins for every model: what is asked, written and refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import evaluate_tools
from scripts._cli import CommandError
from scripts.ask_model import run_ask
from scripts.evaluate_tools import exported_types, main, other_files
from scripts.tool_answers import (
    PLAIN_TOKENS,
    Answers,
    ask_gguf,
    generate_answers,
    read_answer,
    read_requests,
)
from scripts.tool_outcomes import Call, ToolAnswer, ToolRequest
from tools import TOOLS
from tools.protocol import tool_prompt, with_tool_list

CALL = Call("text_formatter", {"text": "One two three", "width": 40})


def row(name: str, group: str, content: str, call: Call | None) -> dict:
    messages = [{"role": "user", "content": content}]
    call = call and call.to_json()
    return {"id": name, "group": group, "messages": messages, "call": call}


ROWS = [
    row("a", "formatter", "Wrap at 40: One two three", CALL),
    row("b", "none_small_talk", "Hi", None),
    row("c", "template", "email form", Call("template_generator", {"template_type": "email"})),
]
RIGHT = {row["id"]: row["call"] for row in ROWS}


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class FakeAsk:
    """Stands in for `integration.ask`: right with the grammar, malformed for `a` without it."""

    def __init__(self, **changes: dict) -> None:
        self.commands, self.changes = [], changes

    def __call__(self, command: list[str], stdin: str) -> str:
        self.commands.append(list(command))
        free = "--free-calls" in command
        lines = []
        for line in stdin.splitlines():
            request = json.loads(line)
            assert set(request) == {"id", "messages"}
            call = RIGHT[request["id"]]
            fields = {"result": None, "error": None}
            calls = [{"name": call["name"], "args": call["arguments"], **fields}] if call else []
            answer = {"id": request["id"], "text": "", "tool_calls": calls, "error": None}
            if free and request["id"] == "a":
                bad = {"name": "", "args": {}, "result": None, "error": "cut off"}
                answer |= {"tool_calls": [bad], "error": "error: cut off"}
            lines.append(json.dumps(answer | self.changes.get(request["id"], {})) + "\n")
        return "".join(reversed(lines))  # in any order: ids say whose they are


def fake_hf(recipe, requests) -> dict[str, Answers]:
    """The base calls nothing, the adapter does what is right."""
    right = [ToolAnswer(call=one.call) for one in requests]
    return {
        "base": Answers([ToolAnswer("Sure!") for _ in requests], 2.0),
        "tuned": Answers(right, 3.0),
    }


def refuse(*_: object) -> str:
    raise AssertionError("nobody is to be asked")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with an adapter and an export, all of them stand-ins."""
    folder = tmp_path / "out/r"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"adapter")
    (folder / "gguf").mkdir()
    files = {}
    for name, size in (("Q4_K_M", 4), ("F16", 16), ("F16-LoRA", 1), ("Q8_0", 8)):
        (folder / "gguf" / f"m-{name}.gguf").write_bytes(name.encode())
        files[f"m-{name}.gguf"] = {"type": name.removesuffix("-LoRA"), "bytes": size}
    record = {
        "current": list(files),
        "files": files | {"m-Q2_K.gguf": {"type": "Q2_K", "bytes": 2}},
    }
    (folder / "gguf/export.json").write_text(json.dumps(record), encoding="utf-8")
    write_rows(tmp_path / "requests.jsonl", ROWS)
    return folder


def evaluate(run_dir: Path, *flags: str, ask=None, hf=fake_hf) -> dict:
    root = run_dir.parent
    argv = ["--run-name", "r", "--output-root", str(root), *flags]
    argv = ["--requests", str(root.parent / "requests.jsonl"), "--config", str(recipe(root)), *argv]
    assert main(argv, ask or FakeAsk(), hf) == 0
    return json.loads((run_dir / "tools_evaluation.json").read_text(encoding="utf-8"))


def recipe(root: Path) -> Path:
    path = root / "r.yaml"
    path.write_text("backend: peft\n", encoding="utf-8")
    return path


def test_every_contender_is_asked_and_written(run_dir, capsys):
    ask = FakeAsk()
    result = evaluate(run_dir, ask=ask)
    assert list(result["contenders"]) == [
        "base (HF)", "tuned (HF)",
        "F16 grammar", "F16 free", "Q8_0 grammar", "Q8_0 free", "Q4_K_M grammar", "Q4_K_M free",
    ]  # fmt: skip
    shares = {name: one["scores"]["choice"]["share"] for name, one in result["contenders"].items()}
    assert shares["base (HF)"] == pytest.approx(1 / 3, abs=1e-6)
    assert shares["Q8_0 grammar"] == 1
    assert shares["Q8_0 free"] == pytest.approx(2 / 3, abs=1e-6)
    assert result["contenders"]["Q8_0 free"]["scores"]["malformed"] == 1
    base = result["contenders"]["base (HF)"]
    assert (base["model"], base["decoding"], base["seconds"]) == ("base", "free", 2.0)
    assert [one["errors"] for one in base["outcomes"]] == [["missed_call"], [], ["missed_call"]]
    assert base["by_group"]["none_small_talk"]["false_calls"]["share"] == 0
    printed = capsys.readouterr()
    assert printed.out == f"{run_dir / 'tools_evaluation.json'}\n"
    assert "contender" in printed.err
    assert "Q4_K_M grammar" in printed.err
    command = ask.commands[0]
    assert command[:3] == [sys.executable, "-m", "integration.ask"]
    assert command[command.index("--model") + 1] == str(run_dir / "gguf/m-F16.gguf")
    assert command[5:] == [
        "--jsonl", "--tools", "--dry-run", "--temperature", "0", "--seed", "1", "--max-tokens", "48",
    ]  # fmt: skip
    assert ask.commands[1] == [*command, "--free-calls"]


def test_comparisons_say_what_changed(run_dir):
    result = evaluate(run_dir)
    found = {(one["from"], one["to"]): one for one in result["comparisons"]}
    assert list(found) == [
        ("base (HF)", "tuned (HF)"),
        *((f"{name} free", f"{name} grammar") for name in ("F16", "Q8_0", "Q4_K_M")),
        ("F16 grammar", "Q8_0 grammar"), ("F16 grammar", "Q4_K_M grammar"),
        ("F16 free", "Q8_0 free"), ("F16 free", "Q4_K_M free"),
    ]  # fmt: skip
    grammar = found["Q8_0 free", "Q8_0 grammar"]["choice"]
    assert (grammar["points"], grammar["became_right_ids"]) == (33.33, ["a"])
    assert found["F16 free", "Q8_0 free"]["exact"]["points"] == 0


def test_tables_and_picture_are_written(run_dir):
    evaluate(run_dir)
    text = (run_dir / "tools_evaluation.md").read_text(encoding="utf-8")
    assert "| Q8_0 grammar | 100.0 % [43.9–100.0] |" in text
    assert "| base (HF) | 33.3 % [6.1–79.2] |" in text
    assert "| text_formatter | 0 | 0 | 0 | 1 | 0 |" in text  # the base's confusion table
    assert (run_dir / "tools_confusion.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run_dir.glob(".*"))


def test_unchanged_inputs_are_not_asked_again(run_dir):
    first = evaluate(run_dir)
    (run_dir / "tools_evaluation.md").unlink()
    assert evaluate(run_dir, ask=refuse, hf=refuse) == first
    assert (run_dir / "tools_evaluation.md").is_file()


@pytest.mark.parametrize("change", ["adapter", "gguf", "requests", "option", "source"])
def test_a_changed_input_is_asked_again(run_dir, change, monkeypatch, tmp_path):
    first = evaluate(run_dir)
    flags = ["--limit", "2"] if change == "option" else []
    if change == "adapter":
        (run_dir / "adapter/adapter_model.safetensors").write_bytes(b"other")
    elif change == "gguf":
        (run_dir / "gguf/m-Q8_0.gguf").write_bytes(b"other")
    elif change == "requests":
        write_rows(run_dir.parent.parent / "requests.jsonl", ROWS[:2])
    elif change == "source":
        (tmp_path / "scores.py").write_text("changed")
        monkeypatch.setattr(evaluate_tools.tool_scores, "__file__", str(tmp_path / "scores.py"))
    assert evaluate(run_dir, *flags)["inputs"] != first["inputs"]


def test_options_choose_who_is_asked(run_dir, tmp_path):
    (tmp_path / "b.gguf").write_bytes(b"base")
    result = evaluate(
        run_dir, "--no-hf", "--no-free", "--files", "q8_0", "--gguf", f"base={tmp_path / 'b.gguf'}"
    )
    assert list(result["contenders"]) == ["Q8_0 grammar", "base grammar"]
    assert result["contenders"]["base grammar"]["model"] == "base"
    assert result["comparisons"] == []
    only_hf = evaluate(run_dir, "--files", "none", ask=refuse)
    assert list(only_hf["contenders"]) == ["base (HF)", "tuned (HF)"]
    assert evaluate(run_dir, "--limit", "2")["requests"]["asked"] == 2


def test_limit_spreads_over_the_file(run_dir):
    rows = [ROWS[1] | {"id": str(number)} for number in range(10)]
    write_rows(run_dir.parent.parent / "requests.jsonl", rows)
    result = evaluate(run_dir, "--files", "none", "--limit", "5")
    asked = [one["id"] for one in result["contenders"]["base (HF)"]["outcomes"]]
    assert asked == ["0", "2", "4", "6", "8"]


def test_usage_errors_are_one_line(run_dir, tmp_path):
    with pytest.raises(CommandError, match=r"no Q5_K_M in .*, expected some of F16, Q8_0, Q4_K_M;"):
        exported_types(run_dir, "Q8_0,Q5_K_M")
    with pytest.raises(CommandError, match=r"has no export\.json; export the adapter"):
        exported_types(tmp_path, None)
    with pytest.raises(CommandError, match="expected NAME=FILE"):
        other_files(["model.gguf"], [])
    with pytest.raises(CommandError, match="does not exist; expected a GGUF file"):
        other_files(["base=nowhere.gguf"], [])
    with pytest.raises(CommandError, match="the name 'F16' is taken"):
        other_files([f"F16={tmp_path}"], ["F16"])
    with pytest.raises(CommandError, match="nobody to ask"):
        evaluate(run_dir, "--files", "none", "--no-hf")
    with pytest.raises(CommandError, match="--limit: got -1"):
        evaluate(run_dir, "--limit", "-1")
    (run_dir / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(CommandError, match="has no adapter; train one"):
        evaluate(run_dir)
    assert "Q8_0 free" in evaluate(run_dir, "--no-hf")["contenders"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON: "),
        ("[]", "expected an object"),
        (json.dumps({"id": "x", "group": "g"}), "got no messages, call"),
        (json.dumps(ROWS[1] | {"id": 7}), "id: got 7, expected a name"),
        (
            json.dumps(ROWS[1] | {"messages": [{"role": "tool", "content": ""}]}),
            "objects with role",
        ),
        (json.dumps(ROWS[1] | {"messages": [{"role": "assistant", "content": ""}]}), "the user's"),
        (json.dumps(ROWS[1] | {"messages": []}), "the user's"),
        (json.dumps(ROWS[1] | {"call": {"name": "calculator"}}), "got 'calculator'"),
        (json.dumps(ROWS[1] | {"call": {"name": "text_formatter"}}), "expected arguments"),
        (json.dumps(ROWS[0]), "id: 'a' was line 1 already"),
    ],
)
def test_bad_lines_are_refused_with_their_place(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(CommandError, match=r"bad\.jsonl:3: ") as error:
        read_requests(path)
    assert message in str(error.value)


def test_files_without_requests_are_refused(tmp_path):
    with pytest.raises(CommandError, match="does not exist"):
        read_requests(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(CommandError, match="has no request"):
        read_requests(tmp_path / "empty.jsonl")


def test_answers_of_ask_are_read_by_id(tmp_path):
    requests = read_requests(write_rows(tmp_path / "r.jsonl", ROWS))
    found = ask_gguf(Path("m.gguf"), requests, True, FakeAsk(b={"text": "Hello!\u2028"}))
    assert found.answers == [
        ToolAnswer(malformed="cut off"), ToolAnswer("Hello!\u2028"), ToolAnswer(call=requests[2].call),
    ]  # fmt: skip


def test_faults_of_ask_are_no_answers(tmp_path):
    requests = read_requests(write_rows(tmp_path / "r.jsonl", ROWS))
    model = Path("m.gguf")
    with pytest.raises(CommandError, match="request b was not answered: line 2: too long"):
        ask_gguf(model, requests, False, FakeAsk(b={"error": "line 2: too long"}))
    with pytest.raises(CommandError, match="gave no answer to 1 of 3 requests, the first is b"):
        ask_gguf(model, requests, False, FakeAsk(b={"id": "z"}))
    with pytest.raises(CommandError, match="no answer object: Traceback"):
        ask_gguf(model, requests, False, lambda command, stdin: "Traceback\n")


@pytest.mark.parametrize(("code", "accepted"), [(0, True), (1, True), (2, False), (3, False)])
def test_exit_codes_of_ask(code, accepted):
    command = [sys.executable, "-c", f"import sys; print(sys.stdin.read()); sys.exit({code})"]
    if accepted:
        assert run_ask(command, "é\u2028") == "é\u2028\n"
        return
    with pytest.raises(CommandError, match=f"exit code {code}; its message is above") as error:
        run_ask(command, "")
    assert error.value.exit_code == code


def test_free_answers_are_read_as_chat_reads_them():
    written = '<tool_call>{"name": "text_formatter", "arguments": {"text": "A"}}</tool_call>'
    assert read_answer(written).call == Call("text_formatter", {"text": "A"})
    assert read_answer(f"Sure! {written}") == ToolAnswer(f"Sure! {written}")
    assert "cut off" in read_answer(written[:-1]).malformed
    assert "no JSON" in read_answer(written.replace("{", "", 1)).malformed


def test_prompts_carry_the_tool_list_in_one_system_turn():
    user = {"role": "user", "content": "Hi"}
    assert with_tool_list([user], TOOLS) == [
        {"role": "system", "content": tool_prompt(TOOLS)},
        user,
    ]
    own = with_tool_list([{"role": "system", "content": "Be kind."}, user], TOOLS)
    assert own == [{"role": "system", "content": f"Be kind.\n\n{tool_prompt(TOOLS)}"}, user]


def test_ask_has_the_options_that_are_passed():
    command = [sys.executable, "-m", "integration.ask", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag in (
        "--tools",
        "--jsonl",
        "--dry-run",
        "--free-calls",
        "--temperature",
        "--max-tokens",
    ):
        assert flag in told


@pytest.mark.model
def test_a_padded_batch_answers_as_one_request_does(tiny_model_dir, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32").eval()
    texts = ("Hi", "Wrap at 40: One two three", "Give me a form for an email, please.")
    requests = [ToolRequest(text, "g", [{"role": "user", "content": text}], None) for text in texts]

    def lengths() -> list[int]:
        found = generate_answers(model, tokenizer, requests, "tiny").answers
        alone = [generate_answers(model, tokenizer, [one], "tiny").answers[0] for one in requests]
        assert [one.text[:100] for one in found] == [one.text[:100] for one in alone]
        return [len(tokenizer(one.text)["input_ids"]) for one in found]

    assert max(lengths()) < 1.5 * PLAIN_TOKENS  # text tokenizes otherwise than it was written
    # What begins like a call is not cut there.
    monkeypatch.setattr("tools.protocol.CALL_START", "")
    assert max(lengths()) > 1.5 * PLAIN_TOKENS
