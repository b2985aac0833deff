"""Adapters over one base: ours against reading prompts anew, and against a merged model for each.

    python -m scripts.benchmark adapters            # on what make adapters built

What is compared, in turn, on the same conversation:

- the wait for the first token after switching to an adapter that has read the conversation already,
  against the same wait when the prompt is read anew (which is what a switch costs where the cache is
  cleared), and against loading base and adapter anew;
- decoding, tokens per second: the plain base, base and adapter, the adapter merged into its base;
- memory of one process with 1, 3 and 8 adapters, against as many merged models side by side;
- logits of base and adapter in F16 against those of the merged F16 file.

Our side runs in processes of its own, for `scripts` imports nothing of `integration`.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts._cli import MODEL, CommandError, log
from scripts.adapter_scores import SPECIALITIES
from scripts.benchmark_chat import SENTENCE, run_child
from scripts.evaluate_adapters import ADAPTER_GLOB, BASE_GLOB, OUTPUTS_DIR, find_newest
from scripts.machine import usable_threads

RUN = "outputs/smollm2-135m-{}-cpu"
COUNTS = (1, 3, 8)
SWITCH_TARGET, RELOAD_TARGET, MEMORY_TARGET, MERGED_TARGET, DIVERGENCE_TARGET = 20, 20, 2, 1, 1e-4

_SETUP = """
import json, statistics, sys, time
from integration.adapters import Adapters
from integration.backend import Feed, run
from integration.decoding import Settings
from integration.models import load_gguf
from pathlib import Path

def first_token(model, ids):
    started = time.monotonic()
    number = model.engine.take_sequence()
    (row,) = model.engine.evaluate([(number, Feed(ids, is_prompt=True, continues=True))])
    logits = model.engine.logits(row).copy()
    model.engine.release_sequence(number)
    return time.monotonic() - started, logits

def load(n_sequences=1, path=None):
    return load_gguf(Path(path or job["base"]), job["n_ctx"], job["threads"], n_sequences)

job = json.load(sys.stdin)
"""

SWITCH = (
    _SETUP
    + """
model = load(4)
adapters = Adapters(model, {name: Path(file) for name, file in job["adapters"].items()})
names = [*job["adapters"], "base"]
ids = model.engine.tokenize(job["text"])[: job["tokens"]]
for name in names:
    adapters.use(name)
    first_token(model, ids)
switch, kept, anew, reloaded = [], [], [], []
for turn in range(job["repeats"]):
    for number, name in enumerate(names):
        started = time.perf_counter()
        adapters.use(name)
        switch.append(time.perf_counter() - started)
        kept.append(first_token(model, [*ids, 100 + turn])[0])
for name in names[: job["repeats"]]:
    adapters.use(name)
    model.engine.clear()
    anew.append(first_token(model, ids)[0])
    started = time.monotonic()
    other = load()
    if name != "base":
        Adapters(other, {name: Path(job["adapters"][name])}).use(name)
    first_token(other, ids)
    reloaded.append(time.monotonic() - started)
    other.engine.close()
print(json.dumps({
    "switch_us": 1e6 * statistics.median(switch), "kept_s": statistics.median(kept),
    "anew_s": statistics.median(anew), "reloaded_s": statistics.median(reloaded),
    "prompt_tokens": len(ids),
}))
"""
)

SPEED = (
    _SETUP
    + """
model, merged = load(4), load(path=job["merged"])
name, file = next(iter(job["adapters"].items()))
adapters = Adapters(model, {name: Path(file)})
speeds = {"base": [], "adapter": [], "merged": []}
request = [{"role": "user", "content": job["question"]}]
settings = Settings(max_tokens=job["answer"], seed=1)
for turn in range(job["repeats"]):
    for kind in list(speeds)[:: -1 if turn % 2 else 1]:
        answering = merged if kind == "merged" else model
        if kind != "merged":
            adapters.use(name if kind == "adapter" else "base")
        # Where an answer ends differs, so that a story is asked for and cut.
        answer = run(answering, answering.turn(request, settings)).answer
        if answer.completion_tokens > 8:
            speeds[kind].append(answer.tokens_per_second)
print(json.dumps({kind: statistics.median(values) if values else None for kind, values in speeds.items()}))
"""
)

LOGITS = (
    _SETUP
    + """
import numpy as np
model, merged = load(path=job["base_f16"]), load(path=job["merged_f16"])
name, file = next(iter(job["adapters"].items()))
Adapters(model, {name: Path(file)}).use(name)
ids = model.engine.tokenize(job["text"])[:128]
largest, divergences, same = 0.0, [], 0
for size in range(2, len(ids) + 1, 3):
    ours, theirs = (first_token(one, ids[:size])[1].astype(np.float64) for one in (model, merged))
    largest = max(largest, float(np.abs(ours - theirs).max()))
    a, b = (one - one.max() - np.log(np.exp(one - one.max()).sum()) for one in (theirs, ours))
    divergences.append(float((np.exp(a) * (a - b)).sum()))
    same += int(ours.argmax() == theirs.argmax())
print(json.dumps({"largest": largest, "divergence": statistics.mean(divergences),
                  "same": same / len(divergences)}))
"""
)

MEMORY = (
    _SETUP
    + """
import os
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
files = list(job["adapters"].values())
if job["merged"]:
    models = [load(path=job["merged"]) for _ in range(job["count"])]
    for model in models:
        first_token(model, model.engine.tokenize(job["text"])[:200])
else:
    model = load(min(4, job["count"] + 1))
    named = {f"a{at}": Path(files[at % len(files)]) for at in range(job["count"])}
    adapters = Adapters(model, named)
    for name in named:
        adapters.use(name)
        first_token(model, model.engine.tokenize(job["text"])[:200])
print(json.dumps({"resident": resident()}))
"""
)


def find_built() -> tuple[Path, dict[str, Path]]:
    """Find the base and the adapters that ``make adapters`` built.

    Raises:
        CommandError: Exit 3; they are not there.
    """
    base = find_newest(BASE_GLOB)
    adapters = {
        name: path
        for name in SPECIALITIES
        if (path := find_newest(ADAPTER_GLOB.format(name=name))) is not None
    }
    if base is None or not adapters:
        raise CommandError(
            f"there is no base '{OUTPUTS_DIR / BASE_GLOB}' with adapters beside it; build them: make adapters",
            MODEL,
        )
    return base, adapters


def _export(folder: Path, adapter_dir: Path) -> dict[str, str]:
    """Merge one adapter and export its base, in F16 and Q8_0; the files by name."""
    python = [sys.executable, "-m"]
    files = {}
    base_dir = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))[
        "base_model_name_or_path"
    ]
    for kind, command in {
        "merged": ["export.export_gguf", str(adapter_dir), "--quantization", "F16,Q8_0"],
        "base": ["export.export_base", base_dir, "--quantization", "F16"],
    }.items():
        output = ["--output", str(folder / kind), "--name", kind]
        run_child(command[0], [*python, *command, *output], "", folder)
        files[f"{kind}_f16"] = str(folder / kind / f"{kind}-F16.gguf")
    files["merged"] = str(folder / "merged" / "merged-Q8_0.gguf")
    return files


def judge_adapters(figures: Mapping[str, float]) -> list[dict[str, Any]]:
    """Compare figures with the targets."""

    def target(name: str, value: float, limit: float, at_least: bool = True) -> dict[str, Any]:
        met = value >= limit if at_least else value <= limit
        return {"name": name, "value": float(f"{value:.3g}"), "target": limit, "met": met}

    kept = figures["first_token_after_switch_s"]
    return [
        target("switch: prompt read anew / kept", figures["anew_s"] / kept, SWITCH_TARGET),
        target("switch: base loaded anew / kept", figures["reloaded_s"] / kept, RELOAD_TARGET),
        target(
            "memory: 8 merged models / base and 8 adapters",
            figures["merged_8_resident_mb"] / figures["adapters_8_resident_mb"],
            MEMORY_TARGET,
        ),
        target(
            "decode: merged / base and adapter",
            figures["decode_merged_tokens_per_second"]
            / figures["decode_adapter_tokens_per_second"],
            MERGED_TARGET,
        ),
        target(
            "KL divergence of base and adapter from merged, F16",
            figures["merged_kl_divergence"],
            DIVERGENCE_TARGET,
            at_least=False,
        ),
    ]


def benchmark_adapters(num_rounds: int, quick: bool = False) -> dict[str, Any]:
    """Measure everything in every round.

    Args:
        num_rounds: Medians are of so many.
        quick: Small amounts, for tests: no targets, for the figures say nothing.

    Returns:
        The object of the contract.

    Raises:
        CommandError: Exit 3; ``make adapters`` has not been run. Exit 1; a contender failed.
    """
    base, adapters = find_built()
    text = " ".join(f"{number}. {SENTENCE.strip()}" for number in range(80))
    job: dict[str, Any] = {
        "base": str(base),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "n_ctx": 2048,
        "threads": usable_threads(),
        "text": text,
        "tokens": 100 if quick else 900,
        "repeats": 2 if quick else 6,
        "answer": 16 if quick else 128,
        "question": "Write a long story about a lighthouse keeper who finds a map.",
    }
    first = next(iter(adapters))
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job |= _export(folder, Path(RUN.format(first), "adapter"))
        for number in range(num_rounds):
            rounds.append(_measure(job, folder))
            shown = ", ".join(f"{key} {value:.4g}" for key, value in rounds[-1].items())
            log(f"round {number + 1}/{num_rounds}: {shown}")
    figures = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return {
        "benchmark": "adapters",
        "metrics": {
            **{key: float(f"{value:.4g}") for key, value in figures.items()},
            "threads": job["threads"],
            "rounds": num_rounds,
        },
        "targets": [] if quick else judge_adapters(figures),
    }


def _measure(job: Mapping[str, Any], folder: Path) -> dict[str, float]:
    def child(what: str, code: str, **more: Any) -> dict[str, Any]:
        command = [sys.executable, "-c", code]
        answer: dict[str, Any] = json.loads(
            run_child(what, command, json.dumps({**job, **more}), folder / "cache")
        )
        return answer

    switch = child("switching", SWITCH)
    speed = child("decoding", SPEED)
    logits = child("comparing logits", LOGITS)
    figures = {
        "switch_us": switch["switch_us"],
        "first_token_after_switch_s": switch["kept_s"],
        "anew_s": switch["anew_s"],
        "reloaded_s": switch["reloaded_s"],
        "prompt_tokens": switch["prompt_tokens"],
        **{f"decode_{kind}_tokens_per_second": value for kind, value in speed.items()},
        "merged_largest_logit_difference": logits["largest"],
        "merged_kl_divergence": logits["divergence"],
        "merged_same_likeliest_token": logits["same"],
    }
    for count in COUNTS:
        ours = child("adapters in memory", MEMORY, count=count, merged="")
        usual = child("merged models in memory", MEMORY, count=count)
        figures[f"adapters_{count}_resident_mb"] = ours["resident"] / 1e6
        figures[f"merged_{count}_resident_mb"] = usual["resident"] / 1e6
    return figures
