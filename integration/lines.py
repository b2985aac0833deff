"""``ask --jsonl``: requests from lines, answers as lines, in the same order."""

import contextlib
import json
import os
import queue
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from integration._cli import FAILED, OK, CommandError, log
from integration.agent import Reply, respond_steps
from integration.ask_format import Request, answer_object, id_of, parse_request
from integration.backend import run
from integration.batch import Job, run_jobs
from integration.local_model import LocalModel
from integration.options import Session


@contextlib.contextmanager
def open_output(path: Path | None, resume: bool) -> Iterator["Output"]:
    """Open where answers go; None is stdout.

    Raises:
        CommandError: Exit 2; the file exists and is not to be resumed, or cannot be written.
    """
    if path is None:
        yield Output(sys.stdout)
        return
    try:
        done = _answered(path) if resume and path.exists() else Counter[str]()
        with path.open("a" if resume else "x", encoding="utf-8", errors="backslashreplace") as file:
            yield Output(file, done)
    except FileExistsError as error:
        raise CommandError(
            f"--output: '{path}' exists already; go on with it (--resume) or choose another name"
        ) from error
    except OSError as error:
        raise CommandError(f"--output: '{path}': {error.strerror}; choose another place") from error


class Output:
    """Where answers go, and which requests have theirs already."""

    def __init__(self, file: TextIO, answered: Counter[str] | None = None) -> None:
        self._file, self._answered = file, answered or Counter()
        self.skipped = 0

    def has(self, request: Request) -> bool:
        """Whether the file holds an answer to a request already; each answer counts once."""
        key = _key(request.id, request.prompt)
        if not self._answered[key]:
            return False
        self._answered[key] -= 1
        self.skipped += 1
        return True

    def write(self, answer: dict[str, Any]) -> None:
        """Write one line."""
        self._file.write(json.dumps(answer, ensure_ascii=False) + "\n")
        self._file.flush()


def _key(request_id: Any, prompt: Any) -> str:
    return json.dumps(["prompt", prompt] if request_id is None else ["id", request_id])


def _answered(path: Path) -> Counter[str]:
    """Read which requests a file answers; half a line at its end, of a run that was killed, is cut."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    keys: Counter[str] = Counter()
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            answer = json.loads(line)
            keys[_key(answer["id"], answer["prompt"])] += 1
        except (ValueError, KeyError, TypeError) as error:
            raise CommandError(
                f"--resume: line {number} of '{path}' is no answer of --jsonl; choose another file"
            ) from error
    if whole < len(data):
        log(f"note: '{path}' ends in half a line, which is answered anew")
        with path.open("r+b") as file:
            file.truncate(whole)
    return keys


class _Source:
    """Lines of a stream, for someone who has other things to do while none has come."""

    def __init__(self, stream: TextIO) -> None:
        self._lines: queue.Queue[str | None] | None = None
        self._stream = stream
        self._number = 0
        if not _is_file(stream):
            self._lines = queue.Queue(maxsize=64)
            threading.Thread(target=self._read, args=(self._lines,), daemon=True).start()

    def _read(self, lines: "queue.Queue[str | None]") -> None:
        for line in self._stream:
            lines.put(line)
        lines.put(None)

    def take(self, wait: bool) -> tuple[int, str]:
        """Give the next line and its number.

        Raises:
            BlockingIOError: There is none yet, and ``wait`` is False.
            EOFError: There are no more.
        """
        if self._lines is None:
            line = self._stream.readline() or None
        else:
            try:
                line = self._lines.get(block=wait)
            except queue.Empty as error:
                raise BlockingIOError from error
        if line is None:
            raise EOFError
        self._number += 1
        return self._number, line


def _is_file(stream: TextIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # no file behind it
        return True


class _LineJob(Job[Reply]):
    """A line on its way to an answer."""

    def __init__(self, number: int, request: Request, **settings: Any) -> None:
        super().__init__(**settings)
        self.number, self.request = number, request


def answer_lines(session: Session, route: str, stream: TextIO, output: Output) -> int:
    """Answer every line of a stream; give the exit code."""
    source = _Source(stream)

    def take(wait: bool) -> Job[Reply]:
        while True:
            number, line = source.take(wait)
            if line.strip():
                job = _make_job(session, route, number, line)
                if not output.has(job.request):
                    return job

    if isinstance(session.model, LocalModel):
        jobs = run_jobs(session.model.engine, take, _activate(session))
    else:
        jobs = _one_by_one(session, take)
    failed = 0
    for job in jobs:
        assert isinstance(job, _LineJob)
        reply = _reply_of(session, job)
        failed += reply.error is not None
        output.write(answer_object(job.request, reply))
    if output.skipped:
        log(f"{output.skipped} requests were answered already")
    if failed:
        log(f"error: {failed} requests failed; their objects say why")
    return FAILED if failed else OK


def _activate(session: Session) -> Callable[[str], None]:
    def activate(adapter: str) -> None:
        if session.adapters is not None:
            session.adapters.use(adapter)

    return activate


def _one_by_one(session: Session, take: Callable[[bool], Job[Reply]]) -> Iterator[Job[Reply]]:
    while True:
        try:
            job = take(True)
        except EOFError:
            return
        try:
            if job.steps is not None:
                job.result = run(session.model, job.steps)
        except CommandError as error:
            job.result = error
        yield job


def _make_job(session: Session, route: str, number: int, line: str) -> _LineJob:
    try:
        request = parse_request(line, session.system, route)
        session.choose_adapter(request)
    except CommandError as error:
        return _LineJob(number, Request([], line.strip(), id_of(line)), result=error)
    # Every request starts from the same seed, so that a line answers alike alone and in a batch.
    settings = session.settings_for(request.adapter)
    steps = respond_steps(
        session.model, request.messages, settings, session.tools, dry_run=session.dry_run
    )
    return _LineJob(number, request, steps=steps, group=request.adapter)


def _reply_of(session: Session, job: _LineJob) -> Reply:
    if isinstance(job.result, CommandError):
        return Reply(finish_reason="error", error=f"line {job.number}: {job.result}")
    assert job.result is not None
    reply = job.result
    if reply.finish_reason == "timeout":
        seconds = session.settings.timeout_s
        return replace(reply, error=f"line {job.number}: no whole answer within {seconds:g} s")
    return reply
