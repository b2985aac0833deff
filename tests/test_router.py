"""The command: train, explain, evaluate; and the figures of an evaluation."""

import json
import subprocess
import sys

import pytest

from integration._cli import MODEL, USAGE, CommandError
from integration.router import explain, main
from integration.router_evaluation import evaluate, load_cases, wilson_interval
from integration.router_report import evaluation_text, explanation_text
from tests.router_stubs import TOPICS, config_text, make_router

NAMES = ["json", "coding", "support"]


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    return make_router(tmp_path_factory.mktemp("router"))


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_evaluation_counts(router, tmp_path):
    path = write(
        tmp_path,
        {"prompt": TOPICS["json"], "adapter": "json"},
        {"prompt": TOPICS["coding"], "adapter": "support"},
        "",
        {"messages": [TOPICS["coding"], "and shorter"], "adapters": ["coding", "coding"]},
        {"messages": [TOPICS["support"], "hello"], "adapters": ["support", None]},
    )
    result = evaluate(router, load_cases(path, NAMES))
    assert (result["requests"], result["right"], result["accuracy"]) == (6, 5, 0.8333)
    assert (result["conversations"], result["conversations_right"]) == (2, 2)
    assert result["confusion"]["support"] == {"json": 0, "coding": 1, "support": 1, "base": 0}
    assert result["classes"]["coding"] == {"requests": 2, "precision": 0.6667, "recall": 1.0}
    assert [(one["line"], one["got"]) for one in result["wrong"]] == [(2, "coding")]
    text = evaluation_text(result)
    assert "5 of 6 right: 83.3%" in text
    assert "meant \\ got" in text
    assert "line 2, turn 1: support went to coding" in text


def test_abstention_is_counted(router, tmp_path):
    from dataclasses import replace

    from integration.routing import Router

    strict = Router(
        replace(router.data, settings=replace(router.data.settings, threshold=1.1)), router.encoder
    )
    cases = load_cases(write(tmp_path, {"prompt": TOPICS["json"], "adapter": "base"}), NAMES)
    assert evaluate(strict, cases)["abstained"] == 1
    assert evaluate(router, cases)["abstained"] == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 of .* is no JSON"),
        ("[]", "line 2 .* is no object"),
        ({"prompt": "x"}, "line 2 .* has the keys prompt"),
        ({"prompt": "x", "adapter": "nope"}, "line 2 .* adapter 'nope'"),
        ({"prompt": "x", "adapter": ["json"]}, "line 2 .* does not know"),
        ({"prompt": 3, "adapter": "json"}, "line 2 .* no text"),
        ({"messages": ["a"], "adapters": []}, "line 2 .* 1 messages and 0 adapters"),
        ({"messages": [], "adapters": []}, "line 2 .* 0 messages"),
    ],
)
def test_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(CommandError, match=message) as caught:
        load_cases(write(tmp_path, {"prompt": "x", "adapter": "json"}, row), NAMES)
    assert caught.value.exit_code == USAGE


def test_no_rows_and_no_file(tmp_path):
    with pytest.raises(CommandError, match="has no rows"):
        load_cases(write(tmp_path, ""), NAMES)
    with pytest.raises(CommandError, match="does not exist"):
        load_cases(tmp_path / "none.jsonl", NAMES)


def test_wilson_interval():
    # 8 of 10, z = 1.96: (0.8 + 0.19208) / 1.38416 = 0.71674 in the middle, half 0.22659.
    assert wilson_interval(8, 10) == pytest.approx((0.4901, 0.9433), abs=2e-4)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    assert wilson_interval(0, 10)[0] == pytest.approx(0.0)


def test_explanation_names_the_words_that_matter(router):
    found = explain(router, "my printer zebra")
    assert found["adapter"] == "support"
    changes = {one["word"]: one["change"] for one in found["words"]}
    assert changes["printer"] > 0
    assert changes["printer"] > changes["zebra"]
    assert len(found["nearest"]) == 3
    text = explanation_text(found)
    assert "adapter: support" in text
    assert "nearest examples:" in text


def test_explanation_of_nothing(router):
    found = explain(router, " ")
    assert (found["adapter"], found["nearest"], found["words"]) == (None, [], [])
    assert "the request is empty" in explanation_text(found)


def test_no_arguments_is_usage():
    done = subprocess.run(
        [sys.executable, "-m", "integration.router"], capture_output=True, text=True, check=False
    )
    assert done.returncode == USAGE
    assert "usage:" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["explain", "x", "--router", "no.npz"], MODEL, "there is no router 'no.npz'"),
        (["train", "--config", "no.yaml"], USAGE, "'no.yaml' does not exist"),
        (["train", "--encoder", "no.gguf"], MODEL, r"export\.export_embedding"),
        (["train", "--output", "router.txt"], USAGE, "no .npz at its end"),
    ],
)
def test_missing_input_is_one_line(arguments, code, message):
    with pytest.raises(CommandError, match=message) as caught:
        main(arguments)
    assert caught.value.exit_code == code


@pytest.mark.model
def test_train_explain_evaluate(embedding_gguf, tmp_path, capsys):
    config, output = tmp_path / "adapters.yaml", tmp_path / "out/router.npz"
    config.write_text(config_text(), encoding="utf-8")
    arguments = ["--config", str(config), "--encoder", str(embedding_gguf), "--output", str(output)]
    assert main(["train", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{output}\n"
    assert "cross-validation" in captured.err
    assert json.loads((output.parent / "report.json").read_text())["accuracy"] > 0.8

    assert main(["explain", "--json", "--router", str(output), "my wifi is broken, help"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapter"] == "support"

    rows = write(tmp_path, {"prompt": "a python function with a loop", "adapter": "coding"})
    assert main(["evaluate", str(rows), "--router", str(output)]) == 0
    assert "1 of 1 right" in capsys.readouterr().out


@pytest.mark.model
def test_embedding_that_changed_or_is_gone(embedding_gguf, tmp_path, monkeypatch):
    import shutil

    from integration.routing import Router

    encoder = tmp_path / "e.gguf"
    shutil.copyfile(embedding_gguf, encoder)
    config, output = tmp_path / "adapters.yaml", tmp_path / "router.npz"
    config.write_text(config_text(), encoding="utf-8")
    arguments = ["--config", str(config), "--encoder", str(encoder), "--output", str(output)]
    assert main(["train", *arguments]) == 0
    assert Router.load(output).names == NAMES
    moved = encoder.rename(tmp_path / "moved.gguf")
    with pytest.raises(CommandError, match="does not exist; make it") as caught:
        Router.load(output)
    assert caught.value.exit_code == MODEL
    assert Router.load(output, encoder_path=moved).names == NAMES
    with moved.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(CommandError, match="has changed since") as caught:
        Router.load(output, encoder_path=moved)
    assert caught.value.exit_code == MODEL
