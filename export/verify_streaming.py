"""Evaluate a model in float32 with the memory of about one decoder layer.

transformers builds the model without weights (accelerate's meta device). A layer's weights are read,
and merged, right before it runs, and dropped after; all rows go through in one batch, or few, so
that every weight is read once or few times. Of the embedding only the rows that occur are kept, and
the head is multiplied in portions.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export._cli import MODEL, CommandError
from export.merged_weights import MergedModel, MergedWeight, row_blocks
from export.verify_children import tell

if TYPE_CHECKING:
    import numpy as np
    import torch

# float32 values of a portion of the embedding or the head: 16 MB.
_BLOCK_VALUES = 1 << 22
# Bytes that activations may take beside the largest layer; a batch is cut to fit.
_ACTIVATION_BYTES = 256 << 20


class StreamedModel:
    """A causal language model whose weights are there only while they are used.

    Args:
        merged: Its weights and config.json.

    Raises:
        CommandError: Exit 3: transformers does not know the model, or names its weights otherwise.
    """

    def __init__(self, merged: MergedModel) -> None:
        from torch import nn

        model = _build_empty(merged.config)
        decoder = getattr(model, model.base_model_prefix, None)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not isinstance(decoder, nn.Module) or embedding is None or head is None:
            raise _unknown(model, "decoder, embedding and head at their usual places")
        names = {module: name for name, module in model.named_modules()}
        self._weights = merged.weights
        self._embedding = self._find(model, f"{names[embedding]}.weight")
        self._head = merged.weights.get(f"{names[head]}.weight", self._embedding)
        used = {self._embedding.name, self._head.name}
        largest = 0
        for name, module in _units(decoder, f"{model.base_model_prefix}."):
            if module is embedding:
                continue
            parts = {part: self._find(model, name + part) for part, _ in module.named_parameters()}
            used |= {weight.name for weight in parts.values()}
            largest = max(largest, sum(weight.source.num_weights for weight in parts.values()) * 4)
            module.register_forward_pre_hook(_loader(parts))
            module.register_forward_hook(_unloader(parts), always_call=True)
        lost = sorted(merged.adapted - used)
        if lost:
            raise _unknown(model, f"'{lost[0]}'")
        # An index that F.embedding checks against the rows that are there.
        embedding.padding_idx = None
        embedding.register_forward_pre_hook(self._load_embedding_rows)
        self._activation_bytes = max(_ACTIVATION_BYTES, largest)
        self._decoder = decoder
        self._tail = _Tail(self._head, merged.weights.get(f"{names[head]}.bias"))
        self._model = model
        # From here on the model's own forward does only what comes behind the decoder: the head,
        # and what some models do with logits (a scale, a soft cap).
        setattr(model, model.base_model_prefix, self._tail.decoder)
        model.set_output_embeddings(self._tail.head)

    def _find(self, model: Any, name: str) -> MergedWeight:
        weight = self._weights.get(name)
        if weight is None:
            raise _unknown(model, f"'{name}'")
        return weight

    def _load_embedding_rows(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        import torch

        used, places = torch.unique(args[0], return_inverse=True)
        module._parameters["weight"] = _parameter(_pick_rows(self._embedding, used.numpy()))
        return (places, *args[1:])

    @property
    def vocab_size(self) -> int:
        """Count the logits of a position."""
        return self._head.shape[0]

    def hidden(self, rows: Sequence[Sequence[int]]) -> "list[torch.Tensor]":
        """Run the decoder.

        Args:
            rows: Token ids, one sequence each. They are padded on the right; attention looks only
                to the left, so no token sees the padding and no mask is needed.

        Returns:
            The final hidden states, float32 (T, width) for each row.
        """
        import torch

        found: list[Any] = [None] * len(rows)
        with torch.inference_mode():
            for number, batch in enumerate(batches := list(self._batches(rows))):
                tell(f"evaluating the reference, batch {number + 1} of {len(batches)}")
                length = max(len(rows[index]) for index in batch)
                ids = torch.zeros(len(batch), length, dtype=torch.long)
                for place, index in enumerate(batch):
                    ids[place, : len(rows[index])] = torch.tensor(list(rows[index]))
                output = self._decoder(input_ids=ids, use_cache=False)
                self._tail.decoder.kind, states = type(output), output.last_hidden_state
                for place, index in enumerate(batch):
                    found[index] = states[place, : len(rows[index])].clone()
        return found

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Put rows of about the same length together, within the memory for activations."""
        config = self._model.config.get_text_config()
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        # A gated MLP holds about four of its width, attention about eight of the hidden size.
        token_bytes = 4 * (4 * inner + 8 * config.hidden_size)
        batch: list[int] = []
        for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
            needed = (len(batch) + 1) * len(rows[index]) * token_bytes
            if batch and needed > self._activation_bytes:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def logits(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Give the logits, float32 (n, V), of states (n, width) that `hidden` gave."""
        import torch

        with torch.inference_mode():
            self._tail.decoder.states = hidden[None]
            ids = torch.zeros(1, len(hidden), dtype=torch.long)
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
            return logits


def _build_empty(config: Mapping[str, Any]) -> Any:
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(dict(config)), encoding="utf-8")
        try:
            parsed = AutoConfig.from_pretrained(folder)
            # Buffers stay real: rotary frequencies are computed, not read.
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CommandError(
                f"transformers cannot build the reference's {config.get('model_type')!r} model: "
                f"{error}",
                MODEL,
            ) from error
    return model.eval()


def _units(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """List what is loaded at once: each layer of a list, and each other module with weights."""
    from torch import nn

    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            for index, layer in child.named_children():
                yield f"{prefix}{name}.{index}.", layer
        elif next(child.parameters(recurse=False), None) is not None:
            yield f"{prefix}{name}.", child
        else:
            yield from _units(child, f"{prefix}{name}.")


def _loader(parts: Mapping[str, MergedWeight]) -> Any:
    def load(module: Any, _: Any) -> None:
        for name, weight in parts.items():
            _set(module, name, _parameter(weight.rows()[0]))

    return load


def _unloader(parts: Mapping[str, MergedWeight]) -> Any:
    def unload(module: Any, *_: Any) -> None:
        import torch

        for name, weight in parts.items():
            empty = torch.nn.Parameter(torch.empty(weight.shape, device="meta"), False)
            _set(module, name, empty)

    return unload


def _set(module: Any, name: str, parameter: Any) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = parameter


def _parameter(values: "np.ndarray") -> Any:
    import torch

    return torch.nn.Parameter(torch.from_numpy(values), requires_grad=False)


def _pick_rows(weight: MergedWeight, indices: "np.ndarray") -> "np.ndarray":
    """Read rows in portions: shape (len(indices), width); indices ascend."""
    import numpy as np

    found = []
    for first, count in row_blocks(weight.shape[0], _BLOCK_VALUES // weight.shape[1]):
        wanted = indices[(indices >= first) & (indices < first + count)]
        if len(wanted):
            found.append(weight.rows(first, count)[0][wanted - first])
    return np.concatenate(found)


class _Tail:
    """Stand-ins: for the decoder, given hidden states; for the head, a product in portions."""

    def __init__(self, weight: MergedWeight, bias: MergedWeight | None) -> None:
        import torch

        class Decoder(torch.nn.Module):
            kind: Any = None
            states: Any = None

            def forward(self, *_: Any, **__: Any) -> Any:
                return self.kind(last_hidden_state=self.states)

        class Head(torch.nn.Module):
            def forward(self, states: Any) -> Any:
                logits = torch.empty(*states.shape[:-1], weight.shape[0])
                for first, count in row_blocks(weight.shape[0], _BLOCK_VALUES // weight.shape[1]):
                    rows = torch.from_numpy(weight.rows(first, count)[0])
                    logits[..., first : first + count] = states @ rows.T
                return logits if bias is None else logits + torch.from_numpy(bias.rows()[0])

        self.decoder: Any = Decoder()
        self.head: Any = Head()


def _unknown(model: Any, what: str) -> CommandError:
    return CommandError(
        f"the reference has weights other than transformers' {type(model).__name__} expects: "
        f"{what} not found; this kind of model cannot be verified",
        MODEL,
    )
