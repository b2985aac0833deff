"""What stands beside the GGUF files: a model card and an Ollama Modelfile, from one source.

In: the files of an export, the base's name and licence, the tokenizer that training used.
Out: `README.md` and `Modelfile`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.base_model import BaseModel, front_matter

_ROLE_HEADERS_CHATML = """\
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_ROLE_HEADERS_ALPACA = """\
{{- range .Messages }}{{ if eq .Role "system" }}{{ .Content }}

{{ else if eq .Role "user" }}### Instruction:
{{ .Content }}

{{ else if eq .Role "assistant" }}### Response:
{{ .Content }}EOS

{{ end }}{{ end }}### Response:
"""
# Below this, "Q4_K_M" is what its name says; above, most matrices fell back to other types.
_TRUE_Q4_BITS = 5.3


@dataclass(frozen=True)
class ChatFormat:
    """The tokenizer's chat template and end token, as training wrote them."""

    template: str | None
    eos_token: str | None


def read_chat_format(sources: Mapping[str, Path]) -> ChatFormat:
    """Read the chat format from tokenizer files (see `merge_adapter.tokenizer_sources`)."""
    config: dict[str, Any] = {}
    if "tokenizer_config.json" in sources:
        config = json.loads(sources["tokenizer_config.json"].read_text(encoding="utf-8"))
    template = config.get("chat_template")
    if "chat_template.jinja" in sources:
        template = sources["chat_template.jinja"].read_text(encoding="utf-8")
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    return ChatFormat(template if isinstance(template, str) else None, eos)


def recommended_file(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Choose the file to begin with: a true 4-bit one, else Q8_0, else the smallest."""
    by_type = {entry["type"]: name for name, entry in files.items()}
    q4 = by_type.get("Q4_K_M")
    if q4 and files[q4]["bits_per_weight"] < _TRUE_Q4_BITS:
        return q4
    return by_type.get("Q8_0") or min(files, key=lambda name: files[name]["bytes"])


def model_card(
    name: str, base: BaseModel, files: Mapping[str, Mapping[str, Any]], chat: ChatFormat
) -> str:
    """Write the model card: front matter, files with their true cost, how to run them."""
    license_name = front_matter(base.path).get("license")
    matter = [f"license: {license_name}"] if license_name else []
    matter += [f"base_model: {base.name}"] if "/" in base.name else []
    matter += ["base_model_relation: finetune"] if "/" in base.name else []
    matter += ["pipeline_tag: text-generation", "tags:", "- gguf", "- lora", "- tomeforge"]
    rows = []
    for file_name, entry in sorted(files.items(), key=lambda item: -item[1]["bytes"]):
        fell = sum(entry["fallbacks"].values())
        note = f"{fell} of {entry['matrices']} matrices fell back" if fell else ""
        rows.append(
            f"| `{file_name}` | {entry['type']} | {entry['bytes'] / 1e6:.1f} MB "
            f"| {entry['bits_per_weight']:.2f} | {note} |"
        )
    best = recommended_file(files)
    licence = (
        f"Licence: {license_name}, as the base model's."
        if license_name
        else "Licence: that of the base model; its folder named none."
    )
    fallback_note = (
        "\nSome matrices fell back to another type: their rows are no multiples of 256, which "
        "K-quants need. The column says what the file really costs.\n"
        if any(sum(entry["fallbacks"].values()) for entry in files.values())
        else ""
    )
    template = "the chat template is inside each file" if chat.template else "no chat template"
    return "\n".join(
        [
            "---",
            *matter,
            "---",
            f"# {name}",
            "",
            f"{base.name}, fine-tuned with LoRA; the adapter is merged in. For llama.cpp and what "
            f"builds on it; {template}.",
            "",
            "| file | type | size | bits per weight | |",
            "|---|---|---|---|---|",
            *rows,
            fallback_note,
            "## Run it",
            "",
            "```sh",
            f'python -m integration.ask --model {best} "What is a tome?"',
            f"python -m integration.chat --model {best}",
            f"ollama create {name.lower()} -f Modelfile && ollama run {name.lower()}",
            "```",
            "",
            f"Checked against the trained model: `python -m export.verify_gguf {best} "
            "--reference ADAPTER_DIR` writes `certificate.json` here.",
            "",
            licence,
            "",
        ]
    )


def modelfile(best_file: str, chat: ChatFormat) -> str:
    """Write an Ollama Modelfile; a template only where we know Ollama's form of it."""
    lines = [f"FROM ./{best_file}", ""]
    template = ollama_template(chat)
    if template is None:
        lines += [
            "# TEMPLATE is left out: Ollama writes templates in Go, and this chat template has no",
            "# known Go form. Ollama then uses the one in the GGUF where it can read it.",
        ]
    else:
        lines.append(f'TEMPLATE """{template}"""')
        system = default_system(chat)
        if system:
            lines.append(f'SYSTEM """{system}"""')
    if chat.eos_token:
        lines.append(f'PARAMETER stop "{chat.eos_token}"')
    lines += ["PARAMETER temperature 0.3", ""]
    return "\n".join(lines)


def ollama_template(chat: ChatFormat) -> str | None:
    """Give the Go form of a ChatML-style or alpaca template, None for any other."""
    if not chat.template:
        return None
    if "<|im_start|>" in chat.template and "<|im_end|>" in chat.template:
        return _ROLE_HEADERS_CHATML
    if "### Instruction:" in chat.template and "### Response:" in chat.template:
        return _ROLE_HEADERS_ALPACA.replace("EOS", chat.eos_token or "")
    return None


def default_system(chat: ChatFormat) -> str | None:
    """Find the system prompt that a ChatML template puts in when the user gives none."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        text = (
            ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            .from_string(chat.template or "")
            .render(messages=[{"role": "user", "content": "x"}], eos_token=chat.eos_token or "")
        )
    except TemplateError:
        return None
    match = re.match(r".{0,20}?<\|im_start\|>system\n(.*?)<\|im_end\|>", text, re.DOTALL)
    return match[1].strip() if match else None
