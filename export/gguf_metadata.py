"""The keys by which a GGUF tells where it comes from: `general.*` of the standard, our `tomeforge.*`.

In: `RunFacts`, of a run or of a plain base. Out: keys and values for the GGUF writer, nothing that
was not recorded.
"""

from typing import Any

from export.naming import VERSION, base_of, model_name, plain_name
from export.run_facts import RunFacts

TAGS = ("gguf", "lora", "tomeforge")

MetadataValue = str | int | float | bool | list[str]


def value_type(value: MetadataValue) -> Any:
    """Give the `gguf.GGUFValueType` that a value is written as."""
    from gguf import GGUFValueType

    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        list: GGUFValueType.ARRAY,
    }
    return kinds.get(type(value), GGUFValueType.STRING)


def gguf_metadata(
    facts: RunFacts,
    *,
    name: str | None = None,
    version: str = VERSION,
    base_fingerprint: str | None = None,
    adapter_sha256: str | None = None,
) -> list[tuple[str, MetadataValue]]:
    """Give the keys that tell where a GGUF comes from, in a stable order.

    Keys as in gguf-py's `Keys.General`; what was not recorded has no key. `int` is meant as
    uint32 (`general.sampling.top_k`: int32), `float` as float32.

    Args:
        facts: Of the run.
        name: `general.name`, if the user chose one.
        version: Of this model, `1.0`.
        base_fingerprint: `BaseModel.fingerprint`.
        adapter_sha256: Of the adapter's weights.
    """
    ours = model_name(facts.base_name, facts.num_weights, facts.run_name, version)
    keys: list[tuple[str, MetadataValue | None]] = [
        *[(f"general.sampling.{key}", value) for key, value in facts.sampling.items()],
        ("general.name", name or ours.title),
        ("general.version", f"v{ours.version}"),
        ("general.finetune", ours.finetune),
        ("general.basename", ours.base_name),
        ("general.description", f"{facts.base_name}, fine-tuned with LoRA (Tomeforge)"),
        ("general.quantized_by", "Tomeforge"),
        ("general.size_label", ours.size_label),
        *_origin(facts),
        ("general.dataset.count", len(facts.datasets) or None),
    ]
    for number, dataset in enumerate(facts.datasets):
        organization, _, bare = dataset.name.rpartition("/")
        keys += [
            (f"general.dataset.{number}.name", bare),
            (f"general.dataset.{number}.version", dataset.version),
            (f"general.dataset.{number}.organization", organization or None),
            (f"general.dataset.{number}.repo_url", dataset.url),
        ]
    held_out = facts.held_out
    keys += [
        ("general.tags", ["text-generation", *TAGS]),
        ("general.languages", list(facts.languages) or None),
        ("tomeforge.lora.rank", facts.lora.rank),
        ("tomeforge.lora.alpha", facts.lora.alpha),
        ("tomeforge.lora.rslora", facts.lora.rslora),
        ("tomeforge.lora.dora", facts.lora.dora),
        ("tomeforge.base.fingerprint", base_fingerprint),
        ("tomeforge.adapter.sha256", adapter_sha256),
        ("tomeforge.held_out.loss_before", held_out.loss_before if held_out else None),
        ("tomeforge.held_out.loss_after", held_out.loss_after if held_out else None),
    ]
    # The organization is the maker's; this file's maker is not on record, so it has none.
    return [(key, value) for key, value in keys if value is not None]


def base_metadata(
    facts: RunFacts, *, name: str | None = None, base_fingerprint: str
) -> list[tuple[str, MetadataValue]]:
    """Give the keys of a base that is no more than converted, in a stable order.

    Args:
        facts: See `read_base_facts`.
        name: `general.name`, if the user chose one.
        base_fingerprint: `BaseModel.fingerprint`; a LoRA GGUF of this base has the same.
    """
    ours = plain_name(facts.base_name, facts.num_weights)
    version = base_of(facts.base_name, facts.num_weights).version
    keys: list[tuple[str, MetadataValue | None]] = [
        *[(f"general.sampling.{key}", value) for key, value in facts.sampling.items()],
        ("general.name", name or ours.title),
        ("general.version", version),
        ("general.basename", ours.base_name),
        ("general.description", f"{facts.base_name}, converted as it is (Tomeforge)"),
        ("general.quantized_by", "Tomeforge"),
        ("general.size_label", ours.size_label),
        *_origin(facts),
        ("general.tags", ["text-generation", *(tag for tag in TAGS if tag != "lora")]),
        ("general.languages", list(facts.languages) or None),
        ("tomeforge.base.fingerprint", base_fingerprint),
    ]
    return [(key, value) for key, value in keys if value is not None]


def _origin(facts: RunFacts) -> list[tuple[str, MetadataValue | None]]:
    """Give the licence, and the model that the file is made from."""
    base_word = facts.base_name.rpartition("/")[2]
    return [
        ("general.license", facts.license),
        ("general.license.name", facts.license_name),
        ("general.license.link", facts.license_link),
        ("general.base_model.count", 1),
        ("general.base_model.0.name", base_word.replace("-", " ")),
        ("general.base_model.0.version", _base_version(facts)),
        ("general.base_model.0.organization", facts.organization),
        ("general.base_model.0.repo_url", facts.repo_url),
    ]


def _base_version(facts: RunFacts) -> str | None:
    # A branch's name tells nothing later on; a tag or a commit does.
    revision = None if facts.base_revision in ("main", "master") else facts.base_revision
    return revision or base_of(facts.base_name, facts.num_weights).version
