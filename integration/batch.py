"""Several requests side by side in one pass over the weights.

A small model on a CPU waits for memory: reading the weights for four tokens takes hardly longer than
for one. Each request keeps a sequence of its own and the steps of its own tool loop; whatever they
want evaluated next goes into one batch.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from integration._cli import CommandError
from integration.backend import Feed, Steps
from integration.engine import Engine

T = TypeVar("T")


@dataclass
class Job(Generic[T]):
    """A request on its way.

    Attributes:
        steps: What it does; None when it has ended before it began.
        group: Jobs of different groups (adapters) are not decoded together.
        result: What the steps returned, or the error that ended them.
    """

    steps: Steps[T] | None = None
    group: Any = None
    result: T | CommandError | None = None


class _Running(Generic[T]):
    """A job that has a sequence, and what it wants evaluated next."""

    def __init__(self, job: Job[T], steps: Steps[T], sequence: int) -> None:
        self.job, self.steps, self.sequence = job, steps, sequence
        self.wanted: Feed | None = None

    def advance(self, reply: int | None) -> None:
        """Go on to the next tokens to evaluate, or to the end (``wanted`` is None then)."""
        self.wanted = None
        try:
            event = self.steps.send(reply)
            while isinstance(event, str):
                event = self.steps.send(None)
            self.wanted = event
        except StopIteration as end:
            self.job.result = end.value
        except CommandError as error:
            self.job.result = error

    def fail(self, error: CommandError) -> None:
        """End the job with an error."""
        self.steps.close()
        self.job.result, self.wanted = error, None


def run_jobs(
    engine: Engine, take: Callable[[bool], Job[T]], activate: Callable[[Any], None]
) -> Iterator[Job[T]]:
    """Run jobs, as many side by side as there are sequences; yields them in their order.

    Args:
        engine: Where they are evaluated; its lock is held until the end.
        take: Gives the next job. Called with True it may wait for one; with False it raises
            ``BlockingIOError`` when there is none yet. Raises ``EOFError`` after the last one.
        activate: Called with a group before its first job, while nothing else runs.
    """
    order: deque[Job[T]] = deque()
    running: list[_Running[T]] = []
    pending: Job[T] | None = None
    group, more = None, True
    with engine.lock:
        try:
            while True:
                while order and order[0].result is not None:
                    yield order.popleft()
                while len(running) < engine.n_sequences:
                    if pending is None and more:
                        try:
                            pending = take(not running and not order)
                        except EOFError:
                            more = False
                        except BlockingIOError:
                            break
                        if pending is not None:
                            order.append(pending)
                    if pending is not None and pending.steps is None:
                        pending = None
                        continue
                    if pending is None or (running and pending.group != group):
                        break
                    if not running:
                        group = pending.group
                        activate(group)
                    running.append(_start(engine, pending))
                    pending = None
                running = _settle(engine, running)
                if running:
                    _evaluate(engine, running)
                    running = _settle(engine, running)
                elif not order and not more and pending is None:
                    return
        finally:
            for one in running:
                one.steps.close()
                engine.release_sequence(one.sequence)


def _start(engine: Engine, job: Job[T]) -> _Running[T]:
    assert job.steps is not None
    one = _Running(job, job.steps, engine.take_sequence())
    one.advance(None)
    return one


def _settle(engine: Engine, running: list[_Running[T]]) -> list[_Running[T]]:
    """Evaluate what is more than a token on its own, since a prompt fills a batch; drop what ended."""
    left = []
    for one in running:
        while one.wanted is not None and (one.wanted.is_prompt or len(one.wanted.tokens) > 1):
            _evaluate(engine, [one])
        if one.wanted is None:
            engine.release_sequence(one.sequence)
        else:
            left.append(one)
    return left


def _evaluate(engine: Engine, running: list[_Running[T]]) -> None:
    try:
        rows = engine.evaluate([(one.sequence, one.wanted) for one in running if one.wanted])
    except CommandError as error:
        for one in running:
            one.fail(error)
        return
    for one, row in zip(running, rows, strict=True):
        one.advance(row)
