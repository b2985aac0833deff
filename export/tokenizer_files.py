"""Training's tokenizer and chat template: which file comes from where, and does it fit the model.

In: an adapter folder and its base. Out: files to copy into a model folder.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from export._cli import MODEL, CommandError, log
from export.base_model import read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def tokenizer_sources(adapter_dir: Path, base_dir: Path) -> dict[str, Path]:
    """Choose where each tokenizer file comes from: training's set, else the base's.

    Raises:
        CommandError: Exit 3: neither folder has a tokenizer.
    """
    ours = _present(adapter_dir, TOKENIZER_FILES)
    theirs = _present(base_dir, TOKENIZER_FILES)
    if not ours.keys() & set(_VOCABULARY_FILES):
        ours = theirs | ours
    elif "tokenizer.model" in theirs and "tokenizer.model" not in ours:
        # Without it llama.cpp gives every SentencePiece token the same score, and text is split
        # wrongly. transformers does not always save it, so take the base's if the vocabulary is
        # the same.
        if _same_vocabulary(ours, theirs):
            ours["tokenizer.model"] = theirs["tokenizer.model"]
        else:
            log("warning: training changed the vocabulary; the base's tokenizer.model is left out")
    if not ours.keys() & set(_VOCABULARY_FILES):
        raise CommandError(
            f"neither '{adapter_dir}' nor '{base_dir}' has a tokenizer ({_VOCABULARY_FILES[0]}); "
            "a model folder without tokenizer is of no use. Copy the training run's tokenizer "
            "files into the adapter folder",
            MODEL,
        )
    return ours


def copy_tokenizer(
    sources: Mapping[str, Path], target_dir: Path, num_embeddings: int | None
) -> None:
    """Copy tokenizer files, unless the tokenizer knows more tokens than the model.

    Args:
        sources: See `tokenizer_sources`.
        target_dir: An existing folder.
        num_embeddings: Rows of the merged model's embedding, None if unknown.

    Raises:
        CommandError: Exit 3: more tokens than rows.
    """
    if num_embeddings is not None and "tokenizer.json" in sources:
        top = highest_token(sources["tokenizer.json"])
        if top >= num_embeddings:
            raise CommandError(
                f"tokenizer of '{sources['tokenizer.json'].parent}' knows token {top}, the model "
                f"has {num_embeddings} rows for tokens; train again with embed_tokens and lm_head "
                "in modules_to_save, or without new tokens",
                MODEL,
            )
    for name, source in sources.items():
        shutil.copyfile(source, target_dir / name)


def highest_token(tokenizer_json: Path) -> int:
    """Give the highest token id that a tokenizer.json knows."""
    content = read_json(tokenizer_json)
    vocabulary = content.get("model", {}).get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return max([*ids, *(token["id"] for token in content.get("added_tokens", []))])


def _present(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    return {name: folder / name for name in names if (folder / name).is_file()}


def _same_vocabulary(ours: dict[str, Path], theirs: dict[str, Path]) -> bool:
    if "tokenizer.json" not in ours or "tokenizer.json" not in theirs:
        return True
    a, b = (read_json(files["tokenizer.json"]).get("model", {}) for files in (ours, theirs))
    return bool(a.get("vocab") == b.get("vocab"))
