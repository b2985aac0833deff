"""`integration/adapters.yaml`: which adapters there are, and example requests that belong to each.

Everything a person can get wrong in it is one line that names the place (exit code 2).
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration._cli import CommandError, log
from integration.ask_format import BASE
from integration.router_examples import read_requests

DEFAULT_CONFIG = Path("integration/adapters.yaml")
DEFAULT_ROUTER = Path("outputs/router/router.npz")
DEFAULT_ENCODER = Path("outputs/models/all-MiniLM-L6-v2-F16.gguf")
RULE_FLAGS = re.IGNORECASE | re.DOTALL
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_TOP_KEYS = ("adapters", "base")
_BASE_KEYS = ("description", "rules", "examples", "examples_from")
_ADAPTER_KEYS = ("name", "file", *_BASE_KEYS)
_FEW_EXAMPLES, _UNBALANCED = 10, 4


@dataclass(frozen=True)
class RouteClass:
    """What requests can be sent to: an adapter, or the plain base (whose ``file`` is empty).

    Attributes:
        examples: Requests as the file lists them; thresholds are calibrated on these.
        more: Further ones out of data sets.
    """

    name: str
    file: str = ""
    description: str = ""
    rules: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class RouterConfig:
    """The content of one adapters.yaml."""

    path: Path
    adapters: tuple[RouteClass, ...]
    base: RouteClass

    @property
    def classes(self) -> tuple[RouteClass, ...]:
        """The adapters in the file's order, and the base."""
        return (*self.adapters, self.base)


def load_config(path: Path) -> RouterConfig:
    """Read and check an adapters.yaml.

    Raises:
        CommandError: Exit 2; the file is missing, no YAML, or something in it is wrong.
    """
    content = _read_yaml(path)
    where = f"'{path}'"
    if not isinstance(content, dict):
        raise CommandError(
            f"{where} holds {_kind(content)}; expected a mapping with the keys {_list(_TOP_KEYS)}"
        )
    _check_keys(content, _TOP_KEYS, where)
    entries = content.get("adapters")
    if not isinstance(entries, list) or not entries:
        raise CommandError(
            f"{where} names no adapters (adapters: {_kind(entries)}); expected a list with one entry "
            "- name, file, rules, examples - for each"
        )
    adapters = tuple(_adapter(entry, number, where) for number, entry in enumerate(entries, 1))
    names = [adapter.name for adapter in adapters]
    for name in names:
        if names.count(name) > 1:
            raise CommandError(f"{where}: two adapters are called '{name}'; give each its own name")
    base = content.get("base")
    if base is not None and not isinstance(base, dict):
        raise CommandError(f"{where}: base is {_kind(base)}; expected {_list(_BASE_KEYS)} under it")
    _check_keys(base or {}, _BASE_KEYS, f"{where}: base")
    config = RouterConfig(path, adapters, RouteClass(BASE, **_shared(base or {}, f"{where}: base")))
    _check_examples(config, where)
    return config


def note_weak_classes(config: RouterConfig) -> None:
    """Say on stderr where more examples would help."""
    sizes = {one.name: len(one.examples) for one in config.classes if one.examples or one.more}
    for name, size in sizes.items():
        if size < _FEW_EXAMPLES:
            log(f"note: '{name}' has {size} examples; 10 to 50 make the router reliable")
    small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[large] > _UNBALANCED * max(1, sizes[small]):
        log(
            f"note: '{large}' has {sizes[large]} examples and '{small}' {sizes[small]}; about as "
            "many for each would be better"
        )


def same_text(text: str) -> str:
    """Give a text without what makes no difference between two examples: case and spaces."""
    return " ".join(text.split()).casefold()


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CommandError(
            f"adapter list '{path}' does not exist; expected a YAML file such as {DEFAULT_CONFIG}"
        ) from error
    except OSError as error:
        raise CommandError(
            f"adapter list '{path}' cannot be read ({error.strerror}); expected a YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise CommandError(
            f"adapter list '{path}' is no YAML: {error}; put a text with ':' or '#' in quotes"
        ) from error


def _adapter(entry: Any, number: int, where: str) -> RouteClass:
    place = f"{where}: adapter {number}"
    if not isinstance(entry, dict):
        raise CommandError(f"{place} is {_kind(entry)}; expected {_list(_ADAPTER_KEYS)}")
    name = entry.get("name")
    if isinstance(name, str) and name:
        place = f"{where}: adapter '{name}'"
    _check_keys(entry, _ADAPTER_KEYS, place)
    if not isinstance(name, str) or not name:
        raise CommandError(f"{place} has no name ({_kind(name)}); add one: name: coding")
    if name == BASE:
        raise CommandError(f"{place}: this name means the model without adapter; choose another")
    if not _NAME.fullmatch(name):
        raise CommandError(f"{place}: a name has letters, digits, '_', '.' and '-' only; change it")
    file = entry.get("file")
    if not isinstance(file, str) or not file:
        raise CommandError(
            f"{place} has no file ({_kind(file)}); add its LoRA GGUF: file: outputs/.../*-LoRA.gguf"
        )
    adapter = RouteClass(name, file, **_shared(entry, place))
    if not (adapter.rules or adapter.examples or adapter.more):
        raise CommandError(
            f"{place} has neither examples nor rules, so no request would ever reach it; add 10 to "
            "50 examples"
        )
    return adapter


def _shared(entry: dict[str, Any], place: str) -> dict[str, Any]:
    """Read the keys that adapters and the base have in common."""
    description = entry.get("description") or ""
    if not isinstance(description, str):
        raise CommandError(f"{place}: description is {_kind(description)}; expected a text")
    rules = tuple(_texts(entry, "rules", place))
    for rule in rules:
        try:
            empty = re.compile(rule, RULE_FLAGS).search("")
        except (re.error, OverflowError, RecursionError) as error:
            raise CommandError(
                f"{place}: rule /{rule}/ is no regular expression ({error}); mend it, or put a "
                "backslash before characters that are meant as they are"
            ) from error
        if empty:
            raise CommandError(
                f"{place}: rule /{rule}/ matches every request, even an empty one; make it narrower"
            )
    return {
        "description": description,
        "rules": rules,
        "examples": tuple(examples := list(_texts(entry, "examples", place))),
        "more": tuple(_more(entry, {same_text(text) for text in examples}, place)),
    }


def _more(entry: dict[str, Any], known: set[str], place: str) -> Iterator[str]:
    """Read what ``examples_from`` names: files, or mappings of file and sources."""
    named = entry.get("examples_from")
    for one in named if isinstance(named, list) else [named] if named is not None else []:
        wanted = {"file": one} if isinstance(one, str) else one
        if not isinstance(wanted, dict) or not isinstance(wanted.get("file"), str):
            raise CommandError(
                f"{place}: examples_from has {_kind(one)}; expected a .jsonl file, or file: and sources:"
            )
        _check_keys(wanted, ("file", "sources"), f"{place}: examples_from")
        sources = tuple(_texts(wanted, "sources", f"{place}: examples_from"))
        for text in read_requests(Path(wanted["file"]), sources, place):
            if same_text(text) not in known:
                known.add(same_text(text))
                yield text


def _texts(entry: dict[str, Any], key: str, place: str) -> Iterator[str]:
    values = entry.get(key)
    if values is None:
        return
    if not isinstance(values, list):
        raise CommandError(f"{place}: {key} is {_kind(values)}; expected a list of texts")
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise CommandError(
                f"{place}: number {number} of {key} is {_kind(value)}; expected a text, so put it "
                "in quotes"
            )
        if not value.strip():
            raise CommandError(f"{place}: number {number} of {key} is empty; fill or remove it")
        yield value


def _check_examples(config: RouterConfig, where: str) -> None:
    seen: dict[str, str] = {}
    for one in config.classes:
        for example in (*one.examples, *one.more):
            key = same_text(example)
            if key in seen:
                both = "twice under" if seen[key] == one.name else f"under '{seen[key]}' and"
                raise CommandError(
                    f"{where}: the example '{shorten(example)}' is {both} '{one.name}'; keep it once"
                )
            seen[key] = one.name
    with_examples = [one.name for one in config.classes if one.examples or one.more]
    if len(with_examples) < 2:
        raise CommandError(
            f"{where} has examples of {with_examples[0] if with_examples else 'nothing'} only; the "
            "router learns from the difference, so add examples of other requests under base"
        )


def _check_keys(entry: dict[Any, Any], known: tuple[str, ...], place: str) -> None:
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected {_list(known)}"
            raise CommandError(f"{place}: the key '{key}' is unknown; {hint}")


def _kind(value: Any) -> str:
    names = {type(None): "nothing", dict: "a mapping", list: "a list", str: "a text"}
    names |= {bool: "yes or no", int: "a number", float: "a number"}
    return "empty" if value in ("", [], {}) else names.get(type(value), type(value).__name__)


def _list(keys: tuple[str, ...]) -> str:
    return ", ".join(keys)


def shorten(text: str, size: int = 60) -> str:
    """Give a text on one line, cut to a size."""
    text = " ".join(text.split())
    return text if len(text) <= size else f"{text[: size - 1]}…"
