"""What every export begins with: adapters and their weights, the base, training's tokenizer.

In: the command line. Out: `Inputs`, read and checked; nothing is computed yet.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export._cli import USAGE, CommandError
from export.adapter_files import Adapter, read_adapter
from export.base_model import BaseModel, check_provenance, load_base, open_base
from export.merged_weights import MergedModel, plan_weights
from export.tokenizer_files import tokenizer_sources


@dataclass(frozen=True)
class Inputs:
    """Checked inputs of an export.

    Attributes:
        adapters: Each with its weight; the first one is the run's, and brings the tokenizer. None
            for the plain base.
        tokenizer: Where each tokenizer file comes from.
        model: What the merged weights are made of.
    """

    adapters: tuple[tuple[Adapter, float], ...]
    base: BaseModel
    tokenizer: dict[str, Path]
    model: MergedModel

    @property
    def adapter(self) -> Adapter:
        """The run's adapter."""
        return self.adapters[0][0]


def open_inputs(
    adapter_dir: Path,
    base_dir: Path | None = None,
    *,
    weight: float = 1.0,
    more: Sequence[tuple[Path, float]] = (),
) -> Inputs:
    """Read adapters, base and tokenizer, and check that they belong together.

    Args:
        adapter_dir: What training wrote.
        base_dir: The 16-bit base, when the one that the adapter names is not to be used.
        weight: How much of the adapter is added; 1.0 as trained.
        more: Further adapters of the same base, with weights.

    Raises:
        CommandError: Exit 3: one of them is unusable, or they do not belong together.
    """
    adapter = read_adapter(adapter_dir)
    base = load_base(adapter, base_dir)
    adapters = [(adapter, weight)]
    for folder, share in more:
        other = read_adapter(folder)
        check_provenance(other, base)
        adapters.append((other, share))
    model = plan_weights(base, adapters)
    return Inputs(tuple(adapters), base, tokenizer_sources(adapter_dir, base.path), model)


def open_base_inputs(name: str) -> Inputs:
    """Read a base that is exported as it is, with its own tokenizer.

    Raises:
        CommandError: Exit 3: see `open_base`.
    """
    base = open_base(name)
    tokenizer = tokenizer_sources(base.path, base.path)
    return Inputs((), base, tokenizer, plan_weights(base, []))


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    """Add the adapter, its base, and further adapters to a command line."""
    parser.add_argument("adapter_dir", type=Path, help="PEFT adapter folder, as training wrote it")
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="16-bit base (default: the one the adapter names)"
    )
    parser.add_argument(
        "--weight", type=float, default=1.0, metavar="W", help="how much of the adapter (default 1)"
    )
    parser.add_argument(
        "--add-adapter",
        action="append",
        default=[],
        metavar="DIR[=W]",
        help="merge another adapter of the same base too, weighted; repeatable",
    )


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Read what `add_adapter_options` asked for.

    Raises:
        CommandError: Exit 2: a weight that is no number. Exit 3: see `open_inputs`.
    """
    more = [_parse_weighted(text) for text in args.add_adapter]
    if not math.isfinite(args.weight) or args.weight == 0:
        raise CommandError(f"--weight {args.weight:g}; expected a number other than 0", USAGE)
    return open_inputs(args.adapter_dir, args.base, weight=args.weight, more=more)


def _parse_weighted(text: str) -> tuple[Path, float]:
    """Read `DIR` or `DIR=WEIGHT`; a folder whose name has a '=' is taken as it is."""
    folder, separator, number = text.rpartition("=")
    if not separator or Path(text).is_dir():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise CommandError(
            f"--add-adapter '{text}': '{number}' is no weight; expected DIR=NUMBER, not 0", USAGE
        )
    return Path(folder), weight
