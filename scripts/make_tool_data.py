"""Tool-use conversations from the tools' own schemas: seeded, reproducible, results really computed.

Each row is a chat with the tool list as its system turn: a request, then either a call (sometimes
with its result and an answer from it) or, for requests that need no tool, a plain answer. The texts
are sentences of the run's training rows.

    python -m scripts.make_tool_data --rows 200 --seed 7 > tool_rows.jsonl
"""

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts._cli import OK, CommandError, run_command

SAMPLE_PATH = Path(__file__).parent / "data" / "finetome_sample.jsonl"
Row = dict[str, Any]
Message = dict[str, str]

# Shares of the kinds; plain answers are as common as any tool, or a small model calls for everything.
KINDS = {
    "text_formatter": 0.3,
    "template_generator": 0.21,
    "content_validator": 0.24,
    "plain": 0.25,
}
ANSWERED_SHARE = 0.5
MAX_PLAIN_CHARACTERS = 800
# One opening for all: a small model that has learned it neither calls again nor echoes the tags.
ANSWER_OPENING = "Here is the result:"
MAX_RESULT_CHARACTERS = 400
MIN_SENTENCES = 20

FORMAT_REQUESTS = (
    "Format this text to {width} characters per line: {text}",
    "Wrap the following to {width} columns:\n\n{text}",
    "Please wrap this at {width} columns: {text}",
    "{text}\n\nBreak that into lines of at most {width} characters, please.",
    'Can you re-wrap "{text}" so that no line is longer than {width} characters?',
    "My terminal is only {width} wide. Make this fit: {text}",
    "width {width}: {text}",
    "I need this paragraph in lines of {width}.\n{text}",
    "Set this to a line width of {width}, thanks:\n{text}",
    "Could you make this {width} chars wide? {text}",
    "Reflow to {width} columns.\n\n{text}",
    "Lines of {width} characters for this one, please: {text}",
)
INDENT_REQUESTS = (
    "Format this text to {width} characters with an indent of {indent}: {text}",
    "Wrap at {width} columns and indent by {indent} spaces:\n\n{text}",
    "{text}\n\nWrap it to {width}, {indent} spaces in front of each line.",
    "Indent this by {indent} and keep it within {width} columns: {text}",
    "Please reflow to {width} wide with a {indent}-space indent: {text}",
    'Put "{text}" into lines of {width} characters, indented {indent} spaces.',
)
PLAIN_FORMAT_REQUESTS = (
    "Wrap this text: {text}",
    "This line is far too long, please break it up: {text}",
    "Tidy the line breaks here, normal width:\n\n{text}",
    "Format this paragraph for me.\n{text}",
)
ONLY_INDENT_REQUESTS = (
    "Indent this by {indent} spaces: {text}",
    "Add an indent of {indent} to this paragraph:\n{text}",
    "{text}\n\nSame text with {indent} spaces in front of each line, please.",
)
TEMPLATE_NAMES = {
    "prompt": ("prompt", "instruction prompt", "prompt for a language model", "LLM prompt"),
    "email": ("email", "e-mail", "mail", "formal email"),
    "report": ("report", "project report", "short report", "status report"),
    "bug_report": ("bug report", "bug ticket", "issue report for a bug", "defect report"),
    "meeting_notes": ("meeting notes", "minutes", "meeting minutes", "notes for a meeting"),
    "readme": ("README", "readme", "README file", "project readme"),
}
TEMPLATE_REQUESTS = (
    "Give me a template for {name}.",
    "I need a {name} template.",
    "{name} template please",
    "Do you have a ready-made {name} layout I can fill in?",
    "Please generate a blank {name} for me to complete.",
    "Can you hand me the skeleton of a {name}?",
    "Show me the standard structure of a {name}, with blanks.",
    "I have to write {name} and want to start from a template.",
    "Start me off with an empty {name}.",
    "template: {name}",
    "Could I get a fill-in form for {name}?",
    "Make me a {name} template, I will fill it in later.",
)
RULE_PHRASES = {
    "not_empty": ("it is not empty", "there is any text in it", "it isn't blank"),
    "has_headings": ("it has headings", "it contains Markdown headings", "there are headings"),
    "is_email": ("it is a valid email address", "this is an email address", "it's a real email"),
    "is_json": ("it is valid JSON", "the JSON parses", "this is well-formed JSON"),
    "is_url": ("it is a valid URL", "this is a proper web address", "the link is well formed"),
    "has_code_block": ("it has a code block", "there is a fenced code block"),
    "no_placeholders": ("no placeholders are left", "every placeholder is filled in"),
    "balanced_brackets": ("the brackets are balanced", "all brackets are closed"),
}
CHECK_REQUESTS = (
    "Check if {rules}: {text}",
    "Is this right? Please check that {rules}.\n\n{text}",
    "Validate that {rules}: {text}",
    "{text}\n\nCan you verify that {rules}?",
    'Please test whether {rules}: "{text}"',
    "Tell me whether {rules}.\n{text}",
    "I want to be certain that {rules}. The text: {text}",
    "validate: {rules}\n{text}",
    'Does "{text}" pass? I need to know that {rules}.',
    "Run a check that {rules} on this: {text}",
)
SMALL_TALK = (
    ("Hi there!", "Hello! What would you like to work on?"),
    ("Good morning", "Good morning! How can I help?"),
    ("Thanks, that helped.", "Glad to hear it. Tell me when there is more to do."),
    ("How are you today?", "I am doing well, thank you. What can I do for you?"),
    (
        "What can you do?",
        "I answer questions, and I can wrap text to a width, hand out document "
        "templates and check texts against rules.",
    ),
    (
        "Which tools do you have?",
        "Three: text_formatter wraps text, template_generator gives "
        "document templates, and content_validator checks a text against rules.",
    ),
    ("Bye!", "Goodbye, and good luck with your work."),
    (
        "What is an email?",
        "An email is a message sent from one computer account to another over the "
        "internet. It has an address, a subject and a body.",
    ),
    (
        "Why do people write bug reports?",
        "So that someone else can reproduce the fault and repair "
        "it: a good report gives the steps, what was expected and what happened.",
    ),
    (
        "How wide should a line of text be?",
        "Between 50 and 75 characters reads well in print; code is often kept to 80 or 100.",
    ),
    ("Can you wrap text for me?", "Yes. Send me the text and the line width you want."),
    ("Please check my text.", "Gladly. Send me the text and say what I should check."),
    (
        "I need a template.",
        "Which kind: prompt, email, report, bug report, meeting notes or readme?",
    ),
    ("Name a colour.", "Blue."),
    ("Say hi", "Hi!"),
    ("Tell me a joke.", "Why did the function return early? It had a date."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a leap year?", "A leap year has 366 days."),
    (
        "What does JSON stand for?",
        "JSON stands for JavaScript Object Notation, a text format for structured data.",
    ),
    ("Is 17 a prime number?", "Yes. 17 can only be divided by 1 and by itself."),
    ("My meeting was terrible today.", "I am sorry to hear that. What went wrong?"),
    (
        "Who reads status reports?",
        "Mostly managers and partners who want to know in a minute what "
        "is done, what is late and what is needed.",
    ),
    (
        "What makes a good README?",
        "It says what the project does, how to install it and how to use "
        "it, with one example that works when copied.",
    ),
    (
        "Is it rude to send an email at night?",
        "Usually not, since email is read when it suits the "
        "reader. If it may look urgent, schedule it for the morning.",
    ),
)
NAMES = [
    "ana",
    "ben",
    "chloe",
    "dmitri",
    "eva",
    "farid",
    "grace",
    "hiro",
    "ines",
    "jonas",
    "kim",
    "lena",
    "marco",
    "nina",
    "omar",
    "pia",
]
DOMAINS = ["example.com", "mail.example.org", "post.example.net", "school.example.edu"]


@dataclass(frozen=True)
class Corpus:
    """Texts that the rows are made of.

    Attributes:
        sentences: Plain sentences, 40 to 220 characters long.
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
                    plain = 40 <= len(sentence) <= 220 and not re.search(r'[`*|#"{}<>]', sentence)
                    if plain and sentence[0].isupper() and sentence[-1] in ".!?":
                        found[sentence] = None
        return cls(list(found), questions)


def sample_conversations() -> list[list[Message]]:
    """Read the shipped sample as messages."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [
        [
            {"role": roles[turn["from"]], "content": turn["value"]}
            for turn in json.loads(line)["conversations"]
        ]
        for line in SAMPLE_PATH.read_text(encoding="utf-8").splitlines()
    ]


def _text(rng: random.Random, corpus: Corpus) -> str:
    return " ".join(rng.sample(corpus.sentences, rng.choice((1, 1, 2))))


def _format_request(rng: random.Random, corpus: Corpus) -> tuple[str, dict[str, Any]]:
    text = _text(rng, corpus)
    width = rng.choice((20, 24, 30, 32, 36, 40, 45, 48, 50, 55, 60, 64, 66, 70, 72, 76, 100, 120))
    indent = rng.choice((1, 2, 3, 4, 6, 8))
    templates, arguments = rng.choices(
        (
            (FORMAT_REQUESTS, {"text": text, "width": width}),
            (INDENT_REQUESTS, {"text": text, "width": width, "indent": indent}),
            (PLAIN_FORMAT_REQUESTS, {"text": text}),
            (ONLY_INDENT_REQUESTS, {"text": text, "indent": indent}),
        ),
        weights=(8, 4, 1, 1),
    )[0]
    return rng.choice(templates).format(text=text, width=width, indent=indent), arguments


def _template_request(rng: random.Random, corpus: Corpus) -> tuple[str, dict[str, Any]]:
    kind = rng.choice(list(TEMPLATE_NAMES))
    request = rng.choice(TEMPLATE_REQUESTS).format(name=rng.choice(TEMPLATE_NAMES[kind]))
    return request, {"template_type": kind}


def _text_for_rule(rule: str, rng: random.Random, corpus: Corpus) -> str:
    """Give a text for which the rule is worth asking: it holds about every other time."""
    holds = rng.random() < 0.5
    name, domain, sentence = rng.choice(NAMES), rng.choice(DOMAINS), rng.choice(corpus.sentences)
    number = rng.randint(2, 99)
    texts = {
        "is_email": (f"{name}{number}@{domain}", f"{name}.{domain}"),
        "is_json": (json.dumps({name: number}), f"{{{name}: {number}"),
        "is_url": (f"https://{domain}/{name}", f"{domain} / {name}"),
        "has_headings": (f"# {name.title()}\n\n{sentence}", sentence),
        "has_code_block": (f"{sentence}\n```\nprint({number})\n```", sentence),
        "no_placeholders": (sentence, f"Dear {{{name}}}, {sentence}"),
        "balanced_brackets": (f"f({name}[{number}])", f"f({name}[{number})"),
    }
    return texts.get(rule, (sentence, sentence))[0 if holds else 1]


def _check_request(rng: random.Random, corpus: Corpus) -> tuple[str, dict[str, Any]]:
    first = rng.choice(list(RULE_PHRASES))
    rules = [first]
    if rng.random() < 0.25:
        rules.append(rng.choice([rule for rule in RULE_PHRASES if rule != first]))
    text = _text_for_rule(first, rng, corpus)
    asked = " and ".join(rng.choice(RULE_PHRASES[rule]) for rule in rules)
    request = rng.choice(CHECK_REQUESTS).replace("{rules}", asked).replace("{text}", text)
    return request, {"text": text, "rules": rules}


def _plain_turns(rng: random.Random, corpus: Corpus) -> list[Message]:
    if rng.random() < 0.45 or not corpus.questions:
        question, answer = rng.choice(SMALL_TALK)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return list(rng.choice(corpus.questions))


def generate_conversations(num_rows: int, seed: int, corpus: Corpus) -> Iterator[Row]:
    """Yield rows of ``messages``, ``source`` and ``kind``.

    Args:
        num_rows: How many.
        seed: The same seed and corpus give the same rows.
        corpus: Where the texts come from.

    Raises:
        CommandError: The corpus has too few sentences.
    """
    if not num_rows:
        return
    if len(corpus.sentences) < MIN_SENTENCES:
        raise CommandError(
            f"tool_rows: the data has {len(corpus.sentences)} plain sentences to build requests from, "
            f"expected at least {MIN_SENTENCES}; set tool_rows: 0 or add rows"
        )
    from tools import TOOLS
    from tools.protocol import ToolCall, render_tool_call, render_tool_result, tool_prompt

    by_name = {tool.name: tool for tool in TOOLS}
    makers = {
        "text_formatter": _format_request,
        "template_generator": _template_request,
        "content_validator": _check_request,
    }
    rng = random.Random(seed)
    system = {"role": "system", "content": tool_prompt(TOOLS)}
    for _ in range(num_rows):
        kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
        turns: list[Message]
        if kind == "plain":
            turns = _plain_turns(rng, corpus)
        else:
            request, arguments = makers[kind](rng, corpus)
            call = render_tool_call(ToolCall(kind, arguments))
            turns = [
                {"role": "user", "content": request},
                {"role": "assistant", "content": call},
            ]
            result = by_name[kind].invoke(arguments)
            if len(result) < MAX_RESULT_CHARACTERS and rng.random() < ANSWERED_SHARE:
                answer = f"{ANSWER_OPENING}\n\n{result}"
                turns.append({"role": "user", "content": render_tool_result(result)})
                turns.append({"role": "assistant", "content": answer})
        yield {"messages": [system, *turns], "source": "tomeforge_tools", "kind": kind}


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description="Print generated tool-use conversations as JSONL.")
    parser.add_argument("--rows", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=int, default=3407, help="the same seed gives the same rows")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print rows as JSON lines."""
    arguments = build_parser().parse_args(argv)
    if arguments.rows < 1:
        raise CommandError(f"--rows: got {arguments.rows}, expected at least 1")
    corpus = Corpus.of(sample_conversations())
    for row in generate_conversations(arguments.rows, arguments.seed, corpus):
        print(json.dumps(row, ensure_ascii=False))
    return OK


if __name__ == "__main__":
    run_command(main)
