"""The terminal chat with a real model: commands through a pipe, a full context, endings."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.model


def chat(model, lines: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "integration.chat", "--model", str(model)]
    return subprocess.run(
        [*command, "--max-tokens", "16", "--temperature", "0", "--threads", "1", *arguments],
        input=lines,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_conversation_and_commands(embedded_gguf, tmp_path):
    path = tmp_path / "talk.json"
    lines = ["/help", "/tools off", "/system Be brief.", "Say hello.", "/adapter", f"/save {path}",
             f"/save {path}", "/nope", "/adapter json", "/stats", "/reset", f"/load {path}",
             "/exit"]  # fmt: skip
    done = chat(embedded_gguf, "\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    assert "- text_formatter(text, width=80, indent=0)" in done.stdout
    assert "* base" in done.stdout
    assert "answers: 1, tool calls: 0" in done.stdout
    saved = json.loads(path.read_text())["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert done.stdout.count(saved[2]["content"]) == 2  # once as the answer, once as loaded
    assert "tok/s ·" not in done.stderr
    for message in ["choose another name", "no command '/nope'", "no adapter is called 'json'"]:
        assert message in done.stderr


def test_full_context_is_named_and_the_chat_goes_on(embedded_gguf):
    lines = "word " * 400 + "\nSay hello.\n" + ("word " * 110 + "\n") * 2
    done = chat(embedded_gguf, lines, "--n-ctx", "256", "--no-tools", "--max-tokens", "8")
    assert "error: the prompt has" in done.stderr
    assert "the context is full: oldest exchanges dropped: 2, kept: 0" in done.stderr
    assert len(done.stdout.splitlines()) >= 3
    assert done.returncode == 0
