"""A model behind an OpenAI-compatible server: a real HTTP server on this machine, scripted answers."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from integration._cli import CONTEXT, MODEL, TIMEOUT, USAGE, CommandError
from integration.backend import Turn, run
from integration.decoding import Settings
from integration.server_model import connect_server, is_server_url
from tests.fake_server import Server, completion
from tools import TOOLS
from tools.protocol import ToolCall, render_tool_call

HELLO = [{"role": "user", "content": "Hello?"}]
CALL = ToolCall("text_formatter", {"text": "one two", "width": 20})
KEY = "sk-very-secret-key-123"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = Server()
    thread = threading.Thread(
        target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def watch(server: Server, settings: Settings | None = None, *args: Any) -> tuple[list[str], Turn]:
    model = connect_server(server.url)
    stream = model.stream(model.turn(HELLO, settings or Settings(), *args))
    shown = []
    while True:
        try:
            shown.append(next(stream))
        except StopIteration as end:
            return shown, end.value


def failure(url: str, **options: Any) -> CommandError:
    """Connect and ask; give what that ended in."""

    def ask() -> None:
        model = connect_server(url, **options)
        run(model, model.turn(HELLO, Settings(timeout_s=5)))

    with pytest.raises(CommandError) as caught:
        ask()
    assert "\n" not in str(caught.value)
    return caught.value


def test_answer_streams_with_counts_and_reason(server):
    server.script = ["Hel", "lo", "!"]
    server.reason = "length"
    server.usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    shown, turn = watch(server, Settings(seed=3))
    assert shown == ["Hel", "lo", "!"]
    assert (turn.text, turn.error) == ("Hello!", None)
    answer = turn.answer
    assert (answer.prompt_tokens, answer.completion_tokens) == (9, 4)
    assert (answer.finish_reason, answer.seed) == ("length", 3)


def test_name_and_context_come_from_the_server(server, capsys):
    model = connect_server(server.url)
    assert (model.name, model.n_ctx) == ("tiny", 2048)
    server.models = {"data": [{"id": "first", "max_model_len": 4096}, {"id": "second"}]}
    assert connect_server(server.url).n_ctx == 4096
    assert "2 models; using 'first'" in capsys.readouterr().err
    server.models = {"data": [{"id": "/models/bare.gguf"}]}
    model = connect_server(server.url)
    assert (model.name, model.n_ctx) == ("bare.gguf", None)
    run(model, model.turn(HELLO, Settings()))
    assert server.requests[-1]["model"] == "/models/bare.gguf"
    assert connect_server(server.url, model="mine").name == "mine"


def test_settings_reach_the_server_under_names_that_local_servers_know(server):
    settings = Settings(50, 0.5, 0.8, 30, 0.1, 1.2, stop=["#"], seed=7)
    watch(server, settings)
    (request,) = server.requests
    wanted = {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "Hello?"}],
        "max_tokens": 50,
        "temperature": 0.5,
        "top_p": 0.8,
        "top_k": 30,
        "min_p": 0.1,
        "repeat_penalty": 1.2,
        "repetition_penalty": 1.2,
        "stop": ["#"],
        "seed": 7,
    }
    assert request == wanted
    watch(server, settings, TOOLS)
    assert "stop" not in server.requests[-1]


def test_server_that_refuses_unknown_fields_is_asked_without_them(server, capsys):
    server.refuses = ("top_k", "min_p")
    assert watch(server)[1].text == "Hello!"
    assert [request.get("max_tokens") for request in server.requests] == [512, 512]
    assert "top_k" not in server.requests[-1]
    assert "refused the request (unknown field top_k)" in capsys.readouterr().err
    server.refuses = ("messages",)
    assert "unknown field messages" in str(failure(server.url))


def test_call_is_taken_and_not_shown(server):
    server.script = list(render_tool_call(CALL))
    shown, turn = watch(server, Settings(), TOOLS)
    assert (shown, turn.call, turn.error) == ([], CALL, None)
    assert "- text_formatter(" in server.requests[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("text", "reason", "error"),
    [
        ("<tool_call>{oops}</tool_call>", "stop", "no JSON"),
        ('<tool_call>{"name": "text_fo', "length", "the token limit was met"),
    ],
)
def test_broken_and_cut_calls_are_errors(server, text, reason, error):
    server.script, server.reason = list(text), reason
    shown, turn = watch(server, Settings(), TOOLS)
    assert (shown, turn.call) == ([], None)
    assert error in turn.error


def test_stop_string_that_the_server_ignores_is_found_here(server):
    server.script = ["one ST", "OP two"]
    shown, turn = watch(server, Settings(stop=["STOP"]))
    assert ("".join(shown), turn.answer.finish_reason) == ("one ", "stop")


def test_json_turn_asks_for_the_schema_in_both_ways(server):
    server.script = ['{"city": ', '"Rome"}']
    model = connect_server(server.url)
    assert run(model, model.json_turn(HELLO, Settings(), SCHEMA)).text == '{"city": "Rome"}'
    (request,) = server.requests
    assert request["response_format"]["json_schema"]["schema"] == SCHEMA
    assert json.dumps(SCHEMA) in request["messages"][0]["content"]
    server.refuses = ("response_format",)
    for server.refusal in (400, 422, 500):
        assert run(model, model.json_turn(HELLO, Settings(), SCHEMA)).error is None
        assert "response_format" not in server.requests[-1]


def test_server_that_cannot_stream_is_asked_for_the_whole_answer(server):
    message = {"role": "assistant", "content": "Hello!"}
    server.body = {
        **completion({"message": message, "finish_reason": "length"}, "chat.completion"),
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
    }
    shown, turn = watch(server)
    assert shown == ["Hello!"]
    assert (turn.answer.finish_reason, turn.answer.completion_tokens) == ("length", 4)


@pytest.mark.parametrize(
    ("status", "body", "exit_code", "words"),
    [
        (
            401,
            {"error": {"message": "Invalid key"}},
            MODEL,
            "HTTP 401: Invalid key.*OPENAI_API_KEY",
        ),
        (403, {"error": {"message": "No"}}, MODEL, "refused the key"),
        (404, {"error": {"message": "no model"}}, MODEL, "HTTP 404: no model.*/v1"),
        (429, {"error": {"message": "slow down"}}, MODEL, "HTTP 429: slow down"),
        (500, {"error": {"message": "bang\n\x1b[2Jbang"}}, MODEL, r"HTTP 500: bang \[2Jbang"),
        (503, {"error": {"message": "Loading model"}}, MODEL, "HTTP 503: Loading model"),
        (502, "<html>bad gateway</html>", MODEL, "HTTP 502"),
        (500, {"error": {"message": "x" * 9999}}, MODEL, "HTTP 500: x{300}…"),
        (
            400,
            {"error": {"message": "too long", "type": "exceed_context_size_error", "n_ctx": 9}},
            CONTEXT,
            "too long; shorten",
        ),
        (
            400,
            {"error": {"message": "This model's maximum context length is 9 tokens."}},
            CONTEXT,
            "maximum context length is 9",
        ),
        (200, "<html>Welcome!</html>", MODEL, "sent no chat completion"),
        (200, {"hello": "world"}, MODEL, "sent no chat completion"),
        (200, [1, 2], MODEL, "sent no chat completion"),
    ],
)
@pytest.mark.parametrize("model", ["tiny", None])
def test_every_failure_is_one_line(server, status, body, exit_code, words, model):
    server.status, server.body = status, body
    if status == 200:
        server.models = body if model is None else server.models
    error = failure(server.url, model=model)
    assert error.exit_code == exit_code
    assert re.search(words, str(error))
    assert len(str(error)) < 500
    assert len(server.requests) <= 2  # one try, and a second for servers that cannot stream


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize(
    ("part", "words"),
    [
        (b"data: {oops\n\n", "sent no chat completion"),
        ({"choices": [1]}, "sent no chat completion"),
        ({"error": {"message": "out of slots", "code": 500}}, "out of slots"),
        (b"data: \xff\xfe\n\n", "sent no chat completion"),
    ],
)
def test_garbage_in_the_stream_is_one_line(server, part, words):
    server.script = ["Hel", part]
    error = failure(server.url)
    assert error.exit_code == MODEL
    assert words in str(error)
    assert len(server.requests) == 1


def test_answer_that_broke_off_is_no_whole_one(server):
    server.reason = None
    assert "broke off" in str(failure(server.url))


def test_context_exceeded_in_the_stream(server):
    server.script = [{"error": {"message": "no", "type": "exceed_context_size_error"}}]
    assert failure(server.url).exit_code == CONTEXT


def test_server_that_is_not_there_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    error = failure(f"http://127.0.0.1:{port}/v1")
    assert error.exit_code == MODEL
    assert "no connection" in str(error)
    assert "refused" in str(error)


def test_slow_answer_ends_at_the_time_limit(server):
    server.script = ["Hel", 3.0, "lo"]
    started = time.monotonic()
    shown, turn = watch(server, Settings(timeout_s=0.2))
    assert time.monotonic() - started < 2
    assert (shown, turn.answer.finish_reason) == (["Hel"], "timeout")


def test_silent_server_is_a_time_out(server, monkeypatch):
    monkeypatch.setattr("integration.server_model.SILENCE_TIMEOUT_S", 0.2)
    server.script = ["Hel", 1.0, "lo"]
    with pytest.raises(CommandError, match="did not answer in time") as caught:
        watch(server)
    assert caught.value.exit_code == TIMEOUT
    monkeypatch.setattr("integration.server_model.CONNECT_TIMEOUT_S", 0.2)
    server.delay_s = 1.0
    with pytest.raises(CommandError, match="did not answer in time") as caught:
        connect_server(server.url)
    assert caught.value.exit_code == TIMEOUT


def test_key_is_sent_and_never_shown(server, monkeypatch, capsys):
    watch(server)
    assert server.keys[-1] == "Bearer none"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    watch(server)
    assert server.keys[-1] == f"Bearer {KEY}"
    server.status, server.body = 401, {"error": {"message": f"Incorrect key: {KEY}"}}
    error = failure(server.url, model="tiny")
    assert "Incorrect key: ***" in str(error)
    chat = connect_server(server.url, model="tiny").chat
    assert KEY not in f"{error}{chat!r}{chat.model_dump()!r}{capsys.readouterr()}"


def test_unencrypted_connection_to_another_machine_is_warned_of(server, capsys):
    connect_server("http://192.0.2.7:8080/v1", model="m")
    (line,) = capsys.readouterr().err.splitlines()
    assert "unencrypted" in line
    for url in ("https://192.0.2.7/v1", server.url, "http://localhost:1/v1", "http://[::1]:1/v1"):
        connect_server(url, model="m")
    assert capsys.readouterr().err == ""


def test_no_proxy_is_asked_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert watch(server)[1].text == "Hello!"


def test_url_is_completed_and_checked(server):
    for url in (
        server.url.removesuffix("/v1"),
        f"{server.url}/",
        f"{server.url}/chat/completions",
    ):
        assert connect_server(url).url == server.url
    for url, words in [
        ("http://", "expected a URL"),
        ("http://me:pass@host/v1", "holds a password"),
        ("http://host:port/v1", "malformed"),
        ("http://host/v1?key=1", "without"),
    ]:
        with pytest.raises(CommandError, match=words) as caught:
            connect_server(url)
        assert caught.value.exit_code == USAGE
        assert "pass@" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "is_url"),
    [
        ("http://127.0.0.1:8080/v1", True),
        ("HTTPS://api.example.org/v1", True),
        ("model.gguf", False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", False),
        ("outputs/http://x", False),
    ],
)
def test_urls_are_told_from_files(spec, is_url):
    assert is_server_url(spec) is is_url
