"""What the preflight gathers: the GGUF types that the pipeline will export."""

import pytest

from export._cli import CommandError
from export.type_plan import parse_types
from scripts.plan_run import _quantizations


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Q4_K_M", ["Q4_K_M"]),
        ("f16,q8_0", ["F16", "Q8_0"]),
        (" Q8_0 , q8_0, Q6_K,", ["Q8_0", "Q6_K"]),
    ],
)
def test_types_are_read_as_the_export_reads_them(monkeypatch, text, kinds):
    monkeypatch.setenv("QUANTIZATION", text)
    assert _quantizations() == kinds == parse_types(text)


def test_without_a_choice_the_types_are_those_of_the_pipeline(monkeypatch):
    monkeypatch.setenv("QUANTIZATION", "")  # as unset: ${QUANTIZATION:-…}
    empty = _quantizations()
    monkeypatch.delenv("QUANTIZATION")
    assert empty == _quantizations() == ["F16", "Q8_0", "Q4_K_M"]


def test_an_unknown_type_is_the_exports_to_refuse(monkeypatch):
    monkeypatch.setenv("QUANTIZATION", "Q9_X")
    assert _quantizations() == ["Q9_X"]  # priced as F16 until then
    with pytest.raises(CommandError, match="'Q9_X' is unknown"):
        parse_types("Q9_X")
