"""Several requests side by side: in order, each on its own sequence, one failing alone."""

from itertools import groupby
from threading import RLock

import pytest

from integration._cli import CommandError
from integration.backend import Feed
from integration.batch import Job, run_jobs


class FakeEngine:
    """Evaluates nothing, but notes which sequences were evaluated together."""

    def __init__(self, n_sequences: int) -> None:
        self.lock, self.n_sequences = RLock(), n_sequences
        self.free = list(range(n_sequences))
        self.evaluated: list[list[int]] = []

    def take_sequence(self) -> int:
        return self.free.pop(0)

    def release_sequence(self, number: int) -> None:
        self.free.append(number)

    def evaluate(self, feeds):
        self.evaluated.append([number for number, _ in feeds])
        if any(feed.tokens[0] == 666 for _, feed in feeds):
            raise CommandError("the context is full")
        return list(range(len(feeds)))


def steps(name: str, length: int, bad_at: int = -1, prompt: int = 5):
    yield Feed([0] * prompt, is_prompt=True)
    for at in range(length):
        yield f"piece {at}"
        row = yield Feed((666 if at == bad_at else at,))
        assert isinstance(row, int)
    return f"{name} done"


def run(engine, *jobs: Job | None) -> list:
    """Run jobs; None stands for "nothing has come yet"."""
    left, activated = list(jobs), []

    def take(wait: bool) -> Job:
        if not left:
            raise EOFError
        job = left.pop(0)
        if job is None:
            assert not wait, "waited for a line while something could be done"
            raise BlockingIOError
        return job

    results = []
    for job in run_jobs(engine, take, activated.append):
        result = job.result
        results.append(str(result) if isinstance(result, CommandError) else result)
    assert sorted(engine.free) == list(range(engine.n_sequences))
    run.activated = activated
    return results


def test_results_come_in_order_and_steps_share_a_pass():
    engine = FakeEngine(2)
    assert run(engine, Job(steps("a", 5)), Job(steps("b", 1)), Job(steps("c", 2))) == [
        "a done", "b done", "c done",
    ]  # fmt: skip
    assert [0, 1] in engine.evaluated
    # Prompts fill a pass alone, and the third takes the place of the second.
    assert engine.evaluated.count([0, 1]) == 3
    assert FakeEngine(1).n_sequences == 1
    one = FakeEngine(1)
    assert run(one, Job(steps("a", 2)), Job(steps("b", 2))) == ["a done", "b done"]
    assert all(len(together) == 1 for together in one.evaluated)


def test_nothing_is_waited_for_while_there_is_work():
    assert run(FakeEngine(2), Job(steps("a", 5)), None, None, Job(steps("b", 1))) == [
        "a done", "b done",
    ]  # fmt: skip


def test_error_of_one_ends_that_one():
    def refuse():
        raise CommandError("too long")
        yield

    results = run(FakeEngine(3), Job(refuse()), Job(result="early"), Job(steps("c", 2)))
    assert results == ["too long", "early", "c done"]


def test_error_of_a_pass_ends_all_that_were_in_it():
    assert run(FakeEngine(2), Job(steps("a", 3, bad_at=1)), Job(steps("b", 9))) == [
        "the context is full", "the context is full",
    ]  # fmt: skip


def test_groups_are_not_mixed():
    engine = FakeEngine(2)
    jobs = [Job(steps(name, 3), group=group) for name, group in [("a", 1), ("b", 1), ("c", 2)]]
    assert run(engine, *jobs) == ["a done", "b done", "c done"]
    assert run.activated == [1, 2]
    last = max(at for at, together in enumerate(engine.evaluated) if together == [0, 1])
    assert all(len(together) == 1 for together in engine.evaluated[last + 1 :])


def test_leaving_early_gives_everything_back():
    engine = FakeEngine(2)
    jobs = [Job(steps("a", 1)), Job(steps("b", 50)), Job(steps("c", 50))]

    def take(wait: bool) -> Job:
        if not jobs:
            raise EOFError
        return jobs.pop(0)

    running = run_jobs(engine, take, lambda group: None)
    assert next(running).result == "a done"
    running.close()
    assert sorted(engine.free) == [0, 1]


def test_programming_errors_are_not_swallowed():
    def broken():
        yield Feed((1,))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(FakeEngine(1), Job(broken()))


def test_jobs_of_the_active_group_overtake_others_and_answers_stay_in_order():
    jobs = [Job(steps(str(at), 3), group=at % 2) for at in range(8)]
    assert run(FakeEngine(2), *jobs) == [f"{at} done" for at in range(8)]
    assert [group for group, _ in groupby(run.activated)] == [0, 1]


def test_nobody_is_overtaken_without_end():
    jobs = [Job(steps("other", 1), group="b"), *[Job(steps("x", 1), group="a") for _ in range(80)]]
    jobs.insert(0, Job(steps("first", 1), group="a"))
    assert run(FakeEngine(1), *jobs)[:2] == ["first done", "other done"]
    assert [group for group, _ in groupby(run.activated)] == ["a", "b", "a"]
