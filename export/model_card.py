"""The model card beside the GGUF files: what it is made of, what each file costs and keeps.

In: the run's facts, export.json's files, the chat format, the certificate. Out: `README.md`.
"""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from export.gguf_metadata import TAGS
from export.modelfile import ChatFormat, find_turn_format, render_chat
from export.run_facts import HeldOut, LoraSettings, RunFacts, TrainingSettings

Files = Mapping[str, Mapping[str, Any]]
# Below this, "Q4_K_M" is what its name says; above, most matrices fell back to other types.
_TRUE_Q4_BITS = 5.3
_QUESTION = "What is a tome?"
_NONE = "–"


def recommended_file(files: Files) -> str:
    """Choose the file to begin with: a true 4-bit one, else Q8_0, else the smallest."""
    by_type = {entry["type"]: name for name, entry in files.items()}
    q4 = by_type.get("Q4_K_M")
    if q4 and files[q4]["bits_per_weight"] < _TRUE_Q4_BITS:
        return q4
    return by_type.get("Q8_0") or min(files, key=lambda name: files[name]["bytes"])


def model_card(
    facts: RunFacts, files: Files, chat: ChatFormat, certificate: Mapping[str, Any] | None = None
) -> str:
    """Write the model card.

    Args:
        facts: Of the run; what was not recorded is not told.
        files: export.json's `files`: whole models, at least one.
        chat: What training wrote.
        certificate: certificate.json; an entry counts only for a file with the same sha256.
    """
    best = recommended_file(files)
    title = best.removesuffix(f"-{files[best]['type']}.gguf").removesuffix(".gguf")
    parts = [
        f"---\n{_front_matter(facts)}---",
        f"# {_text(title)}",
        _summary(facts, chat),
        _bullets(facts),
        "## Files",
        _table(files, certificate),
        *_notes(files, certificate, best),
        *_prompt_format(chat),
        "## Run it",
        _commands(title, best, facts),
        "## Licence",
        _licence(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: RunFacts) -> str:
    import yaml

    hub_base = facts.base_name if facts.repo_url else None
    content: dict[str, Any] = {
        "license": facts.license,
        "license_name": facts.license_name,
        "license_link": facts.license_link,
        "base_model": hub_base,
        "base_model_relation": "finetune" if hub_base else None,
        "datasets": [dataset.name for dataset in facts.datasets if dataset.is_hub],
        "language": list(facts.languages),
        "pipeline_tag": "text-generation",
        "tags": list(TAGS),
        "quantized_by": "Tomeforge",
    }
    told = {key: value for key, value in content.items() if value}
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=10_000)


def _summary(facts: RunFacts, chat: ChatFormat) -> str:
    name = _text(facts.base_name)
    base = f"[{name}]({facts.repo_url})" if facts.repo_url else name
    template = "is inside each file" if chat.template else "is missing: the tokenizer had none"
    return (
        f"{base}, fine-tuned with LoRA by Tomeforge; the adapter is merged into each file. For "
        f"llama.cpp and what builds on it; the chat template {template}."
    )


def _bullets(facts: RunFacts) -> str:
    """Tell how it was made, one line for each thing that was recorded."""
    revision = f", revision {_code(facts.base_revision)}" if facts.base_revision else ""
    lines = [f"**Base**: {_text(facts.base_name)}{revision}"]
    for dataset in facts.datasets:
        name = f"[{_text(dataset.name)}]({dataset.url})" if dataset.url else _code(dataset.name)
        tools = f", and {dataset.tool_rows} generated tool-use conversations"
        version = f" (version {_code(dataset.version[:16])})" if dataset.version else ""
        lines.append(f"**Data**: {name}{version}{tools if dataset.tool_rows else ''}")
    for label, told in (
        ("Adapter", _adapter(facts.lora)),
        ("Training", _training(facts.training)),
        ("Software", [f"{name} {_text(v)}" for name, v in facts.training.versions.items()]),
        ("Hardware", [_text(facts.training.hardware)] if facts.training.hardware else []),
        ("Commit", [_code(facts.training.commit)] if facts.training.commit else []),
    ):
        lines += [f"**{label}**: {', '.join(told)}"] if told else []
    lines += [f"**Held-out loss**: {_held_out(facts.held_out)}"] if facts.held_out else []
    return "\n".join(f"- {line}" for line in lines)


def _adapter(lora: LoraSettings) -> list[str]:
    kind = ("DoRA" if lora.dora else "LoRA") + (" (rank-stabilised)" if lora.rslora else "")
    told = [f"{kind} of rank {lora.rank}"] if lora.rank is not None else []
    told += [f"alpha {lora.alpha:g}"] if lora.alpha is not None else []
    told += [f"dropout {lora.dropout:g}"] if lora.dropout else []
    modules = ", ".join(_code(name) for name in lora.target_modules)
    return [*told, f"on {modules}"] if modules else told


def _training(training: TrainingSettings) -> list[str]:
    epochs = training.epochs
    told = [f"{training.rows} rows"] if training.rows is not None else []
    told += [f"{epochs:g} epoch{'' if epochs == 1 else 's'}"] if epochs is not None else []
    told += [f"{training.steps} steps"] if training.steps is not None else []
    rate = training.learning_rate
    told += [f"learning rate {rate:g}"] if rate is not None else []
    return told + ([f"seed {training.seed}"] if training.seed is not None else [])


def _held_out(found: HeldOut) -> str:
    line = f"{found.loss_before:.4g} → {found.loss_after:.4g} nats per token"
    before, after = found.perplexity_before, found.perplexity_after
    if before is not None and after is not None:
        line += f" (perplexity {before:.4g} → {after:.4g})"
    return line + (f", on {found.rows} rows that were not trained on" if found.rows else "")


def _table(files: Files, certificate: Mapping[str, Any] | None) -> str:
    """List the files, the largest first, with columns for what was measured only."""
    measured = {name: _measured(name, entry, certificate) for name, entry in files.items()}
    columns = [
        column
        for column in ("KL divergence", "same top token", "perplexity ratio", "check")
        if any(column in found for found in measured.values())
    ]
    header = ["file", "type", "size", "bits per weight", "fallbacks", *columns]
    rows = [header, ["---"] * len(header)]
    for name, entry in sorted(files.items(), key=lambda item: -item[1]["bytes"]):
        fallbacks = ", ".join(f"{count} × {kind}" for kind, count in entry["fallbacks"].items())
        rows.append(
            [
                _code(name),
                _text(str(entry["type"])),
                f"{entry['bytes'] / 1e6:.1f} MB",
                f"{entry['bits_per_weight']:.2f}",
                f"{_text(fallbacks)} of {entry['matrices']}" if fallbacks else _NONE,
                *[measured[name].get(column, _NONE) for column in columns],
            ]
        )
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)


def _measured(
    name: str, entry: Mapping[str, Any], certificate: Mapping[str, Any] | None
) -> dict[str, str]:
    """Give the certificate's figures of a file, by column; none if it is about other bytes."""
    certified = certificate.get("files") if isinstance(certificate, Mapping) else None
    found = certified.get(name) if isinstance(certified, Mapping) else None
    if not isinstance(found, Mapping) or found.get("sha256") != entry.get("sha256"):
        return {}
    checks = {
        check.get("name"): check.get("value")
        for check in found.get("checks") or []
        if isinstance(check, Mapping)
    }
    figures = {
        "KL divergence": _figure(checks.get("mean_kl"), "{:.2g}"),
        "same top token": _figure(checks.get("same_top_token"), "{:.1%}"),
        "perplexity ratio": _figure(checks.get("perplexity_ratio"), "{:.4f}"),
        "check": "passed" if found.get("passed") is True else "**failed**",
    }
    return {column: figure for column, figure in figures.items() if figure}


def _figure(value: Any, form: str) -> str | None:
    """Write a check's value: a number, or the one that stands for it among others."""
    if isinstance(value, Mapping):
        value = next(
            (value[key] for key in ("value", "mean", "share", "ratio") if key in value), None
        )
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return form.format(value) if is_number else None


def _notes(files: Files, certificate: Mapping[str, Any] | None, best: str) -> list[str]:
    """Explain the columns that the table has."""
    notes = [f"Begin with {_code(best)}."]
    if any(entry["fallbacks"] for entry in files.values()):
        notes.append(
            "Fallbacks: matrices whose rows are no multiples of 256 cannot be K-quants and took "
            "another type; the bits per weight are what the file really costs."
        )
    if any(_measured(name, entry, certificate) for name, entry in files.items()):
        notes.append(
            "KL divergence (mean, nats per token) and same top token compare the file's next-token "
            "distributions with those of the trained model in 16 bit; all figures are in "
            "`certificate.json`."
        )
    else:
        notes.append(
            "Not measured yet: `python -m export.verify_gguf FILE --reference ADAPTER_DIR` "
            "compares a file with the trained model."
        )
    for name, entry in files.items():
        matrix = entry.get("imatrix")
        if matrix:
            notes.append(f"Importance matrix of {_code(name)}: {_imatrix(matrix)}.")
    return notes


def _imatrix(matrix: Mapping[str, Any]) -> str:
    counts = [f"{matrix[key]} {key}" for key in ("rows", "tokens", "chunks") if matrix.get(key)]
    digest = matrix.get("data_sha256")
    told = [", ".join(counts)] if counts else []
    told += [f"(sha256 of the token ids: {_code(str(digest))})"] if digest else []
    return " ".join(told) or "its source was not recorded"


def _prompt_format(chat: ChatFormat) -> list[str]:
    messages = [{"role": "user", "content": _QUESTION}]
    system = {"role": "system", "content": "Be brief."}
    form = find_turn_format(chat)
    shown = render_chat(chat, [system, *messages] if form and form.system else messages)
    return ["## Prompt format", _fenced(shown)] if shown else []


def _commands(title: str, best: str, facts: RunFacts) -> str:
    file = shlex.quote(best)
    ollama = shlex.quote(re.sub(r"[^a-z0-9._-]+", "-", title.lower()).strip("-.") or "model")
    lines = [
        f'python -m integration.ask --model {file} "{_QUESTION}"',
        f"python -m integration.chat --model {file}",
        f'llama-cli -m {file} --jinja -p "{_QUESTION}"',
        f"ollama create {ollama} -f Modelfile && ollama run {ollama}",
    ]
    defaults = ", ".join(f"{key} {value:g}" for key, value in facts.sampling.items())
    told = f"Sampling defaults, in the files and the Modelfile: {defaults}."
    return _fenced("\n".join(lines), "sh") + "\n\n" + told


def _licence(facts: RunFacts) -> str:
    name = ", ".join(_text(part) for part in (facts.license, facts.license_name) if part)
    if not name:
        return "That of the base model, whose folder named none."
    link = f" ({_text(facts.license_link)})" if facts.license_link else ""
    return f"{name}{link}, as the base model's."


def _text(value: str) -> str:
    """Make a name plain text in Markdown, whatever it holds."""
    line = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line)


def _code(value: str) -> str:
    """Make a name code in Markdown: in as many backticks as it takes."""
    line = " ".join(value.split())
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence, pad = "`" * (longest + 1), " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _cell(text: str) -> str:
    """Keep a cell in its column: a bar ends it, even within code."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def _fenced(text: str, language: str = "") -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
