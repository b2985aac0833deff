"""Whether a tool call is the right one: a request and an answer in, an outcome out. No model, no torch.

Right is the choice alone: the tool that was expected, or no tool where none was. Exact is more: the
same arguments too, after ``normalized``. A call that is none (cut off, no JSON, or a tool that does
not exist) is *malformed*: neither the right choice nor no call.
"""

import re
from dataclasses import dataclass, field
from typing import Any

TOOL_NAMES = ("text_formatter", "template_generator", "content_validator")
NONE, MALFORMED = "none", "malformed"
# What is wrong with the arguments of a call of the right tool; `other` is an argument that the tool
# does not have, or a value of the wrong type.
ARGUMENT_ERRORS = (
    "text_cut", "text_too_long", "text_other",
    "width_wrong", "width_missing", "width_added", "indent_wrong", "indent_missing", "indent_added",
    "rules_missing", "rules_added", "rule_parameter",
    "template_type", "fields_missing", "fields_added", "field_value", "other",
)  # fmt: skip
_DEFAULTS = {"width": 80, "indent": 0}
_QUOTES = ('""', "''", "``", "“”", "‘’", "«»", "„“")
_IN_WORD = re.compile(r"(?<=\w)['’](?=\w)")
_SHOWN_TEXT = 200
_ABSENT = object()


@dataclass(frozen=True)
class Call:
    """A tool call, expected or made."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Give the object of request files."""
        return {"name": self.name, "arguments": self.arguments}


@dataclass(frozen=True)
class ToolRequest:
    """A request of which the right call is known; ``call`` is None where no tool is right."""

    id: str
    group: str
    messages: list[dict[str, str]]
    call: Call | None


@dataclass(frozen=True)
class ToolAnswer:
    """What a model did: a ``call``, a ``malformed`` one (the reason why it is none), or plain text."""

    text: str = ""
    call: Call | None = None
    malformed: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A request, what was expected and what was done.

    Attributes:
        id: Of the request.
        group: Of the request.
        expected: The right call, or None.
        answer: What the model did.
        errors: What is wrong: ``wrong_tool``, ``missed_call``, ``false_call`` or ``malformed`` for the
            choice, and for a right choice any of ``ARGUMENT_ERRORS``.
    """

    id: str
    group: str
    expected: Call | None
    answer: ToolAnswer
    errors: tuple[str, ...]

    @property
    def expected_name(self) -> str:
        """The expected tool, or ``none``."""
        return self.expected.name if self.expected else NONE

    @property
    def called(self) -> str:
        """The called tool, ``none`` or ``malformed``."""
        return called_name(self.answer)

    @property
    def right(self) -> bool:
        """Whether the choice is right."""
        return self.called == self.expected_name

    @property
    def exact(self) -> bool | None:
        """Whether the call is exact; None where no call is expected."""
        return None if self.expected is None else self.right and not self.errors

    def to_json(self) -> dict[str, Any]:
        """Give what is kept of a request."""
        answer = self.answer
        got: dict[str, Any] | None = answer.call.to_json() if answer.call else None
        if answer.malformed is not None:
            got = {**(got or {"name": "", "arguments": {}}), "error": answer.malformed}
        return {
            "id": self.id,
            "group": self.group,
            "expected": self.expected.to_json() if self.expected else None,
            "got": got,
            "right": self.right,
            "exact": self.exact,
            "errors": list(self.errors),
            "text": answer.text[:_SHOWN_TEXT],
        }


def called_name(answer: ToolAnswer) -> str:
    """Give the called tool, ``none`` or ``malformed``; an unknown tool is malformed."""
    if answer.malformed is not None:
        return MALFORMED
    if answer.call is None:
        return NONE
    return answer.call.name if answer.call.name in TOOL_NAMES else MALFORMED


def judge(request: ToolRequest, answer: ToolAnswer) -> Outcome:
    """Compare an answer with what was expected."""
    called, expected = called_name(answer), request.call
    if called == MALFORMED:
        errors: tuple[str, ...] = ("malformed",)
    elif expected is None:
        errors = () if called == NONE else ("false_call",)
    elif called == NONE:
        errors = ("missed_call",)
    elif called != expected.name:
        errors = ("wrong_tool",)
    else:
        assert answer.call is not None
        errors = argument_errors(expected.arguments, answer.call.arguments)
    return Outcome(request.id, request.group, expected, answer, errors)


def bare_text(text: str) -> str:
    """Take white space and one pair of matching quotes off a text.

    Quotes that are not a pair around the whole, as in ``"a" and "b"``, stay.
    """
    text = text.strip()
    if len(text) >= 2 and text[0] + text[-1] in _QUOTES:
        inner = text[1:-1]
        words = _IN_WORD.sub("", inner)  # an apostrophe closes nothing
        if text[0] not in words and text[-1] not in words:
            return inner.strip()
    return text


def normalized(arguments: dict[str, Any]) -> dict[str, Any]:
    """Write arguments so that equal calls are equal.

    ``bare_text`` of the text; width 80, indent 0 and fields {} or null are left out; rules become a
    set, where they are names.
    """
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "text" and isinstance(value, str):
            result[name] = bare_text(value)
        elif name == "rules" and _are_names(value):
            result[name] = frozenset(value)
        elif not _is_default(name, value):
            result[name] = value
    return result


def _is_default(name: str, value: Any) -> bool:
    if name == "fields":
        return value is None or value == {}
    return name in _DEFAULTS and _same(value, _DEFAULTS[name])


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal and of one type: the tools refuse ``"40"`` and ``true``."""
    return type(one) is type(other) and bool(one == other)


def argument_errors(expected: dict[str, Any], got: dict[str, Any]) -> tuple[str, ...]:
    """Name what is wrong with arguments; each kind once, in the order of ``ARGUMENT_ERRORS``.

    ``text_cut`` is a proper part of the expected text, ``text_too_long`` contains it. A rule of the
    right family with another number or language is ``rule_parameter``, and neither missing nor added.
    """
    wanted, given = normalized(expected), normalized(got)
    found: set[str] = set()
    for name in wanted.keys() | given.keys():
        value, other = wanted.get(name, _ABSENT), given.get(name, _ABSENT)
        if _same(value, other):
            continue
        if name == "text":
            found.add(_text_error(value, other))
        elif name in _DEFAULTS:
            kind = "missing" if other is _ABSENT else "added" if value is _ABSENT else "wrong"
            found.add(f"{name}_{kind}")
        elif name == "rules":
            found |= _rule_errors(value, other)
        elif name == "template_type":
            found.add("template_type")
        elif name == "fields":
            found |= _field_errors(value, other)
        else:
            found.add("other")
    return tuple(kind for kind in ARGUMENT_ERRORS if kind in found)


def _text_error(wanted: Any, given: Any) -> str:
    if not isinstance(wanted, str) or not isinstance(given, str):
        return "text_other"
    if given in wanted:
        return "text_cut"
    return "text_too_long" if wanted in given else "text_other"


def _rule_errors(wanted: Any, given: Any) -> set[str]:
    wanted, given = (frozenset() if side is _ABSENT else side for side in (wanted, given))
    if not isinstance(wanted, frozenset) or not isinstance(given, frozenset):
        return {"other"}
    missing, added = sorted(wanted - given), sorted(given - wanted)
    errors = set()
    for rule in list(missing):
        family, colon, _ = rule.partition(":")
        twin = next((one for one in added if colon and one.partition(":")[0] == family), None)
        if twin is not None:
            missing.remove(rule)
            added.remove(twin)
            errors.add("rule_parameter")
    if missing:
        errors.add("rules_missing")
    if added:
        errors.add("rules_added")
    return errors or {"other"}  # an empty list where no rules are expected


def _field_errors(wanted: Any, given: Any) -> set[str]:
    wanted, given = ({} if side is _ABSENT else side for side in (wanted, given))
    if not isinstance(wanted, dict) or not isinstance(given, dict):
        return {"other"}
    both = wanted.keys() & given.keys()
    checks = {
        "fields_missing": wanted.keys() - given.keys(),
        "fields_added": given.keys() - wanted.keys(),
        "field_value": {name for name in both if not _same(wanted[name], given[name])},
    }
    return {kind for kind, names in checks.items() if names}
