"""Check a text against rules: text and rules in, one verdict a rule out.

Call it as `content_validator.invoke({"text": "...", "rules": ["not_empty", "max_words:90"]})`, or
`check_content` from code. A rule is one of the names in `Rule`, or has a parameter: `min_words:N`,
`max_words:N` and `language:CODE`. A check takes linear time and gives (passed, reason); the reason
says where the text fails, where there is such a place.
"""

import itertools
import json
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NoReturn, get_args
from urllib.parse import urlsplit

from langchain_core.tools import ToolException, tool
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator

from tools._errors import answer_errors, echo, unknown_name
from tools._language import LANGUAGES, detect_language
from tools._markdown import find_code_blocks, find_place, remove_code_blocks, split_lines

__all__ = ["Rule", "RuleResult", "check_content", "content_validator"]

Rule = Literal[
    "not_empty",
    "has_headings",
    "is_email",
    "is_json",
    "is_url",
    "has_code_block",
    "no_placeholders",
    "balanced_brackets",
]
_Verdict = tuple[bool, str]
_Check = Callable[[str], _Verdict]

# Shown to the model; five digits are enough for every text that the tool accepts.
_FAMILIES = ("min_words:N", "max_words:N", "language:CODE")
_WORD_RULE = re.compile(r"(min_words|max_words):([1-9][0-9]{0,4})")
# Chinese and Japanese are written without spaces: as in word processors, each character counts.
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CJK_MARKS = r"\u3001-\u3004\u3008-\u3020\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}{_CJK_MARKS}]+")
_ATX_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+[^#\s]")
_UNDERLINE = re.compile(r" {0,3}(?:=+|-+)[ \t]*$")
# A line that can carry a setext underline: no list item, quote, table row, heading or rule.
_PARAGRAPH = re.compile(r" {0,3}(?![-*+][ \t]|\d{1,9}[.)][ \t]|[>|#]|[-=*_]{2,}[ \t]*$)\S")
# RFC 5321 "atext" with dots; quoted local parts and address literals are not in practical use.
_LOCAL_CHARS = frozenset(string.ascii_letters + string.digits + "!#$%&'*+-/=?^_`{|}~.")
# Every alternative stops at its own opening bracket, so a search stays linear.
_PLACEHOLDER = re.compile(
    r"(?<![\w$}\\])\{[A-Za-z_]\w*\}"  # neither ${HOME} nor \frac{a}{b}
    r"|\[(?i:your|insert|enter|add)\b[^\[\]\n]{0,60}\](?!\()"  # nor a Markdown link
    r"|<(?i:your|insert|enter|add)\b[^<>\n]{0,60}>"
    r"|\b(?:TODO|TBD|FIXME)\b"
    r"|\b(?i:lorem ipsum)\b"
)
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class RuleResult:
    """The verdict on one rule, with the reason in a few words."""

    rule: str
    passed: bool
    reason: str


def check_content(text: str, rules: Iterable[str]) -> list[RuleResult]:
    """Check a text against each rule once, in the order of the first mention.

    A word is what stands between white space, and in Chinese and Japanese each character (Thai,
    which has no spaces either, is not split). Languages are judged by the text outside
    fenced code, at most its first 5,000 characters.

    Args:
        text: What to check.
        rules: Names of `Rule`, `min_words:N`, `max_words:N` (N from 1 to 99999) or
            `language:CODE` with a two-letter code such as `en`.

    Raises:
        ToolException: A rule is unknown.
    """
    results: list[RuleResult] = []
    for rule in dict.fromkeys(rules):
        check = _find_check(rule)
        if check is None:
            raise ToolException(_unknown_rule("rules", rule))
        results.append(RuleResult(rule, *check(text)))
    return results


def _find_check(rule: str) -> _Check | None:
    """Give the check of a rule, its parameter filled in; None for an unknown rule."""
    if numbered := _WORD_RULE.fullmatch(rule):
        check = _check_min_words if numbered[1] == "min_words" else _check_max_words
        return partial(check, limit=int(numbered[2]))
    family, _, code = rule.partition(":")
    if family == "language" and code in LANGUAGES:
        return partial(_check_language, code=code)
    return _CHECKS.get(rule)


def _unknown_rule(where: str, rule: str) -> str:
    """Say what is wrong with a rule: its parameter, or its name."""
    family, colon, value = rule.partition(":")
    if colon and family in {"min_words", "max_words"}:
        return f"{where}: got {echo(rule)}, expected {family}:N with N from 1 to 99999"
    if colon and family == "language":
        wanted = value.strip().casefold()
        nearest = [code for code, name in LANGUAGES.items() if wanted in {code, name.casefold()}]
        hint = f" (nearest: language:{nearest[0]})" if nearest else ""
        codes = ", ".join(LANGUAGES)
        return f"{where}: got {echo(rule)}, expected language:CODE, CODE one of {codes}{hint}"
    return unknown_name(where, rule, [*_CHECKS, *_FAMILIES])


def _check_not_empty(text: str) -> _Verdict:
    if text.strip():
        return True, _count(_count_words(text), "word")
    return False, "only white space in the text" if text else "no text"


def _count_words(text: str) -> int:
    return sum(1 for _ in _WORD.finditer(text))


def _check_min_words(text: str, *, limit: int) -> _Verdict:
    words = _count_words(text)
    if words >= limit:
        return True, _count(words, "word")
    return False, f"{_count(words, 'word')}, {limit - words} short"


def _check_max_words(text: str, *, limit: int) -> _Verdict:
    words = _count_words(text)
    if words <= limit:
        return True, _count(words, "word")
    extra = next(itertools.islice(_WORD.finditer(text), limit, None))
    place = find_place(text, extra.start())
    return False, f"{_count(words, 'word')}, {words - limit} too many, the first in {place}"


def _check_language(text: str, *, code: str) -> _Verdict:
    prose = "\n".join(remove_code_blocks(split_lines(text))).strip()  # code reads as no language
    if not any(char.isalpha() for char in prose):
        return False, "no words outside code blocks to judge by"
    found = detect_language(prose)
    if found is None:
        return False, "the language of this text is not clear"
    return found == code, f"reads as {LANGUAGES[found]}"


def _check_headings(text: str) -> _Verdict:
    lines = remove_code_blocks(split_lines(text))
    for number, line in enumerate(lines, start=1):
        if _ATX_HEADING.match(line):
            return True, f"line {number}: {_quote(line)}"
        above = lines[number - 2] if number > 1 else ""
        if _UNDERLINE.match(line) and _PARAGRAPH.match(above):
            return True, f"line {number - 1}: {_quote(above)}"
    return False, 'no line like "# Title" outside code blocks'


def _check_email(text: str) -> _Verdict:
    address = text.strip()
    local, at, domain = address.rpartition("@")
    strange = next((char for char in local if char not in _LOCAL_CHARS), "")
    findings = (
        (not address, "no text"),
        (not at, "no @ in the text"),
        (not local, "nothing before the @"),
        (not domain, "nothing after the @"),
        ("@" in local, "more than one @"),
        (any(char.isspace() for char in address), "white space in the address"),
        (bool(strange), f"{_quote(strange)} before the @"),
        (len(address) > 254, f"{len(address)} characters, at most 254 are allowed"),
        (len(local) > 64, f"{len(local)} characters before the @, at most 64 are allowed"),
        (local.startswith(".") or local.endswith("."), "a dot at the edge of the part before @"),
        (".." in local, "two dots in a row before the @"),
    )
    problem = next((reason for failed, reason in findings if failed), "")
    problem = problem or _domain_problem(domain)
    if not problem and "." not in domain:
        problem = f"no dot in the domain {_quote(domain)}"
    if not problem and domain.rpartition(".")[2].isdigit():
        problem = f"the domain {_quote(domain)} ends in a number"
    return not problem, problem or f"an address at {domain}"


def _check_json(text: str) -> _Verdict:
    try:
        # Numbers stay strings: a long one is valid JSON, but Python refuses to convert it.
        value = json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        return False, f"line {error.lineno}, column {error.colno}: {error.msg}"
    except ValueError as error:
        return False, str(error)
    except RecursionError:
        return False, "nested too deeply"
    if isinstance(value, dict):
        return True, f"an object with {_count(len(value), 'key')}"
    if isinstance(value, list):
        return True, f"a list of {_count(len(value), 'item')}"
    return True, "a single value"


def _check_url(text: str) -> _Verdict:
    url = text.strip()
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port  # reading the port checks it
    except ValueError as error:
        return False, _quote(str(error))
    problem = ""
    if not url:
        problem = "no text"
    elif any(char.isspace() or not char.isprintable() for char in url):
        problem = "white space or a control character in the text"
    elif parts.scheme not in {"http", "https", "ftp"}:
        problem = "does not start with http://, https:// or ftp://"
    elif not host:
        problem = "no host after the scheme"
    elif ":" not in host:  # urlsplit has checked the address of an IPv6 host
        problem = _domain_problem(host)
    return not problem, problem or f"{parts.scheme}, host {_quote(host)}"


def _check_code_block(text: str) -> _Verdict:
    blocks = find_code_blocks(split_lines(text))
    if not blocks:
        return False, "no line that starts with ```"
    if not blocks[-1].closed:
        return False, f"the block that starts in line {blocks[-1].start + 1} is not closed"
    lines = f"lines {blocks[0].start + 1} to {blocks[0].stop}"
    return True, f"{_count(len(blocks), 'block')}, the first in {lines}"


def _check_placeholders(text: str) -> _Verdict:
    found = list(_PLACEHOLDER.finditer(text))
    if not found:
        return True, "none found"
    place = find_place(text, found[0].start())
    return False, f"{_quote(found[0][0])} in {place}, {len(found)} in all"


def _check_brackets(text: str) -> _Verdict:
    waiting: list[tuple[str, int]] = []
    pairs = 0
    for position, char in enumerate(text):
        if char in _CLOSING:
            waiting.append((char, position))
        elif char in ")]}":
            if not waiting:
                return False, f"{char} in {find_place(text, position)} closes nothing"
            opening, start = waiting.pop()
            if _CLOSING[opening] != char:
                place, opened = find_place(text, position), find_place(text, start)
                return False, f"{char} in {place} does not match {opening} in {opened}"
            pairs += 1
    if waiting:
        opening, start = waiting[-1]
        return False, f"{opening} in {find_place(text, start)} is not closed"
    return True, _count(pairs, "pair")


_CHECKS: dict[str, _Check] = {
    "not_empty": _check_not_empty,
    "has_headings": _check_headings,
    "is_email": _check_email,
    "is_json": _check_json,
    "is_url": _check_url,
    "has_code_block": _check_code_block,
    "no_placeholders": _check_placeholders,
    "balanced_brackets": _check_brackets,
}
assert list(_CHECKS) == list(get_args(Rule))


def _domain_problem(domain: str) -> str:
    """Say what is wrong with a host name (RFC 1035 labels), or return nothing."""
    if len(domain) > 253:
        return f"{len(domain)} characters in the domain, at most 253 are allowed"
    for label in domain.split("."):
        if not label:
            return f"an empty part in the domain {_quote(domain)}"
        if len(label) > 63:
            return f"{len(label)} characters in {_quote(label)}, at most 63 are allowed"
        if label.startswith("-") or label.endswith("-"):
            return f"a hyphen at the edge of {_quote(label)}"
        if not label.isascii() or not label.replace("-", "").isalnum():
            return f"a character that a domain cannot have in {_quote(label)}"
    return ""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _quote(text: str) -> str:
    """Echo a piece of the text on one line."""
    text = text.strip() or text
    return repr(text if len(text) <= 60 else text[:57] + "...")


# Nearly a union of types, but with one error instead of one for each alternative.
_RULE_SCHEMA = {
    "anyOf": [
        {"type": "string", "enum": list(_CHECKS)},
        {"type": "string", "pattern": "^min_words:[1-9][0-9]{0,4}$", "shown_as": _FAMILIES[0]},
        {"type": "string", "pattern": "^max_words:[1-9][0-9]{0,4}$", "shown_as": _FAMILIES[1]},
        {
            "type": "string",
            "enum": [f"language:{code}" for code in LANGUAGES],
            "shown_as": _FAMILIES[2],
        },
    ]
}


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, title="content_validator")

    text: str = Field(
        max_length=100_000,
        description="The text to check, copied exactly.",
        json_schema_extra={"verbatim": True},
    )
    rules: list[Annotated[str, WithJsonSchema(_RULE_SCHEMA)]] = Field(
        min_length=1, max_length=20, description="What to check."
    )

    @field_validator("rules")
    @classmethod
    def _require_known_rules(cls, rules: list[str]) -> list[str]:
        for number, rule in enumerate(rules):
            if _find_check(rule) is None:
                raise ValueError(_unknown_rule(f"rules[{number}]", rule))
        return rules


@tool(args_schema=_Arguments)
def content_validator(text: str, rules: list[str]) -> str:
    """Check a text against rules. Use it to see if a text is valid. Example: rules=["is_email"]."""
    results = check_content(text, rules)
    passed = sum(result.passed for result in results)
    lines = [f"{passed} of {_count(len(results), 'rule')} passed"]
    for result in results:
        verdict = "passed" if result.passed else "failed"
        lines.append(f"{result.rule}: {verdict} ({result.reason})")
    return "\n".join(lines)


answer_errors(content_validator, _Arguments)
