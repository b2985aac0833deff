"""File names after the GGUF naming convention, and the words they are made of.

`BaseName-SizeLabel-FineTune-vX.Y-Encoding[-LoRA].gguf` (ggml's docs/gguf.md). In: the base's public
name, its number of weights, the run's name. Out: a `ModelName`, whose parts are metadata as well.
"""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

VERSION = "1.0"
_SIZE = re.compile(r"(?P<experts>\d+x)?(?P<count>\d+(?:\.\d+)?)(?P<unit>[KMBTkmbt])", re.ASCII)
_ACTIVE = re.compile(r"[Aa]\d+(?:\.\d+)?[MBmb]", re.ASCII)
_GAP = re.compile(r"[-_\s]+")
_VERSION_WORD = re.compile(r"[vV]\d+(?:\.\d+)*")
# Words that no base is called by: with them, what somebody made of it begins.
_TUNING_WORD = re.compile(r"chat|instruct|it|vision|sft|dpo|lora|hf|base", re.IGNORECASE)
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class BaseName:
    """A base's name in its parts.

    Attributes:
        name: The convention's BaseName; a dot stays (`Llama-3.2`), as in every published file.
        size_label: `135M`, `8x7B`, `30B-A3B`; None if the name has none.
        finetune: Its maker's words, such as `Instruct`; may be empty.
        version: The base's own, such as `v0.3`; never that of our file.
    """

    name: str
    size_label: str | None
    finetune: str
    version: str | None


@dataclass(frozen=True)
class ModelName:
    """The name of an exported model; `version` without the `v`."""

    base_name: str
    size_label: str
    finetune: str
    version: str = VERSION

    @property
    def prefix(self) -> str:
        """First part of the file names, up to the encoding."""
        words = (self.base_name, self.size_label, self.finetune, f"v{self.version}")
        return "-".join(filter(None, words))

    @property
    def title(self) -> str:
        """The name for people: `general.name`."""
        words = (self.base_name, self.size_label, self.finetune)
        return " ".join(filter(None, words)).replace("-", " ")


def base_of(name: str, num_weights: int = 0) -> BaseName:
    """Split the name of a base: `TinyLlama/TinyLlama-1.1B-Chat-v1.0` or the name of a folder.

    Args:
        name: ORG/NAME or a bare name.
        num_weights: Tells a size (`7b`) from a length (`4k`) or a number of tokens (`3T`); 0 if
            it is not known.
    """
    words = [word for word in _GAP.split(name.rpartition("/")[2]) if word]
    base: list[str] = []
    tuning: list[str] = []
    size = version = None
    for place, word in enumerate(words):
        if place and _VERSION_WORD.fullmatch(word):
            version = version or word.lower()
        elif place and size is None and _is_size(word, num_weights):
            size = _label(word)
        elif size and not tuning and "-" not in size and _ACTIVE.fullmatch(word):
            size += "-" + _label(word)
        elif size or tuning or (place and _begins_tuning(word)):
            tuning.append(word)
        else:
            base.append(word)
    # A dot is kept here alone: the standard's expression refuses it, and everybody writes it.
    base_words = [clean for word in base for clean in [_clean(word, keep=".")] if clean]
    return BaseName("-".join(base_words) or "model", size, _clean("-".join(tuning)), version)


def size_label(num_weights: int) -> str:
    """Round a number of weights to two digits: `135M`, `1.1B` (as llama.cpp's gguf-py does)."""
    unit = next((unit for unit in "TBM" if num_weights > _UNITS[unit]), "K")
    count = num_weights / _UNITS[unit]
    digits = max(2 - len(str(round(count)).lstrip("0")), 0)
    return f"{count:.{digits}f}{unit}"


def model_name(
    base_name: str, num_weights: int, run_name: str, version: str = VERSION
) -> ModelName:
    """Name a fine-tuned model after its base and its run.

    The run's words that the base's name has already are left out; `tuned` stands for a run that
    has no others, because without any word the file would pass for the base itself.

    Args:
        base_name: As the hub knows it, or a bare name.
        num_weights: Of the base.
        run_name: Any text.
        version: `1.0`, with or without a `v`.
    """
    base = base_of(base_name, num_weights)
    known = {word.lower() for word in _GAP.split(base_name.rpartition("/")[2])}
    own = [word for word in _GAP.split(run_name) if word and word.lower() not in known]
    finetune = "-".join(filter(None, [base.finetune, _clean("-".join(own)) or "tuned"]))
    label = base.size_label or size_label(num_weights)
    return ModelName(base.name, label, _after_size(finetune), version.lstrip("vV"))


def plain_name(base_name: str, num_weights: int) -> ModelName:
    """Name a base that nothing was done to: its maker's words, and its own version or 1.0.

    Args:
        base_name: As the hub knows it, or a bare name.
        num_weights: Of the base.
    """
    base = base_of(base_name, num_weights)
    label = base.size_label or size_label(num_weights)
    version = (base.version or VERSION).lstrip("vV")
    return ModelName(base.name, label, _after_size(base.finetune), version)


def file_prefix(base_name: str, num_weights: int, run_name: str, version: str = VERSION) -> str:
    """Give the first part of an export's file names; see `model_name`."""
    return model_name(base_name, num_weights, run_name, version).prefix


def export_file_name(prefix: str, type_name: str, *, lora: bool = False) -> str:
    """Name the file of one type; `prefix` is `file_prefix`'s, or the user's own as it is."""
    return f"{prefix}-{type_name}{'-LoRA' if lora else ''}.gguf"


def run_name_of(adapter_dir: Path) -> str:
    """Name a run: the folder around `adapter/`, else the folder itself."""
    folder = adapter_dir.resolve()
    name = folder.parent.name if folder.name == "adapter" and folder.parent.name else folder.name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _is_size(word: str, num_weights: int) -> bool:
    match = _SIZE.fullmatch(word)
    if match is None:
        return False
    if num_weights <= 0:
        return match["unit"] != "k"
    count = float(match["count"]) * _UNITS[match["unit"].upper()]
    experts = int((match["experts"] or "1x")[:-1])
    # Experts share their attention, and embeddings are counted or not: a factor of two is normal.
    return num_weights / 2.5 <= count * experts <= num_weights * 2.5


def _label(word: str) -> str:
    return (word[:-1] + word[-1].upper()).replace("a", "A")


def _after_size(finetune: str) -> str:
    """Part letters, digits, letters right after the size: they read as part of it."""
    first, dash, rest = finetune.partition("-")  # such as `3.8B-ContextLength4k`
    return re.sub(r"^([A-Za-z]+)(\d+[A-Za-z]+)$", r"\1-\2", first) + dash + rest


def _begins_tuning(word: str) -> bool:
    """Tell words that end the BaseName; one like `4k` in it would be read as the size."""
    return bool(_TUNING_WORD.fullmatch(word) or re.fullmatch(r"\d+[\d.]*[A-Za-z]\w*", word))


def _clean(text: str, keep: str = "") -> str:
    """Keep letters, digits and single dashes; an accent is dropped, its letter stays."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
    return re.sub(rf"[^A-Za-z0-9{re.escape(keep)}]+", "-", plain).strip("-" + keep)
