"""The `ask` contract, through the real command on the embedded default model."""

import json
import re
import signal
import subprocess
import sys

import pytest

from integration._cli import CommandError
from integration.ask_format import parse_request

pytestmark = pytest.mark.model
FIELDS = [
    "id", "prompt", "text", "tool_calls", "route", "finish_reason", "usage", "timings", "error",
]  # fmt: skip


@pytest.fixture
def ask(embedded_gguf):
    def run(*arguments: str, stdin: str | bytes = b"", model=embedded_gguf):
        command = [sys.executable, "-m", "integration.ask", "--model", str(model), *arguments]
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(command, input=data, capture_output=True, check=False, timeout=200)
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        return done

    return run


def lines(done) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_json_prints_the_object_of_the_contract(ask):
    done = ask("--json", "--max-tokens", "8", "--temperature", "0", "Say hello.")
    assert done.returncode == 0
    answer = json.loads(done.stdout)
    assert list(answer) == FIELDS
    assert answer["usage"]["completion_tokens"] <= 8
    assert answer["text"]
    assert answer["error"] is None
    assert re.fullmatch(r"seed \d+\nnote: .*\n|seed \d+\n", done.stderr)


def test_text_goes_to_stdout_and_nothing_else(ask):
    done = ask("--max-tokens", "300", "--temperature", "0", stdin="Say hello.\n")
    assert done.returncode == 0
    assert done.stdout.strip()
    assert "llama" not in done.stdout + done.stderr


@pytest.mark.parametrize("free", [[], ["--free-calls"]], ids=["grammar", "free"])
def test_dry_run_answers_plain_requests_as_ever(ask, free):
    done = ask("--jsonl", "--tools", "--dry-run", *free, "--max-tokens", "4", stdin="Say hi\n")
    assert done.returncode == 0
    (answer,) = lines(done)
    assert list(answer) == FIELDS
    assert (answer["tool_calls"], answer["error"]) == ([], None)
    assert answer["text"]


def test_plain_lines_strings_and_objects_are_prompts(ask):
    requests = [
        "Say hi",
        '"Name a colour"',
        '{"id": 7, "prompt": "Say {braces}"}',
        '{"id": "m", "messages": [{"role": "user", "content": "Hi"}], "system": "Be brief."}',
    ]
    done = ask("--jsonl", "--max-tokens", "4", stdin="\n".join(requests) + "\n\n")
    assert done.returncode == 0
    answers = lines(done)
    assert [answer["id"] for answer in answers] == [None, None, 7, "m"]
    assert [answer["prompt"] for answer in answers] == [
        "Say hi",
        "Name a colour",
        "Say {braces}",
        "Hi",
    ]


def test_bad_lines_give_error_objects_and_the_run_goes_on(ask):
    requests = [
        '{"id": 1, "prompt": ',
        '{"id": 2}',
        "Say hi",
        '{"id": 3, "prompt": "a", "adapter": "x"}',
    ]
    done = ask("--jsonl", "--max-tokens", "4", stdin="\n".join(requests))
    answers = lines(done)
    assert done.returncode == 1
    assert [answer["error"] is None for answer in answers] == [False, False, True, False]
    assert "line 1" in answers[0]["error"]
    assert (answers[1]["id"], "no prompt" in answers[1]["error"]) == (2, True)
    assert "no adapter is called 'x'" in answers[3]["error"]


def test_same_seed_same_answer_alone_and_in_a_batch(ask):
    options = ["--max-tokens", "12", "--temperature", "1.2", "--seed", "5"]
    alone = json.loads(ask("--json", *options, "Name a colour").stdout)["text"]
    questions = "Say hi\nName a colour\nSay no\n"
    for parallel in ("1", "3"):
        batch = lines(ask("--jsonl", *options, "--parallel", parallel, stdin=questions))
        assert batch[1]["text"] == alone
        assert batch[0]["text"] != alone


def test_prompt_longer_than_the_context_is_exit_4(ask):
    done = ask("--n-ctx", "256", stdin="word " * 400)
    assert done.returncode == 4
    assert done.stderr.startswith("error: the prompt has ")
    assert done.stderr.count("\n") == 1
    batch = ask("--jsonl", "--n-ctx", "256", stdin="word " * 400 + "\nSay hi\n")
    assert batch.returncode == 1
    assert ["context" in str(answer["error"]) for answer in lines(batch)] == [True, False]


@pytest.mark.parametrize("content", [b"", b"just text\n", None])
def test_broken_model_is_exit_3_and_no_crash(ask, embedded_gguf, tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(embedded_gguf.read_bytes()[:50_000_000] if content is None else content)
    done = ask("Hi", model=path)
    assert done.returncode == 3
    assert done.stderr.startswith("error: model '")
    assert done.stderr.count("\n") == 1


def test_timeout_is_exit_6(ask):
    done = ask("--json", "--timeout", "0.0001", "Write a long story.")
    assert done.returncode == 6
    assert json.loads(done.stdout)["finish_reason"] == "timeout"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "x"], "expected NAME=FILE"),
        (["--adapter", "base=x.gguf"], "cannot be an adapter's"),
        (["--adapter", "a=x.gguf", "--adapter", "a=y.gguf"], "is taken"),
        (["--repeat-penalty", "9"], "expected 0.5 to 2"),
        (["--route", "json"], "no adapter is called 'json'"),
        (["--system", "@nowhere.txt"], "does not exist"),
        (["--system", "cognitive_desinger"], "did you mean 'cognitive_designer'"),
        (["--max-tokens", "0"], "expected at least 1"),
        (["--resume"], "go with --jsonl"),
        (["--jsonl", "--approve"], "leave one of them out"),
    ],
)
def test_usage_errors_are_exit_2(ask, arguments, message):
    done = ask(*arguments, *([] if "--jsonl" in arguments else ["Hi"]))
    assert done.returncode == 2
    assert message in done.stderr


def test_missing_adapter_is_exit_3(ask):
    done = ask("--adapter", "x=nowhere.gguf", "Hi")
    assert (done.returncode, "does not exist" in done.stderr) == (3, True)


def test_empty_prompt_is_exit_2(ask):
    assert ask(stdin=" \n").returncode == 2


def test_closed_pipe_is_quiet(embedded_gguf):
    command = (
        f"printf 'Say hi\\nSay hi\\nSay hi\\n' | {sys.executable} -m integration.ask --model "
        f"{embedded_gguf} --jsonl --max-tokens 4 | head -n 1"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["prompt"] == "Say hi"
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_ctrl_c_is_exit_130(embedded_gguf):
    command = [sys.executable, "-m", "integration.ask", "--model", str(embedded_gguf)]
    process = subprocess.Popen(
        [*command, "--max-tokens", "4000", "--temperature", "1.5", "Count to ten thousand."],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_invalid_utf8_is_replaced(ask):
    done = ask("--jsonl", "--max-tokens", "2", stdin=b"Hi \xff\xfe\n")
    assert done.returncode == 0
    assert lines(done)[0]["prompt"] == "Hi ��"
    assert "note: the input is not all UTF-8" in done.stderr
    assert "UTF-8" not in ask("--jsonl", "--max-tokens", "2", stdin="Grüße\n").stderr


def test_output_is_resumed(ask, tmp_path):
    path = tmp_path / "answers.jsonl"
    options = ["--jsonl", "--max-tokens", "2", "--output", str(path)]
    first, second = ('{"id": 1, "prompt": "Hi"}\n', '{"id": 2, "prompt": "Ho"}\n')
    assert ask(*options, stdin=first).stdout == ""
    again = ask(*options, stdin=first + second)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    done = ask(*options, "--resume", stdin=first + second)
    assert (done.returncode, "1 requests were answered already" in done.stderr) == (0, True)
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [1, 2]


def test_line_is_answered_while_the_pipe_stays_open(embedded_gguf):
    """Another program may send a line, read its answer, and send the next."""
    command = [sys.executable, "-m", "integration.ask", "--model", str(embedded_gguf)]
    with subprocess.Popen(
        [*command, "--jsonl", "--max-tokens", "2"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        for prompt in ("Hi", "Ho"):
            process.stdin.write(prompt + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["prompt"] == prompt
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def test_a_request_cannot_read_files():
    request = parse_request('{"prompt": "x", "system": "@/etc/passwd"}', None)
    assert request.messages[0]["content"] == "@/etc/passwd"


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": 3}', '""', '{"messages": []}', '{"messages": [{"role": "robot", "content": "x"}]}',
        '{"messages": [{"role": "assistant", "content": "x"}]}', '{"prompt": "x", "system": 1}',
        '{"prompt": "x", "adapter": 1}',
    ],
)  # fmt: skip
def test_malformed_requests_are_refused(line):
    with pytest.raises(CommandError):
        parse_request(line, None)
