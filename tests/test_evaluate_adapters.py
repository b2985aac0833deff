"""The comparison of adapters with their base: who is asked how, what is written, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import adapter_answers, evaluate_adapters
from scripts._cli import CommandError
from scripts.adapter_answers import (
    Answer,
    Contender,
    HeldOut,
    ask,
    read_held_out,
    requests_path,
)
from scripts.adapter_scores import SPECIALITIES
from scripts.ask_model import run_ask, spread
from scripts.evaluate_adapters import find_adapters, find_model, main

SUPPORT = "A dead lamp is no fun.\n\n1. Look.\n2. Wait.\n3. Call.\n\nIf this does not help, write."
ROWS = {
    "json": [{"prompt": f"Item {n} & co as JSON", "keys": ["a"]} for n in range(4)],
    "coding": [
        {"prompt": f"Write one{n}", "check": f"assert one{n}() == 1" if n else ""} for n in range(4)
    ],
    "support": [{"prompt": f"Lamp {n} is dead"} for n in range(4)],
}
# By route; instructed answers are right for the first request, adapters for all, the base for none.
GOOD = {
    "json": lambda at: '{"a": 1}',
    "coding": lambda at: f"```python\ndef one{at}():\n    return 1\n```\n\nSo.",
    "support": lambda at: SUPPORT,
}


class FakeAsk:
    """Stands in for `integration.ask`."""

    def __init__(self, good_base: bool = False, **changes: dict) -> None:
        self.commands, self.stdins = [], []
        self.good_base, self.changes = good_base, changes

    def __call__(self, command: list[str], stdin: str) -> str:
        self.commands.append(list(command))
        self.stdins.append(stdin)
        route = command[command.index("--route") + 1]
        lines = []
        for line in stdin.splitlines():
            request = json.loads(line)
            assert set(request) == {"id", "prompt"}
            name, number = request["id"].rsplit("-", 1)
            good = route != "base" or self.good_base or ("--system" in command and number == "1")
            text = GOOD[name](int(number) - 1) if good else "Sure, <b>\n\nwhat?"
            answer = {"id": request["id"], "text": text, "error": None, "finish_reason": "stop"}
            answer |= {"usage": {"completion_tokens": 10}} | self.changes.get(request["id"], {})
            lines.append(json.dumps(answer) + "\n")
        return "".join(reversed(lines))  # in any order: ids say whose they are


def refuse(*_: object) -> str:
    raise AssertionError("nobody is to be asked")


def write_rows(name: str, rows: list) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    requests_path(name).write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Requests, and ``outputs/`` with a base and three adapters, all of them stand-ins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapter_answers, "DATA_DIR", tmp_path / "data")
    (tmp_path / "data").mkdir()
    for name, rows in ROWS.items():
        write_rows(name, rows)
        make_file(f"smollm2-135m-{name}-cpu/gguf/{name}-F16-LoRA.gguf")
    make_file("smollm2-135m-base/gguf/base-Q8_0.gguf")
    return tmp_path


def make_file(name: str, age: int = 100) -> Path:
    path = Path("outputs") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(name.encode())
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def evaluate(*argv: str, ask: object = None, code: int = 0) -> dict:
    assert main(argv, ask or FakeAsk()) == code
    output = Path(argv[argv.index("--output") + 1] if "--output" in argv else "outputs/adapters")
    return json.loads((output / "adapters_evaluation.json").read_text(encoding="utf-8"))


def test_base_instruction_and_adapter_are_asked_and_written(place, capsys):
    ask = FakeAsk()
    result = evaluate(ask=ask)
    assert list(result["adapters"]) == ["json", "coding", "support"]
    for name, one in result["adapters"].items():
        main_name = SPECIALITIES[name].main
        hits = [who["scores"][main_name]["hits"] for who in one["contenders"].values()]
        assert list(one["contenders"]) == ["base", "base, instructed", name]
        assert hits == [0, 1, 4]
        assert (one["better_base"], one["better_than_base"]) == ("base, instructed", True)
        assert [
            (c["from"], c["became_right"], c["became_wrong"], c["p_value"])
            for c in one["comparisons"]
        ] == [("base", 4, 0, 0.125), ("base, instructed", 3, 0, 0.25)]
        assert one["requests"] == {"file": f"data/{name}_eval.jsonl", "asked": 4, "of": 4}
        assert sum(answer["shown"] for answer in one["answers"]) == 3
    passes = result["adapters"]["coding"]["contenders"]["coding"]["scores"]["passes"]
    assert (passes["hits"], passes["total"]) == (3, 3)  # the first request has no check
    printed = capsys.readouterr()
    assert printed.out == "outputs/adapters/adapters_evaluation.json\n"
    assert "json: 4 requests, both decides" in printed.err
    assert "against base, instructed: 3 became right, 0 wrong, p = 0.250" in printed.err
    assert "error" not in printed.err
    base, instructed, adapter = ask.commands[:3]
    assert base[1:] == [
        "-m", "integration.ask", "--model", "outputs/smollm2-135m-base/gguf/base-Q8_0.gguf", "--jsonl",
        "--parallel", "1", "--no-tools", "--temperature", "0", "--seed", "1", "--max-tokens", "256",
        "--route", "base",
    ]  # fmt: skip
    assert instructed == [*base, "--system", "Answer with valid JSON only, no other text."]
    file = "outputs/smollm2-135m-json-cpu/gguf/json-F16-LoRA.gguf"
    assert adapter == [*base[:-1], "json", "--adapter", f"json={file}"]
    assert len(ask.commands) == 9
    assert len(set(ask.stdins[:3])) == 1


def test_tables_and_answers_are_written(place):
    evaluate()
    text = Path("outputs/adapters/adapters_evaluation.md").read_text(encoding="utf-8")
    assert "| base, instructed | 25.0 % [4.6–69.9] |" in text
    assert "| base, instructed → json | 3 | 0 | 0.250 (the better base) |" in text
    assert text.count("<table>") == 9
    shown = text[text.index("<table>") : text.index("</table>")]
    assert "&amp; co as JSON" in shown
    assert "<td><pre>Sure, &lt;b&gt;&#10;&#10;what?</pre></td>" in shown
    assert "\n\n" not in shown  # a blank line would end the table
    assert not list(Path("outputs/adapters").glob(".*"))


def test_an_adapter_that_is_no_better_fails(place, capsys):
    result = evaluate(ask=FakeAsk(good_base=True), code=1)
    printed = capsys.readouterr()
    assert not any(one["better_than_base"] for one in result["adapters"].values())
    line = "the adapter 'json' is not better than the plain base: both 100.0 %, the base 100.0 %"
    assert line in printed.err
    assert printed.out.endswith("adapters_evaluation.json\n")
    assert evaluate(ask=refuse, code=1) == result  # as kept as a success


def test_the_same_input_gives_the_same_files(place):
    evaluate("--output", "one")
    evaluate("--output", "two")
    for name in ("adapters_evaluation.json", "adapters_evaluation.md"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


def test_unchanged_inputs_are_not_asked_again(place):
    first = evaluate()
    Path("outputs/adapters/adapters_evaluation.md").unlink()
    assert evaluate(ask=refuse) == first
    assert Path("outputs/adapters/adapters_evaluation.md").is_file()


@pytest.mark.parametrize("change", ["base", "adapter", "requests", "rows", "seed"])
def test_a_changed_input_is_asked_again(place, change):
    evaluate()
    argv, names = [], ["json", "coding", "support"]
    if change == "base":
        make_file("smollm2-135m-base/gguf/base-Q8_0.gguf").write_bytes(b"other")
    elif change == "adapter":
        make_file("smollm2-135m-json-cpu/gguf/json-F16-LoRA.gguf").write_bytes(b"other")
        names = ["json"]
    elif change == "requests":
        write_rows("coding", ROWS["coding"][:2])
        names = ["coding"]
    else:
        argv = [f"--{change}", "2"]
    ask = FakeAsk()
    evaluate(*argv, ask=ask)
    assert len(ask.commands) == 3 * len(names)
    assert {json.loads(stdin.splitlines()[0])["id"].split("-")[0] for stdin in ask.stdins} == {
        *names
    }


def test_what_was_asked_before_an_interruption_is_kept(place):
    def interrupted(command, stdin):
        if "support-1" in stdin:
            raise KeyboardInterrupt
        return FakeAsk()(command, stdin)

    with pytest.raises(KeyboardInterrupt):
        main([], interrupted)
    ask = FakeAsk()
    result = evaluate(ask=ask)
    assert len(ask.commands) == 3
    assert result == evaluate("--output", "other")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"adapters": []}', '{"adapters": {"json": 1}}']
)
def test_an_earlier_result_that_is_broken_counts_as_none(place, content):
    first = evaluate()
    Path("outputs/adapters/adapters_evaluation.json").write_text(content)
    assert evaluate() == first


def test_rows_are_spread_over_the_file(place):
    result = evaluate("--rows", "2")
    assert [one["id"] for one in result["adapters"]["json"]["answers"]] == ["json-1", "json-3"]
    assert result["adapters"]["json"]["requests"] == {
        "file": "data/json_eval.jsonl",
        "asked": 2,
        "of": 4,
    }
    requests = [HeldOut(str(at), "", {}) for at in range(10)]
    assert [one.id for one in spread(requests, 5)] == ["0", "2", "4", "6", "8"]
    assert spread(requests, 0) == spread(requests, 99) == requests


def test_the_newest_files_are_the_default(place):
    newer = make_file("smollm2-135m-base/gguf/a-Q8_0.gguf", age=1)
    make_file("smollm2-135m-base/gguf/b-Q4_K_M.gguf", age=0)
    adapter = make_file("smollm2-135m-json-cpu/gguf/a-LoRA.gguf", age=1)
    assert find_model(None) == newer
    assert find_adapters([])["json"] == adapter
    assert find_model(adapter) == adapter
    assert find_adapters([f"json={newer}"]) == {"json": newer}


def test_usage_errors_are_one_line_and_nobody_is_asked(place):
    def failure(*argv: str) -> tuple[str, int]:
        with pytest.raises(CommandError) as error:
            main(argv, refuse)
        assert "\n" not in str(error.value)
        return str(error.value), error.value.exit_code

    message, code = failure("--adapter", "jsn=a.gguf")
    assert "did you mean 'json'? expected json, coding, support" in message
    assert code == 2
    assert "'poems'; expected json" in failure("--adapter", "poems=a.gguf")[0]
    assert "expected NAME=FILE" in failure("--adapter", "json")[0]
    assert "'a.gguf' does not exist" in failure("--adapter", "json=a.gguf")[0]
    some = f"json={find_adapters([])['json']}"
    assert "given twice" in failure("--adapter", some, "--adapter", some)[0]
    assert failure("--model", "a.gguf") == (
        "--model: 'a.gguf' does not exist; expected a GGUF file",
        3,
    )
    assert "--rows: got -1" in failure("--rows", "-1")[0]
    Path("file").write_text("")
    assert "lies at or below a file" in failure("--output", "file")[0]
    assert "lies at or below a file" in failure("--output", "file/below")[0]
    for name in ("json", "support"):
        next(Path().glob(f"outputs/smollm2-135m-{name}-cpu/gguf/*")).unlink()
    message, code = failure()
    assert "smollm2-135m-json-cpu" in message
    assert "smollm2-135m-support-cpu" in message
    assert "smollm2-135m-coding-cpu" not in message
    assert code == 3
    next(Path().glob("outputs/smollm2-135m-base/gguf/*")).unlink()
    coding = next(Path().glob("outputs/smollm2-135m-coding-cpu/gguf/*"))
    assert "or name it with --model" in failure("--adapter", f"coding={coding}")[0]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("json", "{", "no JSON: "),
        ("json", "[]", "expected an object with prompt"),
        ("json", '{"prompt": 7}', "expected an object with prompt"),
        ("json", '{"prompt": " "}', "prompt: expected some text"),
        ("json", '{"prompt": "x"}', "keys: got None, expected a list"),
        ("json", '{"prompt": "x", "keys": [1]}', "keys: got [1]"),
        ("coding", '{"prompt": "x"}', "check: got None"),
        ("coding", '{"prompt": "x", "check": "assert ("}', "expected Python asserts"),
    ],
)
def test_bad_lines_are_refused_with_their_place(place, name, line, message):
    good = json.dumps(ROWS[name][0])
    requests_path(name).write_text(f"{good}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(CommandError, match=rf"{name}_eval\.jsonl:3: ") as error:
        main([], refuse)
    assert message in str(error.value)
    requests_path(name).write_text(f"{good}\n\n{good}\n", encoding="utf-8")
    assert [one.id for one in read_held_out(name)] == [f"{name}-1", f"{name}-3"]


def test_files_without_requests_are_refused(place):
    requests_path("json").write_text("\n")
    with pytest.raises(CommandError, match="has no request"):
        read_held_out("json")
    requests_path("json").write_bytes(b"\xff")
    with pytest.raises(CommandError, match="is no UTF-8 text"):
        read_held_out("json")
    requests_path("json").unlink()
    with pytest.raises(CommandError, match="does not exist"):
        main([], refuse)


def test_faults_of_ask_are_no_answers(place):
    with pytest.raises(
        CommandError, match="request json-2 was not answered: line 2: too long"
    ) as error:
        main([], FakeAsk(**{"json-2": {"error": "line 2: too long"}}))
    assert error.value.exit_code == 3
    with pytest.raises(
        CommandError, match="gave no answer to 1 of 4 requests, the first is json-2;"
    ):
        main([], FakeAsk(**{"json-2": {"id": "z"}}))
    with pytest.raises(CommandError, match="no answer object: Traceback"):
        main([], lambda command, stdin: "Traceback\n")
    assert not Path("outputs/adapters/adapters_evaluation.json").exists()


def test_cut_answers_are_counted(place):
    cut = {"finish_reason": "length", "usage": {"completion_tokens": 250}}
    base = evaluate(ask=FakeAsk(**{"json-2": cut}))["adapters"]["json"]["contenders"]["base"]
    assert (base["cut"], base["mean_tokens"]) == (1, 70.0)
    assert evaluate("--seed", "2")["adapters"]["json"]["contenders"]["base"]["cut"] == 0


def test_the_shipped_requests_can_be_read():
    for name in SPECIALITIES:
        assert len(read_held_out(name)) >= 50
    assert sum(bool(one.row["check"]) for one in read_held_out("coding")) >= 40


def test_ask_has_the_options_that_are_passed():
    command = [sys.executable, "-m", "integration.ask", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag in (
        "--jsonl",
        "--parallel",
        "--no-tools",
        "--route",
        "--adapter",
        "--system",
        "--seed",
    ):
        assert flag in told
    assert "--no-such-flag" not in told


@pytest.mark.model
def test_a_real_base_answers_the_same_twice(embedded_gguf, monkeypatch):
    monkeypatch.setattr(adapter_answers, "MAX_TOKENS", 12)
    requests = [HeldOut(f"json-{at}", f"Say {at}.", {}) for at in (1, 2)]
    plain = ask(embedded_gguf, Contender("base"), requests, 1, run_ask)
    told = Contender("base", instruction="Answer with the word no.")
    assert all(isinstance(one, Answer) and one.text and one.tokens for one in plain.answers)
    assert ask(embedded_gguf, Contender("base"), requests, 1, run_ask).answers == plain.answers
    assert ask(embedded_gguf, told, requests, 1, run_ask).answers != plain.answers


@pytest.mark.model
def test_a_file_that_is_no_adapter_ends_with_the_code_of_ask(
    place, embedded_gguf, monkeypatch, capfd
):
    monkeypatch.setenv("PYTHONPATH", str(Path(evaluate_adapters.__file__).parent.parent))
    argv = ["--model", str(embedded_gguf), "--rows", "1", "--adapter", f"json={embedded_gguf}"]
    monkeypatch.setattr(adapter_answers, "MAX_TOKENS", 4)
    with pytest.raises(CommandError, match="ended with exit code 3; its message is above"):
        main(argv)
    assert "is a whole model, expected a LoRA GGUF" in capfd.readouterr().err
