"""Whether an answer has the form that its adapter teaches: texts in, verdicts and p-values out.

Nothing here runs what a model wrote; whoever judges code passes the function that does.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# A verdict of None does not count: the request has nothing to judge it by.
Verdicts = dict[str, bool | None]
CheckRunner = Callable[[str, str], bool]


@dataclass(frozen=True)
class Speciality:
    """What an adapter is for.

    Attributes:
        instruction: What somebody without the adapter would write as system prompt.
        measures: Names of the verdicts, in the order of the tables.
        main: The measure that decides.
    """

    instruction: str
    measures: tuple[str, ...]
    main: str


SPECIALITIES = {
    "json": Speciality(
        "Answer with valid JSON only, no other text.", ("valid", "fenced", "keys", "both"), "both"
    ),
    "coding": Speciality(
        "Answer with a fenced code block first, then one sentence.",
        ("block", "parses", "passes"),
        "parses",
    ),
    "support": Speciality(
        "Answer with one sentence that names the problem, then 3 to 5 numbered steps, then a "
        "sentence that begins with 'If this does not help,'.",
        ("form", "steps", "closing"),
        "form",
    ),
}


def judge(name: str, row: dict[str, Any], text: str, run_check: CheckRunner) -> Verdicts:
    """Judge an answer.

    Args:
        name: One of ``SPECIALITIES``.
        row: The request, with ``keys`` or ``check``.
        text: The answer.
        run_check: Runs Python code and asserts about it; for ``coding``.
    """
    if name == "json":
        return judge_json(text, row["keys"])
    if name == "coding":
        return judge_coding(text, row["check"], run_check)
    return judge_support(text)


# JSON ------------------------------------------------------------------------------------------

_WHOLE_FENCE = re.compile(
    r"(`{3,})[ \t]*(?:json)?[ \t]*\n(.*)\n[ \t]*\1", re.DOTALL | re.IGNORECASE
)


def judge_json(text: str, keys: Sequence[str]) -> Verdicts:
    """Judge an answer that is to be JSON.

    ``keys`` counts in a fenced answer too, so that it tells content from form; ``both`` does not.
    """
    whole = _load_json(text)
    fenced = None if whole is not None else _load_json(_without_fence(text))
    value = whole if whole is not None else fenced
    has_keys = value is not None and _has_keys(value, keys)
    return {
        "valid": whole is not None,
        "fenced": fenced is not None,
        "keys": has_keys,
        "both": whole is not None and has_keys,
    }


def _load_json(text: str) -> dict[str, Any] | list[Any] | None:
    """Read an object or array that strict JSON allows; None where there is none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")  # json.loads would take NaN and Infinity

    try:
        value = json.loads(text.strip(), parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _without_fence(text: str) -> str:
    """Take the fence away that holds the whole answer."""
    found = _WHOLE_FENCE.fullmatch(_lines(text).strip())
    return found[2] if found else ""


def _has_keys(value: dict[str, Any] | list[Any], keys: Sequence[str]) -> bool:
    if not keys:
        return True
    objects = value if isinstance(value, list) else [value]
    return bool(objects) and all(
        isinstance(one, dict) and all(key in one for key in keys) for one in objects
    )


# Code --------------------------------------------------------------------------------------------

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^`]*)")
_PYTHON_TAGS = ("python", "py", "python3")


def judge_coding(text: str, check: str, run_check: CheckRunner) -> Verdicts:
    """Judge an answer that is to hold Python; ``passes`` is None where there is no check."""
    blocks = fenced_blocks(text)
    code = _python_block(blocks)
    parses = code is not None and parses_as_python(code)
    passes = None
    if check:
        passes = code is not None and parses and run_check(code, check)
    return {"block": bool(blocks), "parses": parses, "passes": passes}


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Find closed fenced blocks, as Markdown does; give each one's tag and content."""
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    content: list[str] = []
    for line in _lines(text).split("\n"):
        bare = line.strip()
        if opened is None:
            opened, content = _FENCE.fullmatch(line), []
        elif bare and not bare.strip(opened[2][0]) and len(bare) >= len(opened[2]):
            blocks.append((opened[3].partition(" ")[0].strip().lower(), "\n".join(content)))
            opened = None
        else:
            # A block in a list is indented as a whole.
            indent = len(opened[1])
            content.append(line[:indent].lstrip() + line[indent:])
    return blocks


def _python_block(blocks: Sequence[tuple[str, str]]) -> str | None:
    for tags in (_PYTHON_TAGS, ("",)):
        for tag, code in blocks:
            if tag in tags:
                return code
    return None


def parses_as_python(code: str) -> bool:
    """Whether a text is Python with at least one statement."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is doubtful but parses
            return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # ValueError is a null character; the last two are brackets nested too deep for the parser.
        return False


# Support -----------------------------------------------------------------------------------------

CLOSING = "If this does not help,"
_END = r"[.!?…][\"'”’»)]?"
_STEPS = r"1\. \S.*\n2\. \S.*\n3\. \S.*(?:\n4\. \S.*(?:\n5\. \S.*)?)?"
_FORM = re.compile(
    rf"(?P<opening>(?!\d+[.)]\s|[-*#]+\s)\S.*{_END})\n\n{_STEPS}\n\n{CLOSING} \S.*{_END}"
)
_STEP = re.compile(r"\s*(\d+)[.)]\s+\S")
_OPENING_WORDS = range(4, 31)


def judge_support(text: str) -> Verdicts:
    """Judge an answer that is to have an opening sentence, numbered steps and a closing sentence."""
    lines = [line.rstrip() for line in _lines(text).strip().split("\n")]
    form = _FORM.fullmatch("\n".join(lines))
    return {
        "form": form is not None and len(form["opening"].split()) in _OPENING_WORDS,
        "steps": _has_three_steps(lines),
        "closing": lines[-1].startswith(f"{CLOSING} "),
    }


def _has_three_steps(lines: Sequence[str]) -> bool:
    """Whether three lines are numbered 1, 2, 3, whatever stands between them."""
    expected = 1
    for line in lines:
        if (found := _STEP.match(line)) and int(found[1]) == expected:
            expected += 1
    return expected > 3


def _lines(text: str) -> str:
    """Give a text with the line ends of this world."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


# Comparison --------------------------------------------------------------------------------------


def mcnemar_p(became_right: int, became_wrong: int) -> float:
    """Give McNemar's exact two-sided p-value of answers that changed from one contender to another."""
    changed = became_right + became_wrong
    few = min(became_right, became_wrong)
    tail: int = sum(math.comb(changed, count) for count in range(few + 1))
    return min(1.0, 2 * tail / 2**changed)
