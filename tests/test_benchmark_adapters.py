"""The adapters' benchmark: ratios against targets, and one line where nothing is built."""

import pytest

from scripts._cli import MODEL, CommandError
from scripts.adapters_demo import main as demo
from scripts.benchmark_adapters import find_built, judge_adapters

FIGURES = {
    "first_token_after_switch_s": 0.02,
    "anew_s": 1.8,
    "reloaded_s": 2.0,
    "merged_8_resident_mb": 1800.0,
    "adapters_8_resident_mb": 560.0,
    "decode_merged_tokens_per_second": 130.0,
    "decode_adapter_tokens_per_second": 100.0,
    "merged_kl_divergence": 2e-6,
}


def missed(**changes: float) -> list[str]:
    return [one["name"] for one in judge_adapters({**FIGURES, **changes}) if not one["met"]]


def test_good_figures_meet_every_target():
    assert len(judge_adapters(FIGURES)) == 5
    assert missed() == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"anew_s": 0.3}, "switch: prompt read anew / kept"),
        ({"reloaded_s": 0.3}, "switch: base loaded anew / kept"),
        ({"adapters_8_resident_mb": 1000}, "memory: 8 merged models / base and 8 adapters"),
        ({"decode_merged_tokens_per_second": 90}, "decode: merged / base and adapter"),
        ({"merged_kl_divergence": 1e-3}, "KL divergence of base and adapter from merged, F16"),
    ],
)
def test_each_target_can_be_missed(changes, name):
    assert missed(**changes) == [name]


def test_nothing_built_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in (find_built, lambda: demo([])):
        with pytest.raises(CommandError, match="build them: make adapters") as caught:
            run()
        assert caught.value.exit_code == MODEL


def test_what_is_built_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (
        "outputs/smollm2-135m-base/gguf/x-Q8_0.gguf",
        "outputs/smollm2-135m-json-cpu/gguf/x-LoRA.gguf",
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    base, adapters = find_built()
    assert base.name == "x-Q8_0.gguf"
    assert list(adapters) == ["json"]
    with pytest.raises(CommandError, match=r"'coding' is not built.*adapters.sh coding"):
        demo([])
