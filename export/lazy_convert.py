"""Let llama.cpp's own converter name and arrange merged weights, without reading any of them.

Its tensors are lazy: here they are made from a `MergedModel` instead of files, in float32, and what
it would write is kept as a list. Runs in a process of its own, because the converter needs the
`gguf` package that comes with it, which is newer than the installed one of the same version.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export._cli import MODEL, CommandError
from export.base_model import read_json
from export.converter import find_converter
from export.merged_weights import MergedModel, MergedWeight
from export.safetensors_file import FLOAT_BYTES

if TYPE_CHECKING:
    import numpy as np

# What the converter's heuristics guess about authorship; ours comes from the run itself.
_KEPT_GENERAL = ("architecture", "type", "alignment", "file_type", "quantization_version")


@dataclass
class PlannedTensor:
    """One tensor of the file to be: name, shape (rows first), and where its values come from.

    Attributes:
        shape: As numpy has it; ggml's order is the reverse.
        weight: Set when the tensor is a merged weight as it is, so that rows can be had singly.
        lazy: The converter's own lazy tensor otherwise.
    """

    name: str
    shape: tuple[int, ...]
    weight: MergedWeight | None
    lazy: Any

    def read(self) -> "np.ndarray":
        """Compute the whole tensor as float32."""
        import gguf
        import numpy as np

        values = gguf.LazyNumpyTensor.to_eager(self.lazy)
        self.lazy = None
        result: np.ndarray = np.ascontiguousarray(values, dtype=np.float32)
        return result


@dataclass(frozen=True)
class Converted:
    """What the converter would write: metadata by key, tensors in order.

    Attributes:
        metadata: `gguf.GGUFValue` by key.
        used: Names of the merged weights whose values were computed so far.
        changed: Those of them that LoRA changed.
    """

    architecture: str
    metadata: dict[str, Any]
    tensors: list[PlannedTensor]
    used: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)

    def rows_of(self, tensor: PlannedTensor, first: int, count: int | None) -> "np.ndarray":
        """Compute rows of a tensor that is a merged weight, and note what was used."""
        assert tensor.weight is not None
        values, changed = tensor.weight.rows(first, count)
        self.used.add(tensor.weight.name)
        if changed:
            self.changed.add(tensor.weight.name)
        return values


def use_vendored_gguf() -> None:
    """Put llama.cpp's converter, and the `gguf` that belongs to it, before any other.

    Raises:
        CommandError: Exit 1: the converter is not installed.
    """
    folder = find_converter().parent
    sys.path[:0] = [str(folder / "gguf-py"), str(folder)]


def convert_lazily(model: MergedModel, model_dir: Path) -> Converted:
    """Run llama.cpp's converter over the plan of a merged model.

    Args:
        model: The weights, by their Hugging Face names.
        model_dir: Folder with the model's config.json, tokenizer and chat template.

    Raises:
        CommandError: Exit 3: an architecture, tokenizer or tensor that the converter refuses.
    """
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    used: set[str] = set()
    changed: set[str] = set()
    with torch.inference_mode():
        _serve_weights(ModelBase, model, used, changed)
        try:
            hparams = ModelBase.load_hparams(model_dir, False)
            architecture = get_model_architecture(hparams, ModelType.TEXT)
            model_class = get_model_class(architecture)
            writer = model_class(
                model_dir, gguf.LlamaFileType.ALL_F32, model_dir / "unused.gguf", model_name="x"
            )
            direct = _watch_renaming(writer)
            writer.prepare_tensors()
            writer.prepare_metadata(vocab_only=False)
        except CommandError:
            raise
        except Exception as error:
            # The converter raises whatever comes up, asserts included.
            text = " ".join(str(error).split()) or type(error).__name__
            raise CommandError(
                f"llama.cpp's converter refuses the model: {text}{_advice(error)}", MODEL
            ) from error
    (infos,) = writer.gguf_writer.tensors
    (values,) = writer.gguf_writer.kv_data
    tensors = []
    for name, info in infos.items():
        weight = model.weights.get(direct.get(name, ""))
        usable = weight is not None and len(weight.shape) <= 2
        tensors.append(
            PlannedTensor(name, tuple(info.shape), weight if usable else None, info.tensor)
        )
        info.tensor = None
    metadata = {
        key: value
        for key, value in values.items()
        if not key.startswith("general.") or key.split(".")[1] in _KEPT_GENERAL
    }
    if values["tokenizer.ggml.model"].value == "llama":
        _restore_scores(metadata, model_dir)
    return Converted(writer.gguf_writer.arch, metadata, tensors, used, changed)


def _restore_scores(metadata: dict[str, Any], model_dir: Path) -> None:
    """Give SentencePiece tokens their scores where there is only a tokenizer.json.

    The converter then gives every token the same score, and llama.cpp splits words wrongly.
    """
    scores, tokens = (metadata[f"tokenizer.ggml.{key}"].value for key in ("scores", "tokens"))
    if len(set(scores)) > 1 or not (model_dir / "tokenizer.json").is_file():
        return
    ranks = merge_ranks(read_json(model_dir / "tokenizer.json"))
    texts = [token.decode() if isinstance(token, bytes) else token for token in tokens]
    scores[:] = [-float(ranks.get(text, len(ranks))) for text in texts]


def merge_ranks(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Give the place of each merged piece in tokenizer.json's list of merges.

    transformers lists them by falling score of the piece they give, so the place is the score.
    """
    ranks: dict[str, int] = {}
    for merge in tokenizer["model"].get("merges", []):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, len(ranks))
    return ranks


def _advice(error: Exception) -> str:
    if "pre-tokenizer" in str(error):
        return (
            ". Training changed the tokenizer itself; train with the base's tokenizer, or update "
            "llama-cpp-python"
        )
    if isinstance(error, NotImplementedError):
        return ". Models of this architecture cannot become a GGUF with this llama.cpp"
    return ""


def _serve_weights(model_base: Any, model: MergedModel, used: set[str], changed: set[str]) -> None:
    """Make the converter's list of tensors from the merged weights instead of files."""

    def index_tensors(
        self: Any, remote_hf_model_id: str | None = None
    ) -> dict[str, Callable[[], Any]]:
        found = {}
        for name in sorted(model.weights):
            item = self.filter_tensors((name, _generator(model.weights[name], used, changed)))
            if item:
                found[item[0]] = item[1]
            elif name in model.adapted:
                raise CommandError(
                    f"llama.cpp leaves out '{name}', which the adapter changes; merge to a model "
                    "folder instead: python -m export.merge_adapter",
                    MODEL,
                )
        return found

    model_base.index_tensors = index_tensors


def _generator(weight: MergedWeight, used: set[str], changed: set[str]) -> Callable[[], Any]:
    from conversion.base import LazyTorchTensor

    def compute(source: MergedWeight) -> Any:
        import torch

        values, differs = source.rows()
        used.add(source.name)
        if differs:
            changed.add(source.name)
        return torch.from_numpy(values)

    def generate() -> Any:
        import torch

        if weight.source.dtype not in FLOAT_BYTES:
            raise CommandError(
                f"'{weight.name}' is of type {weight.source.dtype}; expected a 16-bit or float32 "
                "model. Name the one it was made from: --base DIR",
                MODEL,
            )
        meta = LazyTorchTensor.meta_with_dtype_and_shape(torch.float32, weight.shape)
        tensor = LazyTorchTensor(meta=meta, args=(weight,), func=compute)
        tensor.weight_name = weight.name
        return tensor

    return generate


def _watch_renaming(writer: Any) -> Mapping[str, str]:
    """Find the tensors that the converter renames and leaves alone otherwise, while it works."""
    direct: dict[str, str] = {}
    modify = writer.modify_tensors

    def watched(data: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
        for new_name, tensor in modify(data, name, bid):
            if tensor is data and "weight_name" in vars(data):
                direct[new_name] = data.weight_name
            yield new_name, tensor

    writer.modify_tensors = watched
    return direct
