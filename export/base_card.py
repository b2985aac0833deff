"""What a base model's own card says: its public name, licence and languages.

In: the base's folder. Out: the front matter of its README.md, and a name without local paths.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_LOCAL_STARTS = {"outputs", "models", "data", "datasets", "scripts", "checkpoints", "runs", "tests"}
_DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow")
_CACHED = re.compile(r"models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)")


def read_card(model_dir: Path) -> Mapping[str, Any]:
    """Read the front matter of README.md; others write it, so what is no YAML is read by lines."""
    import yaml

    path = model_dir / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        # Strings only: `language: no` is Norwegian, not false.
        content = yaml.load(match[1] if match else "", Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        content = _plain_lines(match[1] if match else "")
    return content if isinstance(content, dict) else {}


def _plain_lines(text: str) -> dict[str, str]:
    """Give the plain `key: value` lines of a front matter."""
    lines = re.findall(r"^([\w-]+): *([^\s\[{|>&#].*)$", text, re.MULTILINE)
    return {key: value.strip().strip("'\"") for key, value in lines}


def is_hub_name(name: str) -> bool:
    """Tell ORG/NAME from a path, of which nothing may be published."""
    return bool(
        _HUB_NAME.fullmatch(name)
        and name.partition("/")[0].lower() not in _LOCAL_STARTS
        and not name.lower().endswith(_DATA_SUFFIXES)
        and not Path(name).exists()
    )


def public_name(model_dir: Path, name: str, card: Mapping[str, Any]) -> str:
    """Name a base as the hub knows it; a local path means nothing elsewhere.

    Args:
        model_dir: Its folder, perhaps in the hub's cache.
        name: As the adapter names it.
        card: See `read_card`.
    """
    if is_hub_name(name):
        return name
    for folder in (model_dir, *model_dir.parents):
        cached = _CACHED.fullmatch(folder.name)
        if cached:
            return f"{cached['org']}/{cached['name']}"
    named = card.get("base_model")
    named = named[0] if isinstance(named, list) and named else named
    if isinstance(named, str) and is_hub_name(named.strip()):
        return named.strip()
    return bare_name(name) or model_dir.resolve().name or "model"


def bare_name(name: str) -> str:
    """Give the last part of a path of any system."""
    last = re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    return "" if last in (".", "..", "~") else last
