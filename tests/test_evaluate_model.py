"""The evaluation with stand-ins for every model: what is measured, kept, written and refused."""

import json
import os
from pathlib import Path

import pytest

from scripts import evaluate_model, evaluation_gguf, model_loading
from scripts._cli import FAILED, MODEL, USAGE, CommandError
from scripts.answer_style import Answer
from scripts.evaluate_model import main
from scripts.evaluation_hf import BASE
from scripts.row_checks import IGNORED, EncodedConversation


def prompt(key: int, text: str, *rules: str) -> dict:
    return {"key": key, "prompt": text, "instruction_id_list": rules, "kwargs": [{}] * len(rules)}


NO_COMMA = "punctuation:no_comma"
PROMPTS = [
    prompt(1, "Без запятых, пожалуйста.", NO_COMMA),
    prompt(2, "Quote it.", "startend:quotation"),
    prompt(3, "JSON without commas", "detectable_format:json_format", NO_COMMA),
]
# Of each prompt: what the base and the tuned model answer.
ANSWERS = {
    "1": ("Да, да, да.", "Да и да."),
    "2": ("Well", '"Well"'),
    "3": ('{"a": 1}', "No."),
}
BASE_ROWS, TUNED_ROWS = [(6.0, 3), (5.0, 2)], [(4.5, 3), (4.0, 2)]


class FakeModels:
    """Stands in for base and adapter; counts what is measured."""

    calls: list[str]

    def __init__(self, recipe) -> None:
        self.recipe = recipe

    def losses(self, role, rows):
        self.calls.append(f"losses {role}")
        return BASE_ROWS if role == BASE else TUNED_ROWS

    def answer_questions(self, role):
        return [f"{role} on recursion"]

    def answer_prompts(self, role, prompts, room, path):
        if not path.is_file():
            self.calls.append(f"answers {role} {room}")
            path.write_text("{}", encoding="utf-8")
        texts = [ANSWERS[one.id][role != BASE] for one in prompts]
        return [Answer(text, len(text), True) for text in texts], 1.0


class Work:
    """A run's folder, and the commands that were run for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands = folder, []
        self.models = type("Models", (FakeModels,), {"calls": []})

    def measure(self, command):
        self.commands.append(list(command))
        path = Path(command[3])
        rows = [json.loads(line) for line in Path(command[5]).read_text("utf-8").splitlines()]
        assert [set(row) for row in rows] == [{"input_ids", "labels"}] * 2
        about = {"file": path.name, "type": path.stem[2:], "bytes": 10, "sha256": "5" * 64}
        speed = {"tokens_per_second": 100.0, "peak_memory_bytes": 3e8, "n_threads": 2}
        return json.dumps(about | speed | {"rows": [(4.6, 3), (4.1, 2)], "version": "x"})

    def ask(self, command, stdin):
        self.commands.append(list(command))
        output = Path(command[command.index("--output") + 1])
        lines = []
        for line in stdin.splitlines():
            request = json.loads(line)
            usage = {"completion_tokens": 5}
            reply = {"id": request["id"], "text": ANSWERS[request["id"]][1], "error": None}
            lines.append(json.dumps(reply | {"finish_reason": "length", "usage": usage}))
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return ""

    def run(self, *flags: str) -> int:
        argv = ["--config", str(self.folder.parent / "r.yaml"), "--output-root"]
        argv += [str(self.folder.parent), *flags]
        return main(argv, self.ask, self.measure, self.models)

    def evaluate(self, *flags: str, code: int = 0) -> dict:
        self.models.calls.clear()
        self.commands.clear()
        assert self.run(*flags) == code
        return json.loads((self.folder / "evaluation.json").read_text(encoding="utf-8"))

    def export(self, *types: str) -> None:
        about = {"bytes": 10, "sha256": "5" * 64, "bits_per_weight": 8.5, "fallbacks": {}}
        files = {f"m-{name}.gguf": {"type": name, **about} for name in types}
        folder = self.folder / "gguf"
        folder.mkdir(exist_ok=True)
        for name in files:
            (folder / name).write_text(name)
        record = {"current": list(files), "files": files}
        (folder / "export.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture
def work(tmp_path, monkeypatch) -> Work:
    folder = tmp_path / "out/r"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"adapter")
    (folder / "data").mkdir()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = json.dumps({"messages": turns}) + "\n"
    (folder / "data/eval.jsonl").write_text(row * 2, encoding="utf-8")
    (tmp_path / "out/r.yaml").write_text("backend: peft\n", encoding="utf-8")
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setattr(evaluate_model, "PROMPTS_PATH", tmp_path / "prompts.jsonl")
    monkeypatch.setattr(model_loading, "load_tokenizer", lambda recipe: None)

    def encode(tokenizer, rows, max_length, what):
        return [EncodedConversation([1, 2, 3], [IGNORED, 2, 3]) for _ in rows], None

    monkeypatch.setattr(evaluate_model, "encode_rows", encode)
    return Work(folder)


def test_base_and_tuned_are_compared(work, capsys):
    result = work.evaluate()
    assert (result["version"], result["run"]) == (2, "r")
    assert (result["base"]["loss"], result["tuned"]["loss"]) == (2.2, 1.7)
    assert (result["change"]["loss"], result["change"]["rows_better"]) == (-0.5, 2)
    assert result["answers"][0]["tuned"] == "tuned on recursion"
    assert list(result["contenders"]) == ["base (HF)", "tuned (HF)"]
    scores = {name: one["ifeval"] for name, one in result["contenders"].items()}
    assert scores["base (HF)"]["prompt_strict"]["hits"] == 1  # {"a": 1} is JSON without commas
    assert scores["tuned (HF)"]["prompt_strict"]["hits"] == 2
    (one,) = result["comparisons"]
    assert (one["wins"], one["ties"], one["losses"]) == (2, 0, 1)
    third = result["prompts"][2]["answers"]
    assert third["base (HF)"]["followed"] == [True, True]
    assert third["tuned (HF)"]["followed"] == [False, True]
    assert result["prompts"][0]["prompt"] == "Без запятых, пожалуйста."
    assert "Без запятых" in (work.folder / "evaluation.json").read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"{work.folder / 'evaluation.json'}\n"
    for name in ("report.html", "report.md"):
        assert (work.folder / name).is_file()


def test_every_exported_file_is_measured_and_asked(work):
    work.export("Q8_0", "F16")
    result = work.evaluate()
    assert list(result["contenders"]) == ["base (HF)", "tuned (HF)", "Q8_0", "F16"]
    file = result["contenders"]["Q8_0"]
    assert (file["kind"], file["file"], file["tokens_per_second"]) == ("gguf", "m-Q8_0.gguf", 100.0)
    assert file["loss"]["loss"] == 1.74
    assert file["style"]["ended"]["hits"] == 0
    assert [one["to"] for one in result["comparisons"]] == ["tuned (HF)", "Q8_0", "F16"]
    measure, ask = work.commands[:2]
    assert measure[1:4] == ["-m", "export.measure_gguf", str(work.folder / "gguf/m-Q8_0.gguf")]
    for option in (["--repeat-penalty", "1"], ["--temperature", "0"], ["--parallel", "1"]):
        at = ask.index(option[0])
        assert ask[at : at + 2] == option
    assert ask[ask.index("--max-tokens") + 1] == "512"


def test_what_is_measured_is_not_measured_again(work):
    work.export("Q8_0")
    first = work.evaluate("--ask", "base,tuned")
    assert work.models.calls == [
        "losses base", "answers base 512", "losses tuned", "answers tuned 512",
    ]  # fmt: skip
    assert len(work.commands) == 1
    assert work.evaluate("--ask", "base,tuned") == first
    assert work.models.calls == work.commands == []


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        ("adapter", ["losses tuned", "answers tuned 512"]),
        ("rows", ["losses base", "losses tuned"]),
        ("tokens", ["answers base 64", "answers tuned 64"]),
        ("prompts", ["answers base 512", "answers tuned 512"]),
    ],
)
def test_only_what_changed_is_measured_again(work, change, calls, monkeypatch):
    work.evaluate()
    flags = []
    if change == "adapter":
        (work.folder / "adapter/adapter_model.safetensors").write_bytes(b"other")
    elif change == "tokens":
        flags = ["--eval-answer-tokens", "64"]
    elif change == "prompts":
        flags = ["--eval-prompts", "2"]
    else:
        other = lambda *_: ([EncodedConversation([5, 6], [5, 6])] * 2, None)  # noqa: E731
        monkeypatch.setattr(evaluate_model, "encode_rows", other)
    work.evaluate(*flags)
    assert work.models.calls == calls


def test_files_of_an_earlier_adapter_are_left_out(work, capsys):
    work.export("Q8_0")
    os.utime(work.folder / "gguf/export.json", (1, 1))
    assert list(work.evaluate()["contenders"]) == ["base (HF)", "tuned (HF)"]
    assert "are of an earlier adapter" in capsys.readouterr().err


def test_nobody_is_asked_without_prompts(work):
    result = work.evaluate("--eval-prompts", "0")
    assert work.models.calls == ["losses base", "losses tuned"]
    assert result["contenders"]["base (HF)"]["ifeval"] is None
    assert (result["prompts"], result["comparisons"], result["ifeval"]["asked"]) == ([], [], 0)


def test_a_published_file_is_asked_of_base_and_tuned(work, tmp_path):
    work.export("Q8_0")
    path = tmp_path / "published.jsonl"
    path.write_text(json.dumps(PROMPTS[1]) + "\n" + json.dumps(PROMPTS[2]), encoding="utf-8")
    result = work.evaluate("--ifeval", str(path))
    assert result["ifeval"] == {
        "file": os.path.relpath(path), "prompts": 2, "asked": 2, "answer_tokens": 1280, "decoding": "greedy",
    }  # fmt: skip
    assert work.models.calls[1] == "answers base 1280"
    assert result["contenders"]["Q8_0"]["ifeval"] is None
    flags = ["--ifeval-rows", "1", "--ifeval-tokens", "9", "--ask", "Q8_0"]
    few = work.evaluate("--ifeval", str(path), *flags)
    assert few["ifeval"]["asked"] == 1
    assert few["contenders"]["tuned (HF)"]["ifeval"] is None
    assert few["contenders"]["Q8_0"]["ifeval"]["prompt_strict"]["total"] == 1


def test_other_rows_in_any_shape(work, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    rows = ['{"instruction": "Скажи «да»", "output": "Да"}', "{no JSON", '{"question": "a"}']
    path.write_text("\n".join([*rows, *rows[:1] * 200]), encoding="utf-8")
    result = work.evaluate("--eval-file", str(path), "--eval-prompts", "0")
    assert result["held_out_file"] == str(path)
    told = capsys.readouterr().err
    assert f"201 of 203 rows of {path} are usable" in told
    assert f"1 rows of {path} left out: unreadable" in told


def test_tool_figures_are_told_when_they_are_of_this_adapter(work):
    share = {"hits": 1, "total": 2, "share": 0.5, "interval_95": [0.1, 0.9]}
    scores = dict.fromkeys(("choice", "exact", "false_calls", "missed_calls", "confusion"), share)
    tools = {"requests": {"asked": 2}, "contenders": {"Q8_0 grammar": {"scores": scores}}}
    path = work.folder / "tools_evaluation.json"
    path.write_text(json.dumps(tools), encoding="utf-8")
    found = work.evaluate()["tools"]
    assert found["requests"] == 2
    assert found["contenders"]["Q8_0 grammar"].keys() == scores.keys() - {"confusion"}
    os.utime(path, (1, 1))
    assert work.evaluate()["tools"] is None


def test_a_loss_that_did_not_fall_is_exit_1(work, monkeypatch):
    monkeypatch.setattr(work.models, "losses", lambda self, role, rows: BASE_ROWS)
    assert work.evaluate(code=FAILED)["change"]["loss"] == 0


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (["--ifeval", "nowhere.jsonl"], "'nowhere.jsonl' cannot be read", USAGE),
        (["--eval-file", "nowhere.jsonl"], "nowhere.jsonl", USAGE),
        (["--ifeval-rows", "2"], "--ifeval-rows goes with --ifeval FILE", USAGE),
        (["--ifeval-rows", "-1"], "--ifeval-rows: got -1, expected 0 or more", USAGE),
        (["--ifeval-tokens", "0"], "--ifeval-tokens: got 0, expected 1 or more", USAGE),
        (["--ask", "base,Q8_0"], "no contender Q8_0 here, expected some of base, tuned;", USAGE),
        (["--eval-prompts", "-2"], "eval_prompts: got -2, expected -1 or more", USAGE),
        (["--eval-answer-tokens", "0"], "eval_answer_tokens: got 0", USAGE),
    ],
)
def test_usage_errors_are_one_line(work, flags, message, code):
    with pytest.raises(CommandError, match=message) as caught:
        work.run(*flags)
    assert caught.value.exit_code == code
    assert work.models.calls == []


def test_missing_inputs_say_what_to_do(work, monkeypatch):
    monkeypatch.setattr(evaluate_model, "encode_rows", lambda *_: ([], None))
    with pytest.raises(CommandError, match=r"no row of .* has an answer that ends within 512"):
        work.run()
    (work.folder / "data/eval.jsonl").unlink()
    with pytest.raises(CommandError, match=r"eval\.jsonl' does not exist; prepare the data"):
        work.run()
    (work.folder / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(CommandError, match=r"train one: python -m scripts\.train_lora") as caught:
        work.run()
    assert caught.value.exit_code == MODEL


def test_a_large_file_is_measured_on_fewer_rows(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(100))
    rows = [EncodedConversation([number] * 10, [1] * 10) for number in range(20)]
    assert evaluation_gguf.affordable(path, rows) is rows
    monkeypatch.setattr(evaluation_gguf, "_MOST_WORK", 100 * 100)  # 100 tokens
    assert [row.input_ids[0] for row in evaluation_gguf.affordable(path, rows)] == [
        *range(0, 20, 2)
    ]
    monkeypatch.setattr(evaluation_gguf, "_MOST_WORK", 1)
    assert len(evaluation_gguf.affordable(path, rows)) == 1


def test_failures_of_children_end_with_their_code(work, tmp_path):
    with pytest.raises(
        CommandError, match="ended with exit code 3; its message is above"
    ) as caught:
        evaluation_gguf.run_measure(["bash", "-c", "exit 3"])
    assert caught.value.exit_code == 3
    with pytest.raises(CommandError, match="ended with exit code -6") as caught:
        evaluation_gguf.run_measure(["bash", "-c", "kill -ABRT $$"])
    assert caught.value.exit_code == MODEL
    with pytest.raises(CommandError, match="wrote no JSON"):
        evaluation_gguf.measure(tmp_path, [], lambda command: "oops")
