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
# Requests that are looked ahead at, for each sequence, for others of the adapter that is active.
_WINDOW = 4


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
    waiting: deque[Job[T]] = deque()
    running: list[_Running[T]] = []
    group: Any = None
    more = True
    window = _WINDOW * engine.n_sequences
    with engine.lock:
        try:
            while True:
                while order and order[0].result is not None:
                    yield order.popleft()
                while more and len(waiting) < window:
                    try:
                        taken = take(not running and not order)
                    except EOFError:
                        more = False
                        break
                    except BlockingIOError:
                        break
                    order.append(taken)
                    if taken.steps is not None:
                        waiting.append(taken)
                    elif not running:
                        break  # it has its result: out with it before anything is waited for
                while waiting and len(running) < engine.n_sequences:
                    job = _next(waiting, group, may_overtake=len(order) <= 2 * window)
                    if job is None and running:
                        break
                    job = job or waiting[0]
                    if not running:
                        group = job.group
                        activate(group)
                    waiting.remove(job)
                    running.append(_start(engine, job))
                running = _settle(engine, running)
                if running:
                    _evaluate(engine, running)
                    running = _settle(engine, running)
                elif not order and not more and not waiting:
                    return
        finally:
            for one in running:
                one.steps.close()
                engine.release_sequence(one.sequence)


def _next(waiting: deque[Job[T]], group: Any, may_overtake: bool) -> Job[T] | None:
    """Choose the first job of the group that is active, if need be past those of others.

    So each adapter is switched to once for many requests; not without end, for answers leave in the
    order of their requests.
    """
    if waiting[0].group == group:
        return waiting[0]
    return next((job for job in waiting if may_overtake and job.group == group), None)


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
