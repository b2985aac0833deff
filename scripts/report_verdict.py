"""Did the model get better? The figures of ``evaluation.json`` as one sentence, and what it rests on."""

from typing import Any

from scripts.report_blocks import BAD, GOOD, OPEN, Cell
from scripts.report_numbers import decimal, interval, p_value, percent, plural, signed

BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
SIGNIFICANT = 0.05
_TEXT, _PROMPTS = "on unseen text", "at following instructions"


def judge_loss(change: dict[str, Any]) -> str:
    """Judge the change of the held-out loss: certain where its 95 % interval leaves out 0."""
    ends = change.get("loss_95")
    if ends is None or ends[0] <= 0 <= ends[1]:
        return UNDECIDED
    return BETTER if ends[1] < 0 else WORSE


def judge_prompts(comparison: dict[str, Any] | None) -> str | None:
    """Judge wins against losses on the prompts by the sign test; None if none was answered."""
    if comparison is None:
        return None
    p = comparison.get("p_value")
    if p is None or p >= SIGNIFICANT:
        return UNDECIDED
    return BETTER if comparison["wins"] > comparison["losses"] else WORSE


def main_comparison(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    """Choose the comparison that the verdict is about: base against tuned, in one format if possible."""
    comparisons = evaluation.get("comparisons") or []
    kinds = {name: one["kind"] for name, one in evaluation["contenders"].items()}
    alike = [one for one in comparisons if kinds.get(one["from"]) == kinds.get(one["to"])]
    return next(iter([*alike, *comparisons]), None)


def headline(loss: str, prompts: str | None) -> Cell:
    """Say it in one sentence."""
    marks = {BETTER: GOOD, WORSE: BAD, UNDECIDED: OPEN}
    if prompts is None or loss == prompts:
        places = _TEXT if prompts is None else f"{_TEXT} and {_PROMPTS}"
        if loss == UNDECIDED:
            nowhere = _TEXT if prompts is None else f"neither {_TEXT} nor {_PROMPTS}"
            return Cell(f"Undecided: no certain change, {nowhere}.", mark=OPEN)
        return Cell(f"The model got {loss} {places}.", mark=marks[loss])
    if UNDECIDED not in (loss, prompts):
        return Cell(f"The model got {loss} {_TEXT}, but {prompts} {_PROMPTS}.", mark=OPEN)
    if loss == UNDECIDED:
        text = f"The model got {prompts} {_PROMPTS}; {_TEXT} there is no certain change."
        return Cell(text, mark=marks[prompts])
    text = f"The model got {loss} {_TEXT}; {_PROMPTS} there is no certain change."
    return Cell(text, mark=marks[loss])


def loss_sentence(evaluation: dict[str, Any]) -> str:
    """Say what became of the held-out loss, and how sure that is."""
    change, base, tuned = (evaluation[key] for key in ("change", "base", "tuned"))
    moved = "fell" if change["loss"] < 0 else "rose" if change["loss"] > 0 else "stayed"
    text = (
        f"Held-out loss {moved} from {decimal(base['loss'], 3)} to {decimal(tuned['loss'], 3)} nats"
    )
    text += f" per answer token: {signed(change['loss'], 3)}"
    if (ends := change.get("loss_95")) is not None:
        holds = "includes 0" if ends[0] <= 0 <= ends[1] else "leaves out 0"
        text += f", and the 95 % interval {interval(ends, 3)} {holds}"
    rows = plural(change["rows"], "conversation")
    return f"{text}. It is lower in {change['rows_better']} of {rows}."


def prompts_sentence(comparison: dict[str, Any] | None) -> str | None:
    """Say how many prompts were won and lost, and whether that could be chance."""
    if comparison is None:
        return None
    wins, ties, losses = (comparison[key] for key in ("wins", "ties", "losses"))
    sure = {UNDECIDED: "may be chance", BETTER: "more than chance", WORSE: "more than chance"}
    reading = sure[judge_prompts(comparison) or UNDECIDED]
    return (
        f"Of {plural(wins + ties + losses, 'instruction prompt')} it follows more rules in {wins}, "
        f"fewer in {losses} and as many in {ties} (p {p_value(comparison.get('p_value'))}, {reading})."
    )


def answers_sentence(evaluation: dict[str, Any], comparison: dict[str, Any] | None) -> str | None:
    """Say how the answers end, which no loss shows."""
    if comparison is None:
        return None
    names = comparison["from"], comparison["to"]
    styles = [evaluation["contenders"][name].get("style") for name in names]
    if not all(styles):
        return None
    ended, looping = (
        " → ".join(percent(style[key]["share"]) for style in styles) for key in ("ended", "looping")
    )
    return f"Answers that end by themselves: {ended}. Answers that end in a loop: {looping}."


def verdict(evaluation: dict[str, Any]) -> tuple[Cell, list[str]]:
    """Give the verdict and the sentences under it."""
    comparison = main_comparison(evaluation)
    sentences = [
        loss_sentence(evaluation),
        prompts_sentence(comparison),
        answers_sentence(evaluation, comparison),
    ]
    said = headline(judge_loss(evaluation["change"]), judge_prompts(comparison))
    return said, [sentence for sentence in sentences if sentence]
