"""An interpreter of the part of Go's text/template that Modelfiles use here, written for tests only.

Text, values, `range` with an index, `if` / `else if` / `else`, and a few functions; everything else,
trim markers included, is an error. Neither Go nor Ollama is needed, and neither was run.
"""

import re
from collections.abc import Iterator
from typing import Any


def parse_go(tokens: Iterator[str]) -> tuple[list[Any], str]:
    """Give the nodes up to an `else` or `end`, and that word with its arguments."""
    nodes: list[Any] = []
    for token in tokens:
        if not token.startswith("{{"):
            nodes.append(token)
            continue
        action = token[2:-2].strip()
        word, _, rest = action.partition(" ")
        if word in ("else", "end"):
            return nodes, action
        if word in ("if", "range"):
            nodes.append((word, *parse_branch(tokens, rest)))
        else:
            nodes.append(("value", action))
    return nodes, "EOF"


def parse_branch(tokens: Iterator[str], condition: str) -> tuple[str, list[Any], list[Any]]:
    then, stop = parse_go(tokens)
    if stop.startswith("else if "):
        return condition, then, [("if", *parse_branch(tokens, stop.removeprefix("else if ")))]
    otherwise: list[Any] = []
    if stop == "else":
        otherwise, stop = parse_go(tokens)
    assert stop == "end", f"unclosed: {condition}"
    return condition, then, otherwise


def evaluate(text: str, scope: dict[str, Any]) -> Any:
    words = re.findall(r'"[^"]*"|[()]|[^\s()]+', text)

    def term() -> Any:
        word = words.pop(0)
        if word == "(":
            value = call()
            assert words.pop(0) == ")"
            return value
        if word.startswith('"'):
            return word[1:-1]
        if word.isdigit():
            return int(word)
        if word.startswith("$."):
            return scope["root"][word[2:]]
        if word.startswith("$"):
            return scope[word]
        assert word.startswith("."), f"not in the part of Go used here: {word}"
        return scope["dot"][word[1:]]

    def call() -> Any:
        function = words.pop(0) if words[0] in FUNCTIONS else None
        arguments = []
        while words and words[0] != ")":
            arguments.append(term())
        return FUNCTIONS[function](*arguments) if function else arguments[0]

    value = call()
    assert not words
    return value


FUNCTIONS: dict[str | None, Any] = {
    "eq": lambda a, b: a == b,
    "and": lambda a, b: a and b,
    "not": lambda a: not a,
    "len": len,
    "slice": lambda items, start: items[start:],
}


def execute(nodes: list[Any], scope: dict[str, Any]) -> str:
    parts: list[str] = []
    for node in nodes:
        if isinstance(node, str):
            parts.append(node)
        elif node[0] == "value":
            parts.append(evaluate(node[1], scope))
        elif node[0] == "if":
            parts.append(execute(node[2] if evaluate(node[1], scope) else node[3], scope))
        else:
            names, _, items = node[1].partition(" := ")
            index, _ = names.split(", ")
            for place, item in enumerate(evaluate(items, scope)):
                parts.append(execute(node[2], {**scope, "dot": item, index: place}))
    return "".join(parts)


def run_go(template: str, messages: list[dict[str, str]]) -> str:
    """Execute a template as Ollama does, with `.System` and `.Messages`."""
    assert "{{-" not in template, "trim markers are not in the part of Go used here"
    nodes, stop = parse_go(iter(re.split(r"(\{\{.*?\}\})", template)))
    assert stop == "EOF", "unexpected end"
    system = "\n\n".join(turn["content"] for turn in messages if turn["role"] == "system")
    turns = [{"Role": turn["role"], "Content": turn["content"]} for turn in messages]
    root = {"System": system, "Messages": turns}
    return execute(nodes, {"root": root, "dot": root})
