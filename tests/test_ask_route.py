"""`ask --route auto`, through the real command: a trained router, two adapters, a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import make_adapter

pytestmark = pytest.mark.model
ROOT = Path(__file__).parent.parent
PROMPTS = {
    "json": "Return the user Anna, 31, as a JSON object with the keys name and age.",
    "coding": "Write a Python function that reverses a list.",
    "base": "Why is the sky blue?",
}


@pytest.fixture(scope="module")
def built(tiny_model_dir, embedding_gguf, tmp_path_factory) -> dict[str, Path]:
    """A base, the adapters json and coding, and a router of the shipped examples."""
    from export.export_lora_gguf import main as export_lora
    from integration.router import main as route
    from tests.stock_chain import convert

    folder = tmp_path_factory.mktemp("routed")
    found = {"base": folder / "base.gguf", "router": folder / "router.npz"}
    convert(tiny_model_dir, found["base"])
    for seed, name in enumerate(("json", "coding"), 3):
        adapter = make_adapter(folder / f"{name}-run/adapter", tiny_model_dir, seed=seed)
        found[name] = folder / f"{name}.gguf"
        assert export_lora([str(adapter), "--output", str(found[name])]) == 0
    # The listed examples will do; training on the data sets as well takes longer.
    content = yaml.safe_load((ROOT / "integration/adapters.yaml").read_text(encoding="utf-8"))
    for entry in (*content["adapters"], content["base"]):
        del entry["examples_from"]
    config = folder / "adapters.yaml"
    config.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    train = ["train", "--config", str(config), "--encoder", str(embedding_gguf)]
    assert route([*train, "--output", str(found["router"])]) == 0
    return found


def ask(built, *options: str, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "integration.ask", "--model", str(built["base"]), *options]
    return subprocess.run(
        [*command, "--max-tokens", "4", "--n-ctx", "256", "--threads", "1", "--seed", "1"],
        input=stdin, capture_output=True, text=True, check=False, cwd=ROOT, timeout=100,
    )  # fmt: skip


def routed(built) -> list[str]:
    named = [part for n in ("json", "coding") for part in ("--adapter", f"{n}={built[n]}")]
    return [*named, "--router", str(built["router"]), "--route", "auto"]


def test_each_line_goes_to_its_adapter_and_answers_stay_in_order(built):
    requests = [{"id": n, "prompt": PROMPTS[name]} for n, name in enumerate([*PROMPTS] * 2)]
    requests.append({"id": 6, "prompt": "Anything", "adapter": "json:0.5+coding:0.5"})
    requests.append({"id": 7, "prompt": "Anything", "adapter": "cding"})
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = ask(built, *routed(built), "--jsonl", stdin=lines)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["id"] for answer in answers] == list(range(8))
    chosen = [answer["route"]["adapter"] for answer in answers]
    assert chosen[:6] == ["json", "coding", None] * 2
    assert chosen[6] == "coding:0.5+json:0.5"
    for answer in answers[:6]:
        scores = answer["route"]["scores"]
        assert set(scores) >= {"json", "coding", "base"}
        assert sum(scores.values()) == pytest.approx(1, abs=1e-3)
        assert answer["route"]["reason"]
    assert answers[6]["route"]["scores"] == {}
    assert "did you mean 'coding'?" in answers[7]["error"]
    assert done.returncode == 1


def test_plain_ask_tells_why(built):
    done = ask(built, *routed(built), PROMPTS["coding"])
    assert done.returncode == 0, done.stderr
    assert "route: coding (" in done.stderr
    assert "route:" not in done.stdout


def test_what_is_missing_is_one_line(built, tmp_path):
    done = ask(built, "--route", "auto", "--router", str(tmp_path / "no.npz"), "Hi")
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert "python -m integration.router train" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_adapters_unknown_to_the_router_are_told(built):
    options = ["--adapter", f"poems={built['json']}", "--router", str(built["router"])]
    done = ask(built, *options, "--route", "auto", "--json", PROMPTS["json"])
    assert "does not know the adapter 'poems' and never chooses it" in done.stderr
    assert json.loads(done.stdout)["route"]["adapter"] is None
    assert "not loaded" in json.loads(done.stdout)["route"]["reason"]
