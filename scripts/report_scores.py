"""What ``evaluation.json`` measured, as blocks of a report: base and tuned, answers, tool calls."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.ask_model import spread
from scripts.report_blocks import (
    BAD,
    GOOD,
    OPEN,
    UNKNOWN,
    Answer,
    Answers,
    Block,
    Cell,
    Table,
    Text,
)
from scripts.report_numbers import (
    decimal,
    interval,
    p_value,
    percent,
    plural,
    share_cell,
    size,
)
from scripts.report_verdict import SIGNIFICANT, main_comparison

SHOWN_PROMPTS = 12
_OUTCOMES = {"win": GOOD, "loss": BAD, "tie": ""}
Measured = dict[str, Any]


def _loss_cell(one: Measured, key: str, digits: int) -> Cell:
    loss = one.get("loss")
    if not loss:
        return Cell(UNKNOWN)
    return Cell(decimal(loss[key], digits), interval(loss.get(f"{key}_95"), digits))


def _share(part: str, key: str, loosely: str = "") -> Callable[[Measured], Cell]:
    def cell(one: Measured) -> Cell:
        found = one.get(part) or {}
        return share_cell(found.get(key), found.get(loosely))

    return cell


def _style(key: str, show: Callable[[float], str]) -> Callable[[Measured], Cell]:
    def cell(one: Measured) -> Cell:
        value = (one.get("style") or {}).get(key)
        return Cell(UNKNOWN if value is None else show(value))

    return cell


def _plain(key: str, show: Callable[[float], str]) -> Callable[[Measured], Cell]:
    def cell(one: Measured) -> Cell:
        value = one.get(key)
        return Cell(UNKNOWN if value is None else show(value))

    return cell


# Measure, which direction is better, and how a contender's cell is made.
_MEASURES: list[tuple[str, str, Callable[[Measured], Cell]]] = [
    ("Held-out loss", "lower", lambda one: _loss_cell(one, "loss", 3)),
    ("Held-out perplexity", "lower", lambda one: _loss_cell(one, "perplexity", 2)),
    ("Every rule followed", "higher", _share("ifeval", "prompt_strict", "prompt_loose")),
    (
        "Single rules followed",
        "higher",
        _share("ifeval", "instruction_strict", "instruction_loose"),
    ),
    ("Ended by itself", "higher", _share("style", "ended")),
    ("Clean format", "higher", _share("style", "clean")),
    ("Empty answers", "lower", _share("style", "empty")),
    ("Looping at the end", "lower", _share("style", "looping")),
    ("Repeated 4-grams", "lower", _style("repeated_4grams", percent)),
    ("Distinct word pairs", "higher", _style("distinct_2", percent)),
    ("Mean length", "tokens", _style("tokens_mean", lambda value: decimal(value, 0))),
    ("Median length", "words", _style("words_median", lambda value: decimal(value, 0))),
    ("Speed", "tokens/s", _plain("tokens_per_second", lambda value: decimal(value, 1))),
    ("Peak memory", "", _plain("peak_memory_bytes", size)),
]


def before_and_after(evaluation: dict[str, Any]) -> list[Block]:
    """Compare every contender in every measure."""
    contenders = evaluation["contenders"]
    rows = []
    for label, better, make in _MEASURES:
        cells = [make(one) for one in contenders.values()]
        if any(cell.text != UNKNOWN for cell in cells):
            note = f"{better} is better" if better in ("lower", "higher") else better
            rows.append([Cell(label, note), *cells])
    held_out = evaluation["base"]
    explained = (
        f"Loss in nats per answer token over {plural(held_out['tokens'], 'token')} of "
        f"{plural(held_out['rows'], 'conversation')} ({Path(evaluation['held_out_file']).name}). "
        "Under each figure its 95 % interval. The interval of a change, at the top, is narrower: there "
        "each conversation is compared with itself."
    )
    fewer = [
        f"{name} on {plural(one['loss']['rows'], 'conversation')}"
        for name, one in contenders.items()
        if one["loss"]["rows"] < held_out["rows"]
    ]
    if fewer:
        explained += f" For time, measured on fewer of them: {', '.join(fewer)}."
    if ifeval := evaluation.get("ifeval"):
        explained += (
            f" {plural(ifeval['asked'], 'prompt')} with rules that a program can check, answers of at "
            f"most {ifeval['answer_tokens']} tokens, {ifeval['decoding']} decoding. In brackets: judged "
            "loosely, without the first or last line and without Markdown stars."
        )
    blocks: list[Block] = [Table(["", *contenders], rows), Text(explained, is_small=True)]
    return [*blocks, *_win_table(evaluation), *_rule_table(evaluation)]


def _win_table(evaluation: dict[str, Any]) -> list[Block]:
    rows = []
    for one in evaluation.get("comparisons") or []:
        p = one.get("p_value")
        if p is None or p >= SIGNIFICANT:
            reading = Cell("may be chance", mark=OPEN)
        elif one["wins"] > one["losses"]:
            reading = Cell("better", mark=GOOD)
        else:
            reading = Cell("worse", mark=BAD)
        counts = [Cell(str(one[key])) for key in ("wins", "ties", "losses")]
        sign = Cell(p_value(p).removeprefix("= "))
        rows.append([Cell(f"{one['from']} → {one['to']}"), reading, *counts, sign])
    columns = ["more rules followed", "reading", "wins", "ties", "losses", "p"]
    caption = "Prompt by prompt (exact two-sided sign test over wins and losses)"
    return [Table(columns, rows, caption)] if rows else []


def _rule_table(evaluation: dict[str, Any]) -> list[Block]:
    names = compared_names(evaluation)
    if names is None:
        return []
    measured = [evaluation["contenders"][name].get("ifeval") for name in names]
    if not all(measured):
        return []
    base, tuned = (one["groups"] for one in measured)
    kinds = sorted(base, key=lambda kind: (-base[kind]["total"], kind))
    rows = []
    for kind in kinds:
        cells = [
            Cell(percent(one["share"]), f"{one['hits']} of {one['total']}", share=one["share"])
            for one in (base[kind], tuned[kind])
            if one["share"] is not None
        ]
        if len(cells) == len(names):
            rows.append([Cell(_words(kind)), *cells])
    return [Table(["kind of rule", *names], rows, "Rules followed, by their kind")] if rows else []


def compared_names(evaluation: dict[str, Any]) -> tuple[str, str] | None:
    """Name the two contenders whose answers stand side by side; None if none answered."""
    if comparison := main_comparison(evaluation):
        return comparison["from"], comparison["to"]
    return None


def _words(name: str) -> str:
    """Turn ``length_constraints:number_words`` into words."""
    return name.replace(":", ": ").replace("_", " ")


def _outcome(prompt: dict[str, Any], names: Sequence[str]) -> str:
    base, tuned = (sum(prompt["answers"][name]["followed"]) for name in names)
    return "win" if tuned > base else "loss" if tuned < base else "tie"


def choose_prompts(
    prompts: Sequence[dict[str, Any]], names: Sequence[str], limit: int = SHOWN_PROMPTS
) -> dict[str, list[dict[str, Any]]]:
    """Choose prompts by their outcome, in proportion, and at least one of each there is.

    Of each outcome they are spread evenly over the file, so nobody picked them.
    """
    by_outcome: dict[str, list[dict[str, Any]]] = {outcome: [] for outcome in _OUTCOMES}
    for prompt in prompts:
        if all(name in prompt["answers"] for name in names):
            by_outcome[_outcome(prompt, names)].append(prompt)
    total = sum(map(len, by_outcome.values()))
    if total <= limit:
        return by_outcome
    exact = {outcome: limit * len(some) / total for outcome, some in by_outcome.items()}
    counts = {
        outcome: max(int(part), min(1, len(by_outcome[outcome]))) for outcome, part in exact.items()
    }
    while sum(counts.values()) != limit:
        step = 1 if sum(counts.values()) < limit else -1
        # The outcome that is furthest from its part gives or takes one, but keeps its one.
        open_ones = [one for one in counts if step > 0 or counts[one] > 1]
        nearest = max(open_ones, key=lambda one: step * (exact[one] - counts[one]))
        counts[nearest] += step
    return {
        outcome: spread(some, counts[outcome]) if some else []
        for outcome, some in by_outcome.items()
    }


def _rule_cells(prompt: dict[str, Any], answer: dict[str, Any]) -> list[Cell]:
    cells = []
    for rule, strictly, loosely in zip(
        prompt["rules"], answer["followed"], answer["loosely"], strict=True
    ):
        said = "followed" if strictly else "followed loosely" if loosely else "not followed"
        cells.append(Cell(said, _words(rule), GOOD if strictly else OPEN if loosely else BAD))
    return cells


def _answer(name: str, prompt: dict[str, Any]) -> Answer:
    answer = prompt["answers"][name]
    end = "" if answer["ended"] else ", cut off"
    note = plural(answer["tokens"], "token") + end
    return Answer(name, answer["text"], note, _rule_cells(prompt, answer))


def side_by_side(evaluation: dict[str, Any]) -> list[Block]:
    """Show the fixed questions and a choice of the prompts with both answers."""
    blocks: list[Block] = [
        Answers(one["question"], [Answer("base", one["base"]), Answer("tuned", one["tuned"])])
        for one in evaluation["answers"]
    ]
    names = compared_names(evaluation)
    prompts = evaluation.get("prompts") or []
    if names is None or not prompts:
        return blocks
    chosen = choose_prompts(prompts, names)
    everything = [
        _outcome(one, names) for one in prompts if all(n in one["answers"] for n in names)
    ]
    plurals = {"win": "wins", "loss": "losses", "tie": "ties"}
    counts = ", ".join(
        f"{len(some)} of {everything.count(outcome)} {plurals[outcome]}"
        for outcome, some in chosen.items()
    )
    blocks.append(
        Text(
            f"Prompts with rules, {names[0]} against {names[1]}; a win is more rules followed. Shown are "
            f"{counts}, spread evenly over the file. Every answer is in evaluation.json.",
        )
    )
    for outcome, some in chosen.items():
        cell = Cell(outcome, mark=_OUTCOMES[outcome])
        blocks += [
            Answers(one["prompt"], [_answer(name, one) for name in names], cell) for one in some
        ]
    return blocks


def tool_scores(tools: dict[str, Any]) -> list[Block]:
    """Show how often tools were called rightly: what ``tools_evaluation.json`` says."""
    measures = {
        "right choice": "choice",
        "exact call": "exact",
        "false calls": "false_calls",
        "missed calls": "missed_calls",
    }
    rows = []
    for name, one in tools["contenders"].items():
        scores = one["scores"]
        rows.append([Cell(name), *(share_cell(scores[key]) for key in measures.values())])
    explained = (
        f"{plural(tools['requests']['asked'], 'request')}, greedy decoding, no call is run. Right choice: "
        "the right tool, or rightly none. Exact call: the right tool with equal arguments, of the "
        "requests that expect a call. False calls: a call where none is right. Missed calls: none where "
        "one is right. Under each figure its 95 % interval."
    )
    return [Table(["contender", *measures], rows), Text(explained, is_small=True)]
