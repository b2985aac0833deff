"""Tries a chat template in a child process with little time and memory, before this one renders it.

A template is a program that came with a file. Jinja's sandbox keeps it from the system, but not from
filling the memory. A template that passed is remembered by its hash.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from integration._cli import FAILED, MODEL, OK, CommandError, run_command
from integration.prefix_store import cache_dir

SECONDS, MEMORY_BYTES = 2, 1 << 30
_CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi."}],
    [
        {"role": "user", "content": "a " * 500},
        {"role": "assistant", "content": "b " * 500},
        {"role": "user", "content": "c"},
    ],
]


def check_template(source: str) -> None:
    """Make sure that a template renders small conversations quickly and in little memory.

    Raises:
        CommandError: Exit 3; it does not.
    """
    passed = cache_dir() / "templates" / hashlib.sha256(source.encode()).hexdigest()
    if passed.exists():
        return
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(
            # -P: a folder "integration" where the user stands is not ours.
            [sys.executable, "-P", "-m", "integration.template_check"],
            input=source, capture_output=True, text=True, encoding="utf-8", check=False,
            timeout=10 * SECONDS, env={**os.environ, "PYTHONPATH": str(root), "PYTHONUTF8": "1"},
        )  # fmt: skip
        code, said = done.returncode, done.stderr.strip()
    except subprocess.TimeoutExpired:
        code, said = -signal.SIGKILL, ""
    if code == OK:
        passed.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        passed.touch()
        return
    if code == MODEL:
        raise CommandError(said.splitlines()[-1].removeprefix("error: "), MODEL)
    if code > 0:
        reason = said.splitlines()[-1] if said else f"exit code {code}"
        raise CommandError(
            f"the chat template could not be tried in a child process: {reason}", FAILED
        )
    raise CommandError(
        f"the chat template takes more than {SECONDS} s or {MEMORY_BYTES >> 20} MiB; give another one "
        "with --template",
        MODEL,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Render small conversations with the template on stdin, under limits."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(argv)
    from integration.prompt import ChatTemplate

    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    template = ChatTemplate(sys.stdin.read(), {}, "<s>", "</s>")
    for chat in _CHATS:
        for add_generation_prompt in (False, True):
            try:
                template.render(chat, add_generation_prompt)
            except CommandError as error:
                if error.exit_code == MODEL:
                    raise
                # It refuses this conversation: that is its right, and no danger.
    return OK


if __name__ == "__main__":
    run_command(main)
