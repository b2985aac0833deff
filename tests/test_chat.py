"""The terminal chat: commands, Ctrl-C, and no escape sequence from the model."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from integration.chat import visible

pytestmark = pytest.mark.model


def chat(model, lines: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "integration.chat",
        "--model",
        str(model),
        "--max-tokens",
        "24",
    ]
    return subprocess.run(
        [*command, "--temperature", "0", *arguments],
        input=lines,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_conversation_and_commands(embedded_gguf, tmp_path):
    path = tmp_path / "talk.json"
    lines = ["/help", "/tools off", "/system Be brief.", "Say hello.", "/adapter", f"/save {path}",
             f"/save {path}", "/nope", "/adapter json", "/reset", "/exit"]  # fmt: skip
    done = chat(embedded_gguf, "\n".join(lines) + "\n")
    assert done.returncode == 0
    assert "- text_formatter(text, width=80, indent=0)" in done.stdout
    assert "* base" in done.stdout
    saved = json.loads(path.read_text())["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert saved[2]["content"] in done.stdout
    for message in ["choose another name", "no command '/nope'", "no adapter is called 'json'"]:
        assert message in done.stderr


def test_end_of_input_ends_the_chat(embedded_gguf):
    assert chat(embedded_gguf, "").returncode == 0


def test_full_context_is_named_and_the_chat_goes_on(embedded_gguf):
    done = chat(embedded_gguf, "word " * 400 + "\nSay hello.\n", "--n-ctx", "256", "--no-tools")
    assert "error: the prompt has" in done.stderr
    assert done.stdout.strip()
    assert done.returncode == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(embedded_gguf):
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "integration.chat", "--model", str(embedded_gguf)]
    process = subprocess.Popen(
        [*command, "--no-tools", "--max-tokens", "4000", "--temperature", "1.5"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        close_fds=True,
        start_new_session=True,
    )
    os.close(slave)

    def read_until(text: str, seconds: float = 60) -> str:
        seen, end = "", time.monotonic() + seconds
        while text not in seen and time.monotonic() < end:
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096).decode(errors="replace")
        assert text in seen
        return seen

    read_until("> ")
    os.write(master, b"Write a very long story.\n")
    after_echo = read_until("story.\r\n").partition("story.\r\n")[2]
    if not after_echo:
        assert select.select([master], [], [], 60)[0]  # the first word of the answer
    process.send_signal(signal.SIGINT)
    assert "> " in read_until("[stopped]\r\n> ")
    os.write(master, b"/exit\n")
    assert process.wait(timeout=60) == 0
    os.close(master)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;x\x07", r"\x1b[2J\x1b]0;x\x07"),
        ("a\rb\x08", r"a\x0db\x08"),
        ("\x9b1m", r"\x9b1m"),
    ],
)
def test_escape_sequences_are_made_visible(text, shown):
    assert visible(text) == shown


def test_ordinary_text_is_left_alone():
    assert visible("Größe\n\t漢 😀") == "Größe\n\t漢 😀"
