"""What a run's files say about training, data and provenance, as blocks of a report."""

import json
from typing import Any

from scripts.report_blocks import UNKNOWN, Block, Cell, Code, Facts, Hint, Picture, Table, Text
from scripts.report_numbers import clean, count, decimal, duration, percent, plural
from scripts.report_run import PYTHON, RunFiles, adapter_hash, export_hint


def training_blocks(run: RunFiles) -> list[Block]:
    """Say what was trained, how, and how it went."""
    recipe = run.trained_recipe
    training = (run["provenance"] or {}).get("training")
    blocks: list[Block] = []
    if recipe:
        blocks.append(Facts(_recipe_pairs(recipe)))
    if training:
        blocks.append(Facts(_training_pairs(training)))
    if any(row.get("loss") is not None for row in run.metrics):
        alt = "Training loss, held-out loss and learning rate by optimizer step."
        blocks.append(Picture("loss", "loss.png", alt))
    if not (training and run.metrics):
        text = "There is no finished training here; train the run."
        blocks.append(Hint(text, run.command("scripts.train_lora")))
    return blocks


def _recipe_pairs(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    def get(key: str) -> Any:
        return recipe.get(key, UNKNOWN)

    scale = "rank-stabilised" if recipe.get("use_rslora") else "alpha / r"
    kind = "DoRA" if recipe.get("use_dora") else "LoRA"
    per_step = UNKNOWN
    if {"per_device_train_batch_size", "gradient_accumulation_steps"} <= recipe.keys():
        rows = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
        per_step = plural(rows, "row")
    steps = recipe.get("max_steps", -1)
    epochs = recipe.get("num_train_epochs", 1)
    length = f"{epochs:g} epoch{'' if epochs == 1 else 's'}"
    if steps > 0:
        length = f"at most {plural(steps, 'step')}"
    return [
        ("Data", str(get("dataset_name"))),
        ("Adapter", f"{kind} of rank {get('lora_r')}, alpha {get('lora_alpha')} ({scale})"),
        ("On", ", ".join(recipe.get("lora_target_modules", [UNKNOWN]))),
        (
            "Learning rate",
            f"{get('learning_rate')}, {get('lr_scheduler_type')}, {get('warmup_steps')} steps of warm-up",
        ),
        ("Batch", f"{per_step} a step, at most {get('max_length')} tokens a row"),
        ("Length", length),
        ("Base weights", "4-bit (NF4)" if recipe.get("load_in_4bit") else "16-bit"),
        ("Prompt format", str(get("prompt_format"))),
        ("Back end", str(get("backend"))),
        ("Seed", str(get("seed"))),
    ]


def _training_pairs(training: dict[str, Any]) -> list[tuple[str, str]]:
    seconds, tokens = training["seconds"], training["tokens"]
    speed = f", {count(round(tokens / seconds))} a second" if seconds else ""
    steps = count(training["steps"])
    best = training.get("best_step")
    kept = UNKNOWN if best is None else f"the one after step {count(best)} of {steps}"
    if best is not None and best < training["steps"]:
        kept += "; held-out loss rose after it"
    pairs = [
        ("Took", f"{duration(seconds)} on {plural(training['devices'], 'device')}"),
        ("Steps", steps),
        ("Tokens", f"{count(tokens)}{speed}"),
        ("Mean training loss", decimal(training["loss"], 3)),
        ("Held-out loss while training", decimal(training.get("held_out_loss"), 3)),
        ("Adapter kept", kept),
        ("Padding", percent(training.get("padding"))),
    ]
    if encoded := training.get("encoded"):
        cut = f"{count(encoded['cut_rows'])} cut, {count(encoded['dropped_too_long'])} too long"
        pairs.insert(2, ("Rows", f"{count(encoded['kept'])} of {count(encoded['rows'])} ({cut})"))
        pairs.insert(4, ("Tokens learned from", count(encoded["trained_tokens"])))
    if training.get("resumed_from"):
        pairs.append(("Resumed", f"from step {count(training['resumed_from'])}"))
    if training.get("skipped_steps"):
        pairs.append(("Steps skipped", count(training["skipped_steps"])))
    return pairs


def data_blocks(run: RunFiles) -> list[Block]:
    """Say what was read, left out and repaired, and what the rows are like."""
    report = run["data"]
    if report is None:
        text = "There is no data/report.json; prepare the data."
        return [Hint(text, run.command("scripts.prepare_data"))]
    filters = report.get("filters", {})
    chosen = [f"{key.replace('_', ' ')} {value}" for key, value in filters.items() if value]
    pairs = [
        ("Data set", report["dataset"]),
        ("Rows read", count(report["rows_read"])),
        ("For training", plural(report["train_rows"], "conversation")),
        ("Held out", plural(report["eval_rows"], "conversation")),
    ]
    if report.get("tool_rows"):
        tool_rows = f"{count(report['tool_rows'])} for training"
        tool_rows += f", {count(report.get('eval_tool_rows', 0))} held out"
        pairs.append(("Generated tool conversations", tool_rows))
    pairs += [
        (name.capitalize(), f"median {count(part['median'])}, at most {count(part['max'])}")
        for name, part in (("turns", report.get("turns")), ("characters", report.get("characters")))
        if part
    ]
    pairs += [("Chosen by", ", ".join(chosen))] if chosen else []
    pairs += [("Unreadable lines", count(report.get("unreadable_rows", 0)))]
    blocks: list[Block] = [Facts(pairs)]
    for column, key in (("left out, because", "left_out"), ("repaired", "repaired")):
        counts = report.get(key) or {}
        if counts:
            blocks.append(_count_table(column, counts, report["rows_read"]))
    if sources := report.get("sources"):
        blocks.append(_count_table("source of training rows", sources, report["train_rows"]))
    if not (report.get("left_out") or report.get("repaired")):
        blocks.append(Text("No row was left out or repaired.", is_small=True))
    return blocks


def _count_table(label: str, counts: dict[str, int], total: int) -> Table:
    rows = [
        [Cell(name), Cell(count(number)), Cell(percent(number / total), share=number / total)]
        for name, number in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if total
    ]
    return Table([label, "rows", "share"], rows)


def provenance_blocks(run: RunFiles) -> list[Block]:
    """Say what the run was made from and with."""
    provenance = run["provenance"]
    evaluation = run.evaluation or {}
    pairs: list[tuple[str, str]] = []
    if provenance:
        base, data = provenance["base_model"], provenance["dataset"]
        training = provenance.get("training", {})
        pairs += [
            ("Base model", (run["export"] or {}).get("base_model", base["name"])),
            ("Read from", base["name"]),
            ("Revision", base["revision"]),
            ("Fingerprint of its weights", base["fingerprint"]),
            ("Hash of the data's inputs", data["input_hash"]),
            ("Hash of the training", training.get("hash", UNKNOWN)),
            ("Seed", str(training.get("seed", UNKNOWN))),
        ]
    pairs += [("SHA-256 of the adapter", found)] if (found := adapter_hash(run)) else []
    pairs += [("Licence", licence)] if (licence := _licence(run)) else []
    pairs += [("Commit", evaluation["commit"])] if evaluation.get("commit") else []
    if machine := evaluation.get("machine"):
        memory = f"{machine['memory_bytes'] / 2**30:.1f}\N{NO-BREAK SPACE}GiB memory"
        cores = plural(machine["cores"], "core")
        parts = [machine["cpu"], cores, memory, machine.get("gpu") or "no GPU"]
        pairs.append(("Evaluated on", ", ".join(parts)))
    versions = {**(provenance or {}).get("versions", {}), **evaluation.get("versions", {})}
    if versions:
        pairs.append(("Versions", ", ".join(f"{name} {value}" for name, value in versions.items())))
    blocks: list[Block] = [Facts(pairs)] if pairs else []
    if not provenance:
        text = "There is no provenance.json; training writes it."
        blocks.append(Hint(text, run.command("scripts.train_lora")))
    return blocks


def _licence(run: RunFiles) -> str | None:
    """Read the licence from the head of the export's model card."""
    card = run.run_dir / "gguf" / "README.md"
    if not card.is_file():
        return None
    for line in card.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key == "license" and value.strip():
            return str(clean(value.strip()))
    return None


def command_blocks(run: RunFiles) -> list[Block]:
    """Give the commands that run this model."""
    if not run.exported:
        text = "There is no GGUF file to run yet; export the adapter."
        return [export_hint(run, text)]
    # The type that the model card begins with: hardly different from the adapter, half the size.
    names = list(run.exported)
    name = next((one for one in names if run.exported[one]["type"] == "Q8_0"), names[0])
    gguf = run.path(f"gguf/{name}")
    chat = f"{PYTHON} -m integration.chat --model {gguf}"
    ask = f'{PYTHON} -m integration.ask --model {gguf} "Explain recursion with an example."'
    python = (
        "from integration.chat_model import TomeforgeChat\n\n"
        f"model = TomeforgeChat.from_file({json.dumps(str(run.run_dir / 'gguf' / name))})\n"
        'print(model.invoke("Explain recursion with an example.").content)'
    )
    return [
        Code("Talk to it", "bash", chat),
        Code("Ask once, in a shell pipeline", "bash", ask),
        Code("From LangChain", "python", python),
    ]
