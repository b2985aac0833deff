"""Conversations that use the tools, put together from phrasings and texts; results really computed.

A conversation is a request and what a good model does with it: a call, a call and an answer from its
result, a plain answer, or a question back; some go on with another request.
"""

import random
import re
from typing import Any

from scripts.tool_requests import Deck, Phrasing, fill, read_phrasings, type_carelessly
from scripts.tool_texts import Corpus, Message, Texts
from tools import TOOLS
from tools.protocol import ToolCall, parse_tool_call, render_tool_call, render_tool_result

# One opening for all: a small model that has learned it neither calls again nor echoes the tags.
ANSWER_OPENING = "Here is the result:"
MAX_RESULT_CHARACTERS = 300
# A conversation of two calls holds its text four times.
MAX_FIRST_CHARACTERS = 200
ANSWERED_SHARE, BASIC_ANSWERED_SHARE = 0.12, 0.5
CARELESS_SHARE = 0.12
BASIC = "basic"  # a register
FOLLOW_UP_SHARE = 0.35
CORPUS_QUESTION_SHARE = 0.2
MIN_QUESTIONS = 20
# Drawn evenly, unlike the phrasings: what is difficult comes more often than there are wordings for it.
FORMATTER_FORMS = (
    *("width",) * 8, *("width_indent",) * 6, *("indent",) * 3, *("bare",) * 2, "foreign",
)  # fmt: skip
SEVERAL_RULES = ("single", "single", "single", "several", "several", "frame")
PHRASING_FILES = (
    "text_formatter", "template_generator", "content_validator_single", "content_validator_several",
    "ask_back", "follow_ups", "no_tool_near", "no_tool_general",
)  # fmt: skip
_TEMPLATE_NAMES = {
    "prompt": ("prompt", "instruction prompt", "LLM prompt", "prompt for a language model", "AI prompt"),
    "email": ("email", "e-mail", "mail", "formal email", "business email"),
    "report": ("report", "project report", "short report", "status report", "written report"),
    "bug_report": ("bug report", "bug ticket", "defect report", "issue report for a bug", "bug_report"),
    "meeting_notes": ("meeting notes", "meeting minutes", "set of minutes", "meeting_notes"),
    "readme": ("README", "readme", "README file", "project readme", "README.md"),
    "cover_letter": ("cover letter", "job application letter", "letter of application", "cover_letter"),
    "release_notes": ("release notes", "release note", "release announcement", "release_notes"),
    "user_story": ("user story", "agile user story", "story card for the backlog", "user_story"),
}  # fmt: skip
Arguments = dict[str, Any]


class Conversations:
    """Makes conversations of each kind; within a file every phrasing comes about equally often.

    Args:
        corpus: Texts of the run's own rows.
        rng: Source of randomness; the same one gives the same conversations.
        held_out: Use the held-out phrasings and texts instead of the others.
        basic: Use only the few plain phrasings that a short training can learn.
    """

    def __init__(
        self, corpus: Corpus, rng: random.Random, held_out: bool, basic: bool = False
    ) -> None:
        self._rng, self._texts, self._basic = rng, Texts(corpus, rng, held_out), basic
        self._answered_share = BASIC_ANSWERED_SHARE if basic else ANSWERED_SHARE
        self._tools = {tool.name: tool for tool in TOOLS}
        enough = len(corpus.questions) >= MIN_QUESTIONS
        self._questions = Deck(corpus.questions, rng) if enough else None
        self.families: set[str] = set()
        self._all: dict[str, Deck[Phrasing]] = {}
        self._decks: dict[tuple[str, str], Deck[Phrasing]] = {}
        for name in PHRASING_FILES:
            phrasings = [
                phrasing
                for phrasing in read_phrasings(name, held_out)
                if (phrasing.register == BASIC) is basic
            ]
            if phrasings:
                self._all[name] = Deck(phrasings, rng)
            for form in dict.fromkeys(phrasing.form for phrasing in phrasings):
                self._decks[name, form] = Deck([one for one in phrasings if one.form == form], rng)

    # Kinds -----------------------------------------------------------------------------------

    def text_formatter(self) -> list[Message]:
        """Wrap or indent a text."""
        forms = [form for form in FORMATTER_FORMS if ("text_formatter", form) in self._decks]
        form = self._rng.choice(forms)
        phrasing, text = self._draw("text_formatter", form), self._texts.any()
        return self._called(*self._format(phrasing, text))

    def template_generator(self) -> list[Message]:
        """Ask for a template, sometimes with values for its fields."""
        phrasing = self._draw("template_generator")
        kind, request = phrasing.template_type, phrasing.request
        if phrasing.form == "any":
            kind = self._rng.choice(list(_TEMPLATE_NAMES))
            request = fill(
                self._template(phrasing), {"name": self._rng.choice(_TEMPLATE_NAMES[kind])}
            )
        elif not phrasing.fields:
            request = self._template(phrasing)
        arguments: Arguments = {"template_type": kind}
        if phrasing.fields:
            arguments["fields"] = phrasing.fields
        return self._called(request, ToolCall("template_generator", arguments))

    def content_validator(self) -> list[Message]:
        """Ask whether a text follows one rule or several."""
        form = "frame" if self._basic else self._rng.choice(SEVERAL_RULES)
        if form == "frame":
            frame = self._draw("content_validator_several", form)
            return self._called(*self._check_clauses(frame))
        name = "content_validator_single" if form == "single" else "content_validator_several"
        return self._called(*self._check(self._draw(name, form)))

    def no_tool(self) -> list[Message]:
        """Ask what needs no tool."""
        if self._questions and self._rng.random() < CORPUS_QUESTION_SHARE:
            return list(self._questions.draw())
        # More of those that only look like a request for a tool: they are the difficult ones.
        name = "no_tool_general"
        if "no_tool_near" in self._all:
            name = self._rng.choice(("no_tool_near", "no_tool_near", name))
        return self._answered(self._draw(name))

    def ask_back(self) -> list[Message]:
        """Leave out what a call needs, or ask for the impossible; then sometimes supply it."""
        phrasing, text = self._draw("ask_back"), self._texts.any()
        rules = (phrasing.call or {}).get("arguments", {}).get("rules", [])
        if rules and "{text}" not in phrasing.request:
            text = self._texts.for_rules(rules)
        settings = {"width": self._texts.width(), "indent": self._texts.indent()}
        shown = {"text": text} | {
            name: self._texts.number(n, phrasing) for name, n in settings.items()
        }
        turns = [_user(fill(phrasing.request, shown)), _assistant(fill(phrasing.answer, shown))]
        if phrasing.call is None or self._rng.random() > FOLLOW_UP_SHARE:
            return turns
        meant = {"text": text, **settings}
        arguments = {
            name: meant.get(name, value) for name, value in phrasing.call["arguments"].items()
        }
        call = ToolCall(phrasing.call["name"], arguments)
        return [*turns, *self._called(fill(phrasing.then, shown), call)]

    def follow_up(self) -> list[Message]:
        """Call a tool, show its result, and ask for something more about it."""
        phrasing = self._draw("follow_ups")
        change = phrasing.change or {}
        first = self._first_call(phrasing, change)
        turns = self._called(*first, answered=True)
        if phrasing.change is None:
            return [*turns, *self._answered(phrasing)]
        meant = self._new_settings(phrasing.request, first[1].arguments)
        shown = {name: self._texts.number(number, phrasing) for name, number in meant.items()}
        meant["text"] = shown["text"] = self._texts.any()
        call = _changed(first[1], change, meant)
        return [*turns, *self._called(fill(phrasing.request, shown), call)]

    # Parts -----------------------------------------------------------------------------------

    def _draw(self, name: str, form: str | None = None) -> Phrasing:
        phrasing = self._all[name].draw() if form is None else self._decks[name, form].draw()
        self.families.add(phrasing.request)
        return phrasing

    def _template(self, phrasing: Phrasing) -> str:
        careless = (
            phrasing.register not in ("foreign", BASIC) and self._rng.random() < CARELESS_SHARE
        )
        return type_carelessly(phrasing.request, self._rng) if careless else phrasing.request

    def _new_settings(self, template: str, old: Arguments) -> Arguments:
        """Draw a width and an indent that differ from the old ones, as the request says."""
        before = old.get("width", 80)
        wider = re.search(r"wider|broader|longer|roomier", template, re.IGNORECASE)
        narrower = re.search(r"narrow|tighter|shorter|smaller|too long", template, re.IGNORECASE)
        while True:
            width, indent = self._texts.width(), self._texts.indent()
            fits = width > before if wider else width < before if narrower else width != before
            if (fits or before in (16, 160)) and indent != old.get("indent", 0):
                return {"width": width, "indent": indent}

    def _format(self, phrasing: Phrasing, text: str) -> tuple[str, ToolCall]:
        values, arguments = {"text": text}, Arguments(text=text)
        for name, value in (("width", self._texts.width()), ("indent", self._texts.indent())):
            if f"{{{name}}}" in phrasing.request:
                values[name], arguments[name] = self._texts.number(value, phrasing), value
        return fill(self._template(phrasing), values), ToolCall("text_formatter", arguments)

    def _check(self, phrasing: Phrasing) -> tuple[str, ToolCall]:
        rules = phrasing.rules
        text = self._texts.for_rules(rules)
        low, high = self._texts.word_limits(text)
        code, language = self._texts.language_of(text)
        shown = {
            "text": text,
            "n": self._texts.number(low, phrasing),
            "m": self._texts.number(high, phrasing),
            "language": language,
        }
        meant = {"n": str(low), "m": str(high), "code": code}
        call = {"text": text, "rules": [fill(rule, meant) for rule in rules]}
        return fill(self._template(phrasing), shown), ToolCall("content_validator", call)

    def _check_clauses(self, frame: Phrasing) -> tuple[str, ToolCall]:
        number = self._rng.choice((1, 1, 1, 2) if self._basic else (2, 2, 3))
        clauses: dict[str, Phrasing] = {}
        while len(clauses) < number:
            clause = self._draw("content_validator_several", "clause")
            clauses.setdefault(clause.rules[0], clause)
        text = self._texts.for_rules(list(clauses))
        low, high = self._texts.word_limits(text)
        code, language = self._texts.language_of(text)
        parts, rules = [], []
        for rule, clause in clauses.items():
            limit = low if rule.startswith("min") else high
            shown = {"n": self._texts.number(limit, frame), "language": language}
            parts.append(fill(clause.request, shown))
            rules.append(fill(rule, {"n": str(limit), "code": code}))
        last = self._rng.choice((" and ", " and ", ", and ", " and that ")) + parts[-1]
        joined = ", ".join(parts[:-1]) + last if parts[1:] else parts[0]
        call = ToolCall("content_validator", {"text": text, "rules": rules})
        return fill(self._template(frame), {"text": text, "clauses": joined}), call

    def _first_call(self, phrasing: Phrasing, change: dict[str, Any]) -> tuple[str, ToolCall]:
        """Make the request and call that a follow-up comes after."""
        after = phrasing.after
        if "of" in change:
            phrasing = self._draw("template_generator", "any")
            name = self._rng.choice(_TEMPLATE_NAMES[change["of"]])
            call = ToolCall("template_generator", {"template_type": change["of"]})
            return fill(phrasing.request, {"name": name}), call
        if after == "any":
            after = self._rng.choice(list(self._tools))
        makers = {
            "text_formatter": self.text_formatter,
            "template_generator": self.template_generator,
            "content_validator": self.content_validator,
        }
        while True:
            request, written, *_ = makers[after]()
            made = parse_tool_call(written["content"])
            assert made is not None
            same = made.arguments.get("template_type") == change.get("template_type", "")
            if not same and len(request["content"]) < MAX_FIRST_CHARACTERS:
                return request["content"], made

    def _called(self, request: str, call: ToolCall, answered: bool = False) -> list[Message]:
        turns = [_user(request), _assistant(render_tool_call(call))]
        result = self._tools[call.name].invoke(call.arguments)
        wanted = answered or self._rng.random() < self._answered_share
        if wanted and (answered or len(result) < MAX_RESULT_CHARACTERS):
            turns += [_user(render_tool_result(result)), _assistant(answer_from(call, result))]
        return turns

    def _answered(self, phrasing: Phrasing) -> list[Message]:
        return [_user(phrasing.request), _assistant(phrasing.answer)]


def answer_from(call: ToolCall, result: str) -> str:
    """Answer from a tool's result: a verdict on one rule in a sentence, everything else as it is."""
    lines = result.split("\n")
    if call.name == "content_validator" and len(lines) == 2:
        verdict = "Yes" if ": passed (" in lines[1] else "No"
        return f"{verdict}. {lines[1]}"
    return f"{ANSWER_OPENING}\n\n{result}"


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _changed(call: ToolCall, change: dict[str, Any], meant: Arguments) -> ToolCall:
    """Give the call that a follow-up means."""
    settings: Arguments = {name: meant[name] for name in ("width", "indent") if name in change}
    if "switch" in change:
        return ToolCall(change["switch"], {"text": call.arguments["text"], **settings})
    if "of" in change:
        return ToolCall(call.name, {**call.arguments, "fields": change["fields"]})
    if "template_type" in change:
        return ToolCall(call.name, {"template_type": change["template_type"]})
    if "rules" in change:
        text = call.arguments["text"]
        return ToolCall("content_validator", {"text": text, "rules": change["rules"]})
    if "text" in change:
        return ToolCall(call.name, {**call.arguments, "text": meant["text"]})
    arguments = {**call.arguments, **settings}
    ordered: Arguments = {
        name: arguments[name] for name in ("text", "width", "indent") if name in arguments
    }
    return ToolCall(call.name, ordered)
