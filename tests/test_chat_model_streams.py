"""TomeforgeChat streams from many threads over one backend, which two may never use at once."""

import asyncio
import queue
import subprocess
import sys
import threading
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler

from tests.fake_backend import FakeBackend, make


def test_callbacks_get_every_piece():
    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            self.seen.append(token)

    model, _ = make("Hel|lo.", "Hel|lo.", streaming=True)
    streamed, invoked = Tokens(), Tokens()
    list(model.stream("Hi", config={"callbacks": [streamed]}))
    model.invoke("Hi", config={"callbacks": [invoked]})
    assert streamed.seen == invoked.seen == ["Hel", "lo.", ""]


def test_stream_that_is_closed_early_ends_the_turn_and_frees_the_backend():
    model, backend = make("|".join("abcdefgh"), "next")
    backend.gate = queue.Queue()
    for _ in range(2):
        backend.gate.put(None)
    stream = model.stream("Hi")
    assert next(stream).content == "a"
    stream.close()
    backend.gate.put(None)
    assert backend.is_free()
    assert backend.fed <= 4
    backend.gate = None
    assert model.invoke("Hi").content == "next"


def test_stream_that_nobody_reads_on_does_not_keep_the_backend():
    """The same thread asks again in the middle of a stream: neither a mix-up nor a deadlock."""
    model, backend = make("a|b|c", "next")
    stream = model.stream("Hi")
    assert next(stream).content == "a"
    assert model.invoke("Hi").content == "next"
    assert "".join(chunk.content for chunk in stream) == "bc"
    assert backend.is_free()


def test_stream_that_was_never_started_never_takes_the_backend():
    model, backend = make("a")
    model.stream("Hi")
    assert backend.is_free()
    assert backend.asked == []


def test_failure_in_a_stream_reaches_the_reader_and_frees_the_backend():
    model, backend = make(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        list(model.stream("Hi"))
    assert backend.is_free()


def test_many_async_streams_and_calls_share_one_backend():
    """More readers than the executor has threads; each `next` comes from another one."""
    count = 40
    model, backend = make(*["a|b|c"] * (2 * count))

    async def read() -> str:
        return "".join([str(chunk.content) async for chunk in model.astream("Hi")])

    async def ask() -> str:
        return (await model.ainvoke("Hi")).text

    async def everybody() -> list[str]:
        return await asyncio.gather(*(job() for _ in range(count) for job in (read, ask)))

    assert asyncio.run(everybody()) == ["abc"] * (2 * count)
    assert backend.is_free()


def test_fake_notices_two_turns_at_once():
    """The twin of the tests above: without the lock they would fail."""
    backend = FakeBackend("a|b", "a|b")
    first, second = (backend.stream(backend._next()) for _ in range(2))
    next(first)
    with pytest.raises(AssertionError, match="two turns"):
        next(second)


class CountingLock:
    """Knows how many threads have waited for it at once."""

    def __init__(self) -> None:
        self.lock, self.count, self.most = threading.RLock(), 0, 0

    def __enter__(self) -> None:
        self.count += 1
        self.most = max(self.most, self.count)
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.count -= 1
        self.lock.release()


@pytest.mark.parametrize("is_async", [False, True])
def test_batch_runs_in_order(is_async):
    model, backend = make(*"abcdefgh")
    backend.lock = lock = CountingLock()
    questions = [f"question {number}" for number in range(8)]
    answers = asyncio.run(model.abatch(questions)) if is_async else model.batch(questions)
    assert [answer.content for answer in answers] == list("abcdefgh")
    assert [asked["messages"][0]["content"] for asked in backend.asked] == questions
    assert lock.most == 1


def test_process_with_an_open_stream_ends_soon():
    code = """
from integration.chat_model import TomeforgeChat
from tests.fake_backend import FakeBackend
import itertools, time
class Endless(FakeBackend):
    def _next(self, is_json=False):
        for number in itertools.count():
            time.sleep(0.01)
            yield str(number)
stream = TomeforgeChat(backend=Endless()).stream("Hi")
print(next(stream).content)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stdout) == (0, "0\n"), run.stderr
