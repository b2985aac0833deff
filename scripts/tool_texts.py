"""Texts and numbers that tool requests are about: from the run's rows, a hand-written bank, and made up."""

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from scripts._cli import CommandError
from scripts.tool_requests import REQUESTS_DIR, Deck, Phrasing, is_held_out, read_lines
from tools._language import LANGUAGES, detect_language

Message = dict[str, str]

MAX_PLAIN_CHARACTERS = 600
MIN_SENTENCES = 20
# Share of texts that come from the run's rows; the others are hand-written.
_CORPUS_SHARE = 0.4
# A rule is asked about a text of its kind, or (rarely) about any text.
_ANY_TEXT_SHARE = 0.12
_WORDS_SHARE = 0.12
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_LIKE_CODE = re.compile(r"[=<>|$]|--|\b[wi] \{")


@dataclass(frozen=True)
class Corpus:
    """Texts that the rows are made of.

    Attributes:
        sentences: Plain sentences, 30 to 110 characters long.
        questions: Short single exchanges, asked beside the tool list and answered without a tool.
    """

    sentences: list[str]
    questions: list[list[Message]]

    @classmethod
    def of(cls, conversations: Iterable[list[Message]]) -> "Corpus":
        """Take the usable parts of conversations; give training rows only, or held-out text leaks."""
        found: dict[str, None] = {}
        questions = []
        for messages in conversations:
            roles = [message["role"] for message in messages]
            length = sum(len(message["content"]) for message in messages)
            if roles == ["user", "assistant"] and length < MAX_PLAIN_CHARACTERS:
                questions.append(messages)
            for message in messages:
                for sentence in re.split(r"(?<=[.!?])\s+|\n+", message["content"]):
                    plain = 30 <= len(sentence) <= 110 and not re.search(r'[`*|#"{}<>]', sentence)
                    if plain and sentence[0].isupper() and sentence[-1] in ".!?":
                        found[sentence] = None
        return cls(list(found), questions)

    def require_sentences(self) -> None:
        """Refuse a corpus that is too small.

        Raises:
            CommandError: It has too few sentences.
        """
        if len(self.sentences) < MIN_SENTENCES:
            raise CommandError(
                f"tool_rows: the data has {len(self.sentences)} plain sentences to build requests "
                f"from, expected at least {MIN_SENTENCES}; set tool_rows: 0 or add rows"
            )


def number_in_words(value: int) -> str:
    """Spell a whole number from 0 to 999."""
    if value < 20:
        return _ONES[value]
    if value < 100:
        rest = value % 10
        return _TENS[value // 10 - 2] + (f"-{_ONES[rest]}" if rest else "")
    rest = value % 100
    return f"{_ONES[value // 100]} hundred" + (f" and {number_in_words(rest)}" if rest else "")


class Texts:
    """Draws texts and numbers.

    Args:
        corpus: Sentences of the run's own rows.
        rng: Source of randomness.
        held_out: Take the held-out texts of the bank instead of the others.
    """

    def __init__(self, corpus: Corpus, rng: random.Random, held_out: bool) -> None:
        lines = [line for line in read_lines("texts") if is_held_out(line["text"]) == held_out]
        self.rng = rng
        values = (REQUESTS_DIR / "values.json").read_text(encoding="utf-8")
        self._values: dict[str, list[str]] = json.loads(values)
        self._sentences = Deck(corpus.sentences, rng)
        self._bank = Deck([line["text"] for line in lines], rng)
        self._forms = {
            form: Deck([line["text"] for line in lines if line["form"] == form], rng)
            for form in sorted({line["form"] for line in lines})
        }
        self._makers: dict[str, Callable[[], str]] = {
            "is_email": self._email,
            "is_url": self._url,
            "is_json": self._json,
            "has_headings": self._headings,
            "has_code_block": self._code_block,
            "no_placeholders": self._placeholders,
            "balanced_brackets": self._brackets,
            "language": self._language,
            "not_empty": self.short,
        }

    def any(self) -> str:
        """Give a text of any kind."""
        if self.rng.random() < _CORPUS_SHARE:
            # Two often enough: who has only seen single sentences stops copying at a full stop.
            return " ".join(self._sentences.draw() for _ in range(self.rng.choice((1, 1, 2))))
        return self._bank.draw()

    def short(self) -> str:
        """Give a few words."""
        return self._forms["short"].draw()

    def for_rules(self, rules: Sequence[str]) -> str:
        """Give a text for which rules are worth asking; they hold about every other time."""
        makers = [self._makers[name] for rule in rules if (name := _family(rule)) in self._makers]
        if not makers or self.rng.random() < _ANY_TEXT_SHARE:
            return self.any()
        return self.rng.choice(makers)()

    def number(self, value: int, phrasing: Phrasing) -> str:
        """Write a number in digits, sometimes in words: in English, and not in what looks like code."""
        in_digits = phrasing.register in ("foreign", "basic") or _LIKE_CODE.search(phrasing.request)
        if in_digits or self.rng.random() > _WORDS_SHARE:
            return str(value)
        return number_in_words(value)

    def language_of(self, text: str) -> tuple[str, str]:
        """Give code and name of a language to ask for: every other time the text's own."""
        own = detect_language(text)
        code = own if own and self._holds() else self.rng.choice(list(LANGUAGES))
        return code, LANGUAGES[code]

    def width(self) -> int:
        """Give a line width."""
        usual = (20, 24, 30, 32, 36, 40, 42, 45, 48, 50, 55, 60, 64, 65, 66, 68, 70, 72, 76, 78, 80)
        return self.rng.choice((*usual, 90, 100, 120, 132, self.rng.randint(16, 160)))

    def indent(self) -> int:
        """Give an indent."""
        return self.rng.choice((1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 8, 10, 12))

    def word_limits(self, text: str) -> tuple[int, int]:
        """Give a lower and an upper limit of words, often near the text's own count."""
        count = len(text.split())
        near = max(2, count + self.rng.randint(-6, 6))
        low = self.rng.choice((near, near, 3, 5, 10, 20, 40, 50, 80, 100, 150, 200, 250, 300))
        high = low + self.rng.choice((5, 10, 15, 20, 25, 40, 50, 100, 200))
        return low, high

    def _holds(self) -> bool:
        return self.rng.random() < 0.5

    def _value(self, name: str) -> str:
        return self.rng.choice(self._values[name])

    def _email(self) -> str:
        name, domain = self._value("names"), self._value("domains")
        dot, number = self.rng.choice(("", ".", "_", "-")), self.rng.choice(("", "", "7", "+news"))
        local = name + (dot + self._value("surnames") if dot else "") + number
        if self._holds():
            return f"{local}@{domain}"
        wrong = (
            f"{local}.{domain}",
            f"{local}@",
            f"@{domain}",
            f"{local}@{domain.split('.')[0]}",
            f"{local} @ {domain}",
            f"{local}@@{domain}",
            f"{local} at {domain}",
            f"{local}@.{domain}",
            f"{name.title()} <{local}@{domain}>",
        )
        return self.rng.choice(wrong)

    def _url(self) -> str:
        domain, path = self._value("domains"), self._value("paths")
        if self._holds():
            scheme = self.rng.choice(("https", "https", "http", "ftp"))
            return f"{scheme}://{self.rng.choice(('', 'www.'))}{domain}{path}"
        wrong = (
            f"www.{domain}{path}",
            f"https:/{domain}{path}",
            f"http//{domain}",
            domain,
            f"https://{path}",
            f"htps://{domain}{path}",
            f"https://{domain} {path}",
            f"://{domain}",
        )
        return self.rng.choice(wrong)

    def _json(self) -> str:
        def value() -> object:
            some: tuple[object, ...] = (
                self.rng.randint(0, 999),
                self._value("names"),
                True,
                None,
                2.5,
                ["a", "b"],
                {self._value("json_keys"): self.rng.randint(1, 9)},
                [1, 2, 3],
                "",
            )
            return self.rng.choice(some)

        keys = self.rng.sample(self._values["json_keys"], self.rng.choice((1, 2, 3)))
        whole: object = {key: value() for key in keys}
        if self.rng.random() < 0.2:
            whole = [value(), value(), whole]
        text = json.dumps(whole, indent=2 if self.rng.random() < 0.2 else None)
        if self._holds():
            return text
        wrong = (
            text.replace('"', "'"),
            text[:-1].rstrip(),
            text[:-1] + "," + text[-1],
            text.replace('"', "", 2),
            text.replace(":", "=", 1),
        )
        return self.rng.choice(wrong)

    def _headings(self) -> str:
        if self._holds():
            return self._forms["markdown"].draw()
        body = self._sentences.draw()
        if self._holds():
            return f"{'#' * self.rng.choice((1, 2, 3))} {self._value('headings')}\n{body}"
        return body

    def _code_block(self) -> str:
        code, body = self._forms["code"].draw(), self.short()
        if self._holds():
            language = self.rng.choice(("", "python", "sh", "json"))
            after = f"\n\n{self._sentences.draw()}" if self._holds() else ""
            return f"{body}\n\n```{language}\n{code}\n```{after}"
        return self.rng.choice((f"{body}\n\n{code}", code, f"{body}: `ls -l`"))

    def _placeholders(self) -> str:
        text = self.rng.choice(
            (self._forms["email_body"].draw(), self._sentences.draw(), self.any())
        )
        if self._holds():
            return text
        words = text.split(" ")
        words.insert(self.rng.randint(1, len(words)), self._value("placeholders"))
        return " ".join(words)

    def _brackets(self) -> str:
        key, number = self._value("json_keys"), self.rng.randint(0, 9)
        some = (
            self._forms["code"].draw(),
            f"f({key}[{number}])",
            f"if (a[{number}] == b) {{ print(a); }}",
            f"{self.short()} (see [2])",
            f"[{key}, {self._value('json_keys')}, (x{number})]",
        )
        text = self.rng.choice(some)
        places = [at for at, letter in enumerate(text) if letter in "()[]{}"]
        if self._holds() or not places:
            return text
        at = self.rng.choice(places)
        return (text[:at] + text[at + 1 :]).strip()

    def _language(self) -> str:
        return self._forms["non_english"].draw() if self._holds() else self._sentences.draw()


def _family(rule: str) -> str:
    return rule.partition(":")[0]
