"""Tokenizers for tests: Mistral's real one as a folder, and a small byte-level one with any names."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PACKAGE_DATA = "mistral_common/data"
# The tokenizers of Mistral-7B-v0.1 (32,000 pieces) and v0.3 (32,768: `[INST]` is a control token).
PIECES_V1, PIECES_V3 = "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"


def find_mistral_model(version: str = PIECES_V1) -> Path:
    """Find one of Mistral's SentencePiece models among the files of `mistral-common`.

    The package is never imported, and better not importable: where it is, transformers imports it for
    every Mistral model, and it needs packages that we do not.
    """
    folders = [Path(sys.prefix) / "share/mistral-common"]
    spec = importlib.util.find_spec("mistral_common")
    if spec and spec.submodule_search_locations:
        folders.append(Path(spec.submodule_search_locations[0]).parent)
    for folder in folders:
        if (folder / _PACKAGE_DATA / version).is_file():
            return folder / _PACKAGE_DATA / version
    raise FileNotFoundError(
        f"{_PACKAGE_DATA}/{version} is not in {folders[0]}; install it: scripts/setup.sh"
    )


def make_mistral_tokenizer_dir(folder: Path, version: str = PIECES_V1) -> Path:
    """Write a tokenizer folder as Mistral-7B-v0.1 and TinyLlama were published: no chat template.

    Mistral-7B-v0.3 has more control tokens, and is written alike.

    `tokenizer.json` has what transformers 4 made of the model: merges in the order of the pieces'
    scores, a space in front of every text. Transformers 5 orders them by id when it has nothing but
    `tokenizer.model`, and then splits runs of spaces differently from SentencePiece.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers.tokenization_utils_base import generate_merges

    folder.mkdir(parents=True, exist_ok=True)
    source = find_mistral_model(version)
    shutil.copyfile(source, folder / "tokenizer.model")
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(source.read_bytes())
    vocab = {piece.piece: token for token, piece in enumerate(proto.pieces)}
    merges = generate_merges(vocab, {piece.piece: piece.score for piece in proto.pieces})
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    kinds = proto.SentencePiece
    special = {
        token: piece.piece
        for token, piece in enumerate(proto.pieces)
        if piece.type in (kinds.UNKNOWN, kinds.CONTROL)
    }
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token): {"content": text, **flags, "special": True}
            for token, text in special.items()
        },
        "additional_special_tokens": [],
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": None,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def make_byte_tokenizer(
    special: Sequence[str], bos: str | None = None, eos: str | None = None, adds_bos: bool = False
) -> Any:
    """Give a byte-level tokenizer, one token a byte, with these control tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={text: token for token, text in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
