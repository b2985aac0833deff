"""The evaluation of a prompt with a stand-in for `integration.ask`: what is asked, written, refused."""

import json

import pytest

from scripts._cli import FAILED, MODEL, CommandError
from scripts.ask_model import run_ask
from scripts.evaluate_prompt import MAX_TOKENS, main, read_questions

PLAIN = "The sky scatters {} light."


def four(topic: str) -> str:
    """An answer about a topic that has all four parts."""
    return (
        f"Anchor: like {topic}\nEssence: {topic} e\nMechanics: {topic} m\nBreakthrough: {topic} b"
    )


class FakeAsk:
    """Stands in for `integration.ask`: four parts under a system prompt, one sentence without."""

    def __init__(self, prompted=four, plain=PLAIN.format, **changes) -> None:
        self.commands, self.asked, self.changes = [], [], changes
        self.prompted, self.plain = prompted, plain

    def __call__(self, command: list[str], stdin: str) -> str:
        self.commands.append(list(command))
        requests = [json.loads(line) for line in stdin.splitlines()]
        self.asked.append([one["prompt"] for one in requests])
        write = self.prompted if "--system" in command else self.plain
        lines = [
            {
                "id": one["id"],
                "text": write(one["prompt"]),
                "usage": {"completion_tokens": 40},
                "finish_reason": "length" if one["id"] == 0 else "stop",
                "error": None,
                **self.changes,
            }
            for one in requests
        ]
        # In any order: ids say whose they are.
        return "".join(json.dumps(line) + "\n" for line in reversed(lines))


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{at} ü"}) + "\n" for at in range(6)))
    return path


@pytest.fixture
def evaluate(questions, tmp_path):
    def call(*flags: str, run) -> int:
        folder = tmp_path / "out"
        argv = ["--model", "m.gguf", "--questions", str(questions), "--output", str(folder)]
        return main([*argv, *flags], run)

    return call


def result(tmp_path) -> dict:
    return json.loads((tmp_path / "out/prompt_evaluation.json").read_text(encoding="utf-8"))


def test_prompt_that_helps_is_exit_0(evaluate, tmp_path, capsys):
    run = FakeAsk()
    assert evaluate(run=run) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out/prompt_evaluation.json'}\n"
    found = result(tmp_path)
    four_parts = found["measures"]["all_four"]
    assert (four_parts["without"]["hits"], four_parts["with"]["hits"]) == (0, 6)
    assert four_parts["mcnemar_p"] == 2 / 64
    assert found["with"]["mean_parts"] == 4
    assert found["with"]["cut"] == 1
    assert [one["text"] for one in found["without"]["answers"]] == [
        PLAIN.format(f"q{at} ü") for at in range(6)
    ]
    table = (tmp_path / "out/prompt_evaluation.md").read_text(encoding="utf-8")
    assert "| all four parts | 0.0 % [0.0–39.0] | 100.0 % [61.0–100.0] | 0 / 6 | 0.0312 |" in table


@pytest.mark.parametrize(
    ("prompted", "plain"),
    [
        (PLAIN.format, PLAIN.format),  # nobody follows
        (four, four),  # everybody does, without the prompt too
        (PLAIN.format, four),  # the prompt harms
        (lambda _: four("a vaccine"), PLAIN.format),  # the prompt's example, copied
    ],
)
def test_prompt_that_does_not_help_is_exit_1_and_says_so(
    evaluate, tmp_path, capsys, prompted, plain
):
    with pytest.raises(CommandError, match=r"does not help: all four parts in \d of 6") as caught:
        evaluate(run=FakeAsk(prompted, plain))
    assert caught.value.exit_code == FAILED
    # The figures are there all the same.
    assert capsys.readouterr().out.endswith("prompt_evaluation.json\n")
    found = result(tmp_path)["measures"]["all_four"]
    assert found["with"]["hits"] <= found["without"]["hits"]


def test_child_is_asked_greedily_with_the_prompt_and_without(evaluate, tmp_path):
    run = FakeAsk()
    flags = ["--adapter", "a=a.gguf", "--adapter", "b=b.gguf", "--route", "b", "--system", "mine"]
    evaluate(*flags, run=run)
    prompted, plain = run.commands
    assert prompted == [*plain, "--system", "mine"]
    text = " ".join(plain)
    assert f"--jsonl --temperature 0 --seed 1 --max-tokens {MAX_TOKENS}" in text
    assert "--adapter a=a.gguf --adapter b=b.gguf --route b" in text
    assert run.asked[0] == run.asked[1]
    assert result(tmp_path)["route"] == "b"


def test_child_is_a_command_that_integration_ask_parses(evaluate):
    from integration.ask import build_parser

    run = FakeAsk()
    evaluate("--adapter", "a=a.gguf", "--route", "a", run=run)
    for command in run.commands:
        assert command[1:3] == ["-m", "integration.ask"]
        assert build_parser().parse_args(command[3:]).max_tokens == MAX_TOKENS
    with pytest.raises(SystemExit):
        build_parser().parse_args([*run.commands[0][3:], "--sytem", "x"])


def test_rows_are_spread_over_the_file(evaluate):
    run = FakeAsk()
    evaluate("--rows", "3", run=run)
    assert run.asked[0] == ["q0 ü", "q2 ü", "q4 ü"]
    evaluate("--rows", "99", run=run)
    assert len(run.asked[-1]) == 6
    with pytest.raises(CommandError, match="--rows: got -1"):
        evaluate("--rows", "-1", run=run)


@pytest.mark.parametrize(
    ("run", "message", "code"),
    [
        (FakeAsk(error="too long"), "was not answered: too long", MODEL),
        (FakeAsk(usage={}), "no answer object", MODEL),
        (FakeAsk(id=0), "no answer to 5 of 6 requests, the first is 1;", MODEL),
        (lambda *_: "", "no answer to 6 of 6", MODEL),
        (lambda *_: "oops\n", "no answer object: oops", MODEL),
    ],
)
def test_answers_that_are_missing_or_none_end_it(evaluate, tmp_path, run, message, code):
    with pytest.raises(CommandError, match=message) as caught:
        evaluate(run=run)
    assert caught.value.exit_code == code
    assert not (tmp_path / "out").exists()


def test_child_that_cannot_load_the_model_gives_its_exit_code(evaluate):
    with pytest.raises(CommandError, match="ended with exit code 3") as caught:
        evaluate("--model", "nowhere.gguf", run=run_ask)
    assert caught.value.exit_code == MODEL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n["b"]\n', ":2: expected"),
        (b'{"prompt": " "}', ":1: expected"),
        (b'{"question": "a"}', ":1: expected"),
        (b"plain", ":1: expected"),
        (b"\n", "has no question"),
        (b"\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_bad_questions_are_named(tmp_path, content, message):
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CommandError, match=message):
        read_questions(path)
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}')
    assert read_questions(path) == ["a", "b"]
