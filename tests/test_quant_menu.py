"""The menu: true costs, no type that another one beats, and choices that keep their limit."""

import pytest

from export._cli import FAILED, USAGE, CommandError
from export.quant_menu import (
    MenuEntry,
    candidates,
    choose_by_kl,
    choose_by_size,
    format_menu,
    make_menu,
    parse_size,
)


def entry(name: str, size: int, *, needs: bool = False) -> MenuEntry:
    return MenuEntry(name, size, 8.0, 10, {}, needs)


MENU = [
    entry("F16", 1000),
    entry("Q8_0", 530),
    entry("Q6_K", 410),
    entry("Q4_K_M", 300),
    entry("Q3_K_M", 310),  # as with SmolLM2: larger than a better type
    entry("IQ4_XS", 280),
    entry("IQ2_XS", 150, needs=True),
]


def test_menu_counts_bits_and_fallbacks() -> None:
    plan = {
        "Q8_0": {
            "bytes": 400,
            "needs_imatrix": False,
            "tensors": [
                ["a.weight", [32, 8], "Q8_0", 272],
                ["b.weight", [16, 4], "F16", 128],
                ["n.weight", [4], "F32", 16],
            ],
        },
        "F16": {"bytes": 700, "needs_imatrix": False, "tensors": [["a.weight", [32, 8], "F16", 512]]},
    }  # fmt: skip
    large, small = make_menu(plan)
    assert (large.type_name, large.bits_per_weight, large.fallbacks) == ("F16", 16.0, {})
    assert small.bits_per_weight == pytest.approx(8 * (272 + 128 + 16) / (256 + 64 + 4))
    assert (small.num_matrices, small.fallbacks) == (2, {"F16": 1})
    text = format_menu([large, small], has_imatrix=False)
    assert "1 of 2 matrices fall back (1 F16)" in text


def test_types_that_another_one_beats_are_not_offered() -> None:
    names = ["F16", "Q8_0", "Q6_K", "Q4_K_M", "IQ4_XS"]
    assert [e.type_name for e in candidates(MENU, has_imatrix=False)] == names
    assert [e.type_name for e in candidates(MENU, has_imatrix=True)] == [*names, "IQ2_XS"]
    text = format_menu(MENU, has_imatrix=False).splitlines()
    assert next(line for line in text if line.startswith("Q3_K_M")).endswith("is no larger")
    assert next(line for line in text if line.startswith("IQ2_XS")).endswith("needs --imatrix")
    assert next(line for line in text if line.startswith("Q4_K_M")).endswith("8.00")


@pytest.mark.parametrize(
    ("text", "size"),
    [("700M", 700_000_000), ("1.5gb", 1_500_000_000), ("2GiB", 2 << 30), ("512k", 512_000), ("9", 9)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-5M", "0", "5T", "M"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(CommandError, match="expected a size such as 700M") as caught:
        parse_size(text)
    assert caught.value.exit_code == USAGE


@pytest.mark.parametrize(
    ("limit", "has_imatrix", "name"),
    [
        (5000, False, "F16"),
        (999, False, "Q8_0"),
        (300, False, "Q4_K_M"),
        (299, False, "IQ4_XS"),
        (200, True, "IQ2_XS"),
    ],
)
def test_the_best_type_that_fits(limit: int, has_imatrix: bool, name: str) -> None:
    assert choose_by_size(MENU, limit, has_imatrix) == name


def test_nothing_fits() -> None:
    with pytest.raises(CommandError, match=r"IQ4_XS, has 280; with --imatrix auto") as caught:
        choose_by_size(MENU, 279, has_imatrix=False)
    assert caught.value.exit_code == FAILED


@pytest.mark.parametrize(
    ("limit", "name"),
    [(0.0009, "F16"), (0.002, "Q8_0"), (0.049, "Q6_K"), (0.06, "Q4_K_M"), (9.0, "IQ2_XS")],
)
def test_the_smallest_type_that_is_close_enough(limit: float, name: str) -> None:
    kl = {"F16": 1e-4, "Q8_0": 1e-3, "Q6_K": 0.01, "Q4_K_M": 0.05, "IQ4_XS": 0.1, "IQ2_XS": 1.0}
    measured: list[str] = []

    def measure(type_name: str) -> float:
        measured.append(type_name)
        return kl[type_name]

    assert choose_by_kl(MENU, limit, True, measure) == name
    assert len(measured) <= 3, "six types, halved"
    assert name in measured


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_no_type_is_close_enough(value: float) -> None:
    with pytest.raises(CommandError, match=r"no type reaches a mean KL divergence of 0\.01: F16"):
        choose_by_kl(MENU, 0.01, False, lambda _: value)
