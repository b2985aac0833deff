"""`scripts.benchmark chat`: true figures, contenders in turn, targets both ways, one-line failures."""

import json
import subprocess
import sys

import pytest

from scripts import benchmark, benchmark_chat
from scripts._cli import CommandError
from scripts.benchmark_chat import QUICK, Contenders, judge_chat, run_child

FIGURES = {
    "decode_raw_tokens_per_second": 100.0,
    "decode_ask_tokens_per_second": 98.0,
    "decode_langchain_tokens_per_second": 97.0,
    "decode_free_tokens_per_second": 90.0,
    "decode_constrained_tokens_per_second": 85.0,
    "first_token_whole_prompt_s": 0.8,
    "first_token_second_turn_s": 0.03,
    "first_token_new_process_s": 0.04,
    "prefill_ours_s": 1.0,
    "prefill_stock_s": 1.6,
    "batch_tokens_per_second": 60.0,
    "in_turn_tokens_per_second": 50.0,
    "processes_tokens_per_second": 20.0,
}


@pytest.mark.model
def test_everything_is_measured_on_a_real_model(embedded_gguf):
    command = [sys.executable, "-m", "scripts.benchmark", "chat", "--quick", "--rounds", "1"]
    command += ["--json", "--model", str(embedded_gguf)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == ["benchmark", "metrics", "targets"]
    assert (result["benchmark"], result["targets"]) == ("chat", [])
    metrics = result["metrics"]
    assert set(FIGURES) | {"requests", "threads", "rounds"} == set(metrics)
    assert min(metrics.values()) > 0
    # Behind 100 tokens of system prompt, a reused turn evaluates about a tenth of the prompt.
    assert metrics["first_token_second_turn_s"] < metrics["first_token_whole_prompt_s"]
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value", "missed"),
    [
        ("decode_raw_tokens_per_second", 100.0, []),
        ("decode_ask_tokens_per_second", 96.0, ["decode: ask / raw"]),
        ("decode_langchain_tokens_per_second", 96.0, ["decode: LangChain stream / raw"]),
        ("decode_constrained_tokens_per_second", 80.0, ["decode: under a grammar / free"]),
        ("first_token_second_turn_s", 0.041, ["second turn: whole prompt / reused"]),
        (
            "first_token_new_process_s",
            0.041,
            ["second turn in a new process: whole prompt / reused"],
        ),
        ("prefill_ours_s", 1.1, ["prefill: stock seconds / our seconds"]),
        ("in_turn_tokens_per_second", 61.0, ["batch / one after another"]),
        ("processes_tokens_per_second", 61.0, ["batch / a process each"]),
    ],
)
def test_each_target_can_be_met_and_missed(name, value, missed):
    targets = judge_chat(FIGURES | {name: value})
    assert len(targets) == 8
    assert [target["name"] for target in targets if not target["met"]] == missed
    assert {tuple(target) for target in targets} == {("name", "value", "target", "met")}


@pytest.mark.parametrize(("waits", "code"), [((0.8, 0.1, 0.8), 0), ((0.1, 0.8, 0.1), 1)])
def test_exit_code_follows_the_medians(monkeypatch, tmp_path, capsys, waits, code):
    def measure(self, number):
        return FIGURES | {"first_token_whole_prompt_s": waits[number]}

    monkeypatch.setattr(Contenders, "measure_round", measure)
    (tmp_path / "m.gguf").touch()
    model = ["--model", str(tmp_path / "m.gguf")]
    assert benchmark.main(["chat", "--rounds", "3", "--json", *model]) == code
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"]["first_token_whole_prompt_s"] == sorted(waits)[1]


def test_who_begins_changes_from_round_to_round(monkeypatch, tmp_path):
    played = []
    groups = [
        ["decode_raw", "decode_ask", "decode_langchain"],
        ["converse"],
        ["prefill_ours", "prefill_stock"],
        ["answer_batch", "answer_in_turn", "answer_in_processes"],
    ]
    everyone = [name for group in groups for name in group]
    for name in everyone:
        monkeypatch.setattr(
            Contenders, name, lambda self, name=name: played.append(name) or {name: 1.0}
        )
    contenders = Contenders(tmp_path / "m.gguf", QUICK, tmp_path)
    assert list(contenders.measure_round(0)) == everyone
    contenders.measure_round(1)
    assert played == everyone + [name for group in groups for name in group[::-1]]


def answers(*tokens: int, prompt_tokens: int = 7) -> str:
    usages = [{"prompt_tokens": prompt_tokens, "completion_tokens": count} for count in tokens]
    objects = [{"usage": usage, "timings": {"tokens_per_second": 50.0}} for usage in usages]
    return "\n".join(map(json.dumps, objects))


@pytest.fixture
def contenders(monkeypatch, tmp_path):
    """Contenders whose processes say what the test puts into ``outputs``."""
    made = Contenders(tmp_path / "m.gguf", QUICK, tmp_path)
    made.outputs, made.stdin, made.caches = [], [], []

    def run(what, command, stdin, cache):
        made.stdin.append(stdin)
        made.caches.append(cache)
        return made.outputs.pop(0)

    monkeypatch.setattr(benchmark_chat, "run_child", run)
    return made


def test_short_or_unlike_answers_are_no_measurement(contenders):
    raw = {"tokens_per_second": 60.0, "completion_tokens": 16, "prompt_tokens": 7, "prompt": "Hi"}
    contenders.outputs = [json.dumps(raw), answers(16), answers(7), answers(16, prompt_tokens=8)]
    assert contenders.decode_raw() == {"decode_raw_tokens_per_second": 60.0}
    assert contenders.decode_ask() == {"decode_ask_tokens_per_second": 50.0}
    with pytest.raises(CommandError, match=r"ended its answer after 7 tokens.*--model"):
        contenders.decode_ask()
    with pytest.raises(CommandError, match="has 7 tokens in raw llama-cpp-python and 8 in"):
        contenders.decode_ask()


def test_a_batch_must_be_answered_whole(contenders):
    contenders.outputs = [answers(6, 6, 6, 6), answers(6, 6, 6)]
    assert contenders.answer_batch()["batch_tokens_per_second"] > 0
    assert len(set(contenders.stdin[0].splitlines())) == QUICK.requests
    with pytest.raises(CommandError, match="gave 3 answers to 4"):
        contenders.answer_in_turn()


def test_only_the_new_process_finds_a_prefix(contenders):
    found = {"free": 1, "constrained": 1, "second": 1, "whole": 1, "messages": []}
    contenders.outputs = [json.dumps(found), json.dumps({"restarted": 2.0})] * 2
    assert contenders.converse()["first_token_new_process_s"] == 2.0
    contenders.converse()
    first, again, other, _ = contenders.caches
    assert first == again != other


def test_there_are_enough_questions(tmp_path):
    full = Contenders(tmp_path / "m.gguf", benchmark_chat.FULL, tmp_path)
    assert len(set(full.requests())) == benchmark_chat.FULL.requests


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; print('so far', file=sys.stderr); sys.exit('error: no luck')", "no luck"),
        ("raise ValueError('a bug')", "ValueError: a bug"),
        ("raise SystemExit(3)", "no message"),
    ],
)
def test_failing_contender_is_named(tmp_path, code, said):
    with pytest.raises(CommandError, match=f"^raw failed: {said}$"):
        run_child("raw", [sys.executable, "-c", code], "", tmp_path)


def test_broken_model_is_one_line(tmp_path, capsys):
    (tmp_path / "broken.gguf").write_text("no model")
    with pytest.raises(CommandError, match="raw failed: ") as error:
        benchmark.main(["chat", "--quick", "--model", str(tmp_path / "broken.gguf")])
    assert error.value.exit_code == 1
    assert capsys.readouterr().out == ""
