"""Prompts whose rules a program can check (IFEval, arXiv:2311.07911): read, judge, score, compare.

The checkers are Google's, as the package ``if-verifiable`` ships them. Files have the form of the published
``input_data.jsonl``, or that of its copy on the hub. A prompt gets the same verdicts in every run.
"""

import codecs
import contextlib
import difflib
import functools
import json
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts._cli import FAILED, CommandError
from scripts.adapter_scores import mcnemar_p
from scripts.tool_scores import Share

_KEYS = ("key", "prompt", "instruction_id_list", "kwargs")
_LISTS = ("keywords", "forbidden_words")
_SETUP = "scripts/setup.sh"


@dataclass(frozen=True)
class Prompt:
    """A prompt, the instruction ids of its rules, and each rule's arguments."""

    id: str
    prompt: str
    rules: list[str]
    kwargs: list[dict[str, Any]]


@dataclass(frozen=True)
class Judged:
    """Which rules an answer follows.

    Attributes:
        followed: A verdict a rule, of the answer as it is (strict).
        loosely: The same, where a first line, a last line and Markdown's asterisks may be in the way.
    """

    followed: list[bool]
    loosely: list[bool]


# Reading -----------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[Prompt]:
    """Read ``{"key", "prompt", "instruction_id_list", "kwargs"}`` a line.

    Raises:
        CommandError: There is no such file, a line (it is named ``file:line``) is no prompt that can be
            judged, or the checkers are not installed.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise CommandError(
            f"'{path}' cannot be read ({error.strerror}); expected a JSONL file of prompts, as "
            "scripts/data/ifeval_prompts.jsonl"
        ) from error
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = _parse_prompt(line)
            if prompt.id in seen:
                raise ValueError(
                    f"key: '{prompt.id}' was line {seen[prompt.id]} already, expected another"
                )
        except ValueError as error:
            raise CommandError(f"{path}:{number}: {error}; correct this line") from error
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise CommandError(f"'{path}' has no prompt; expected one a line")
    return prompts


def _parse_prompt(line: bytes) -> Prompt:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"got a byte that is no UTF-8 ({error.reason}), expected UTF-8 text"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got no JSON ({error}), expected an object") from error
    if not isinstance(row, dict):
        raise ValueError(f"got {type(row).__name__}, expected an object with {', '.join(_KEYS)}")
    if missing := [key for key in _KEYS if key not in row]:
        raise ValueError(f"{', '.join(missing)}: missing, expected {', '.join(_KEYS)}")
    key, text, rules, arguments = (row[key] for key in _KEYS)
    if not isinstance(key, int | str) or isinstance(key, bool) or key == "":
        raise ValueError(f"key: got {key!r}, expected a number or a text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"prompt: got {text!r}, expected a text")
    if not isinstance(rules, list) or not rules or not all(isinstance(one, str) for one in rules):
        raise ValueError(f"instruction_id_list: got {rules!r}, expected a list of instruction ids")
    if not isinstance(arguments, list) or not all(isinstance(one, dict) for one in arguments):
        raise ValueError(f"kwargs: got {arguments!r}, expected a list of objects")
    if len(rules) != len(arguments):
        raise ValueError(
            f"kwargs: got {len(arguments)} for {len(rules)} instructions, expected one each"
        )
    # The hub's copy has every key in every object, null where the rule does not take it.
    kwargs = [{name: one[name] for name in one if one[name] is not None} for one in arguments]
    for rule, given in zip(rules, kwargs, strict=True):
        _check_rule(rule, given)
    return Prompt(str(key), text, rules, kwargs)


def _check_rule(rule: str, given: Mapping[str, Any]) -> None:
    """Refuse, before any model is asked, what a checker would fail on afterwards."""
    checkers = _checkers()
    if rule not in checkers:
        near = difflib.get_close_matches(rule, checkers, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"instruction_id_list: '{rule}' is unknown, the nearest instruction id is '{near}'"
        )
    checker = checkers[rule](rule)
    known = checker.get_instruction_args_keys()
    if unknown := [name for name in given if name not in known]:
        expected = ", ".join(known) or "no argument"
        raise ValueError(f"kwargs: {rule} does not know '{unknown[0]}', expected {expected}")
    for name in _LISTS:
        if not isinstance(given.get(name, []), list):
            raise ValueError(f"kwargs: {name} of {rule} is {given[name]!r}, expected a list")
    try:
        with _fixed(rule):
            checker.build_description(**given)
            checker.check_following("an answer")  # keywords and markers are regular expressions
    except (TypeError, ValueError, KeyError, AttributeError, re.error) as error:
        raise ValueError(
            f"kwargs: {rule} does not take {dict(given)} ({error}), expected values of its kind"
        ) from error


@functools.cache
def _checkers() -> dict[str, Any]:
    """Import the checkers by instruction id, made so that nothing of them is left to chance."""
    try:
        import langdetect
        import nltk
        from if_verifiable.ifeval.instructions import LetterFrequencyChecker
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

        nltk.data.find("tokenizers/punkt_tab/english/")
    except ImportError as error:
        raise CommandError(
            f"if-verifiable cannot be imported ({error}); install it: {_SETUP}", FAILED
        ) from error
    except LookupError as error:  # of nltk; its message fills a screen
        raise CommandError(
            f"nltk's data 'punkt_tab' for English is missing; install it: {_SETUP}", FAILED
        ) from error
    langdetect.DetectorFactory.seed = 0  # it draws samples of a text

    class CharacterFrequencyChecker(LetterFrequencyChecker):  # type: ignore[misc, unused-ignore]
        """Counts the character that was asked for.

        The published checker draws a random letter where the one asked for is none of a to z, as the "#"
        and the "!" of some published prompts.
        """

        def build_description(self, *, letter: str | None = None, **kwargs: Any) -> None:
            super().build_description(**kwargs)
            if letter:
                self._letter = letter.lower()

        def check_following(self, value: str) -> bool:
            count = value.lower().count(self._letter)
            if self._comparison_relation == "less than":
                return bool(count < self._frequency)
            return bool(count >= self._frequency)

    return {**INSTRUCTION_DICT, "keywords:letter_frequency": CharacterFrequencyChecker}


@contextlib.contextmanager
def _fixed(seed: str) -> Iterator[None]:
    """Fix what a checker draws where an argument is missing, and leave no trace of it.

    Silent too: an answer without letters, which has no language, would be logged as a whole.
    """
    state, level = random.getstate(), logging.root.manager.disable
    random.seed(seed)
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)
        random.setstate(state)


# Judging -----------------------------------------------------------------------------------------


def judge(prompt: Prompt, answer: str) -> Judged:
    """Judge an answer; an empty one follows nothing.

    Raises:
        CommandError: The checkers are not installed.
        KeyError: A rule is unknown, which ``read_prompts`` does not let through.
    """
    pairs = [
        _judge_rule(prompt, position, _checkers()[rule], answer)
        for position, rule in enumerate(prompt.rules)
    ]
    return Judged([strict for strict, _ in pairs], [loose for _, loose in pairs])


def _judge_rule(prompt: Prompt, position: int, checker: Any, answer: str) -> tuple[bool, bool]:
    from if_verifiable.common import evaluate_instructions

    rule = prompt.rules[position]
    try:
        with _fixed(f"{prompt.id} {position}"):
            results, _ = evaluate_instructions(
                answer, [rule], [prompt.kwargs[position]], prompt.prompt, {rule: checker}
            )
    except RecursionError:
        # A looping answer such as "[[[[…" is nested too deeply for json.loads: it is no whole JSON.
        return False, False
    if not results:  # nothing was said, at least outside of <think>
        return False, False
    return results[0].strict_pass, results[0].loose_pass


# Scores ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IfevalScores:
    """The four shares that IFEval reports, and the share of followed instructions of each group.

    Attributes:
        prompt_strict: Prompts of which every rule is followed.
        prompt_loose: The same, loosely.
        instruction_strict: Rules that are followed, of all rules.
        instruction_loose: The same, loosely.
        groups: ``instruction_strict`` of the ids with the same part before the colon.
    """

    prompt_strict: Share
    prompt_loose: Share
    instruction_strict: Share
    instruction_loose: Share
    groups: dict[str, Share]

    def to_json(self) -> dict[str, Any]:
        """Give all numbers."""
        shares = {name: share.to_json() for name, share in vars(self).items() if name != "groups"}
        return {**shares, "groups": {name: one.to_json() for name, one in self.groups.items()}}


def score(prompts: Sequence[Prompt], verdicts: Sequence[Judged]) -> IfevalScores:
    """Count the verdicts of prompts, in the same order."""
    groups: dict[str, list[bool]] = {}
    for prompt, one in zip(prompts, verdicts, strict=True):
        for rule, followed in zip(prompt.rules, one.followed, strict=True):
            groups.setdefault(rule.partition(":")[0], []).append(followed)
    return IfevalScores(
        prompt_strict=Share.of(all(one.followed) for one in verdicts),
        prompt_loose=Share.of(all(one.loosely) for one in verdicts),
        instruction_strict=Share.of(followed for one in verdicts for followed in one.followed),
        instruction_loose=Share.of(followed for one in verdicts for followed in one.loosely),
        groups={name: Share.of(groups[name]) for name in sorted(groups)},
    )


@dataclass(frozen=True)
class Comparison:
    """Prompts of which the tuned model follows more, as many, or fewer rules than the base.

    ``p_value`` is that of the exact two-sided sign test over wins and losses.
    """

    wins: int
    ties: int
    losses: int
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """Give the counts and the p-value."""
        return {**vars(self), "p_value": round(self.p_value, 6)}


def compare(base_verdicts: Sequence[Judged], tuned_verdicts: Sequence[Judged]) -> Comparison:
    """Compare two contenders' verdicts of the same prompts, strictly."""
    changes = [
        sum(tuned.followed) - sum(base.followed)
        for base, tuned in zip(base_verdicts, tuned_verdicts, strict=True)
    ]
    wins, losses = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    return Comparison(wins, len(changes) - wins - losses, losses, mcnemar_p(wins, losses))
