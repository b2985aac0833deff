"""The report of a run: did the model get better, and everything that is known about it.

Reads the files of the run's folder, writes ``report.html`` (one page that asks nothing of any other
place), ``report.md`` with the same content, and ``quantization.svg``.

    python -m scripts.report --config scripts/recipes/smollm2-135m-cpu.yaml
"""

import argparse
import base64
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts._cli import OK, log, run_command
from scripts.metrics import has_losses, plot_loss
from scripts.recipe import TrainingRecipe, parse_recipe, write_atomically
from scripts.report_blocks import OPEN, UNKNOWN, Block, Cell, Head, Hint, KeyFigure, Section
from scripts.report_facts import command_blocks, data_blocks, provenance_blocks, training_blocks
from scripts.report_files import (
    certificate_blocks,
    exported_files,
    file_blocks,
    smallest_passing,
)
from scripts.report_numbers import decimal, duration, percent, size
from scripts.report_pictures import Point, Variants, loss_picture, quantization_picture
from scripts.report_run import RunFiles, adapter_hash, expected_form
from scripts.report_scores import before_and_after, compared_names, side_by_side, tool_scores
from scripts.report_verdict import verdict

_TEMPLATES = Path(__file__).parent / "templates"


def read_head(run: RunFiles) -> Head:
    """Say whether the model got better, and give the key figures."""
    evaluation = run.evaluation
    said, sentences = Cell("Not evaluated yet.", mark=OPEN), list[str]()
    hints = []
    if evaluation is None:
        hints.append(run.evaluation_hint())
    else:
        said, sentences = verdict(evaluation)
        now = adapter_hash(run)
        if now is not None and evaluation.get("adapter_sha256") not in (None, now):
            text = (
                "The adapter has changed since it was evaluated; these figures are of the old one."
            )
            hints.append(Hint(text, run.command("scripts.evaluate_model")))
    provenance = run["provenance"] or {}
    base = (run["export"] or {}).get("base_model") or (evaluation or {}).get("base_model")
    base = base or provenance.get("base_model", {}).get("name")
    base = base or run.trained_recipe.get("model_name_or_path", UNKNOWN)
    return Head(run.recipe.run_name, base, said, sentences, _key_figures(run), hints)


def _key_figures(run: RunFiles) -> list[KeyFigure]:
    figures = []
    if evaluation := run.evaluation:
        before, after = (decimal(evaluation[key]["perplexity"], 2) for key in ("base", "tuned"))
        figures.append(KeyFigure("held-out perplexity", after, "lower is better", before))
        if names := compared_names(evaluation):
            shares = [evaluation["contenders"][name]["ifeval"]["prompt_strict"] for name in names]
            before, after = (percent(share["share"]) for share in shares)
            note = f"{shares[0]['hits']} → {shares[1]['hits']} of {shares[1]['total']} prompts"
            figures.append(KeyFigure("every rule followed", after, note, before))
    if run.adapter_path.is_file():
        rank = (run["adapter"] or {}).get("r")
        note = f"rank {rank}" if rank else ""
        figures.append(KeyFigure("adapter", size(run.adapter_path.stat().st_size), note))
    if file := smallest_passing(exported_files(run)):
        note = file.export["type"]
        if (speed := file.measured.get("tokens_per_second")) is not None:
            note += f", {decimal(speed, 0)} tokens/s"
        figures.append(KeyFigure("smallest file that passed", size(file.export["bytes"]), note))
    if training := (run["provenance"] or {}).get("training"):
        note = f"{training['steps']:,} steps"
        figures.append(KeyFigure("training", duration(training["seconds"]), note))
    return figures


def read_sections(run: RunFiles) -> list[Section]:
    """Give every section; one without its file holds the command that writes it."""
    evaluation = run.evaluation
    with expected_form(run.run_dir / "evaluation.json"):
        scores: list[Block] = [run.evaluation_hint()]
        answers = scores
        if evaluation:
            scores, answers = before_and_after(evaluation), side_by_side(evaluation)
    with expected_form(run.run_dir / "provenance.json"):
        training, provenance = training_blocks(run), provenance_blocks(run)
    with expected_form(run.run_dir / "data" / "report.json"):
        data = data_blocks(run)
    with expected_form(run.run_dir / "gguf" / "export.json"):
        commands = command_blocks(run)
    with expected_form(run.run_dir / "gguf" / "certificate.json"):
        files, certificates = file_blocks(run), certificate_blocks(run)
    sections = [
        Section("scores", "Before and after", scores),
        Section("answers", "Answers side by side", answers),
        Section("training", "Training", training),
        Section("data", "Data", data),
        *_tool_section(run),
        Section("files", "Files", files),
        Section("certificate", "Certificate", certificates),
        Section("provenance", "Provenance", provenance),
        Section("run", "How to run it", commands),
    ]
    return sections


def _tool_section(run: RunFiles) -> list[Section]:
    """Show tool calls of a run that was trained on them or was asked for them."""
    tools = run["tools"]
    if tools and run.is_of_this_adapter("tools_evaluation.json"):
        with expected_form(run.run_dir / "tools_evaluation.json"):
            return [Section("tools", "Tool use", tool_scores(tools))]
    if not tools and not run.trained_recipe.get("tool_rows"):
        return []
    text = "It was trained on tool calls, and not measured on them yet."
    if tools:
        text = "The adapter has changed since its tool calls were measured."
    return [Section("tools", "Tool use", [Hint(text, run.command("scripts.evaluate_tools"))])]


def read_pictures(run: RunFiles) -> dict[str, Variants]:
    """Draw what there is to draw."""
    pictures = {}
    if has_losses(run.metrics):
        pictures["loss"] = loss_picture(run.metrics)
    points = [
        Point(file.export["type"], file.export["bytes"], file.mean_kl, file.passed)
        for file in exported_files(run)
        if file.mean_kl is not None
    ]
    if points:
        pictures["quantization"] = quantization_picture(points)
    return pictures


def _data_url(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _markdown_cell(text: str) -> str:
    """Make a text safe inside a Markdown table or paragraph: it stays one line and plain text."""
    text = re.sub(r"([\\`*\[\]|~#$])|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _markdown_fence(text: str, language: str = "") -> str:
    """Put a text between fences that are longer than any in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


@functools.cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=jinja2.select_autoescape(("html.j2",), default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = {"data_url": _data_url, "cell": _markdown_cell, "fence": _markdown_fence}
    environment.filters.update(filters)
    return environment


def render(name: str, **content: Any) -> str:
    """Fill a template."""
    return str(_environment().get_template(name).render(**content))


def write_report(recipe: TrainingRecipe) -> Path:
    """Write the report of a run; return ``report.html``.

    Raises:
        CommandError: There is no such run, or a file of it cannot be read.
    """
    run = RunFiles(recipe)
    sections = read_sections(run)
    with expected_form(run.run_dir / "evaluation.json"):
        head = read_head(run)
    pictures = read_pictures(run)
    if "loss" in pictures and not (run.run_dir / "loss.png").is_file():
        plot_loss(run.run_dir / "metrics.jsonl", run.run_dir / "loss.png")
    if "quantization" in pictures:
        write_atomically(run.run_dir / "quantization.svg", pictures["quantization"].wide)
    content = {"head": head, "sections": sections, "pictures": pictures}
    write_atomically(run.run_dir / "report.md", render("report.md.j2", **content))
    output = run.run_dir / "report.html"
    write_atomically(output, render("report.html.j2", **content))
    log(f"report: {head.verdict.text}")
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and print its path."""
    parser = argparse.ArgumentParser(description="Report of a run: report.html and report.md.")
    recipe, _ = parse_recipe("", argv, parser)
    print(write_report(recipe))
    return OK


if __name__ == "__main__":
    run_command(main)
