"""Training through the real command on a tiny random model: results, refusals, and lack of memory."""

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts import train_lora
from scripts._cli import CommandError
from scripts.checkpoints import defect, newest_whole
from scripts.model_loading import resolve_model
from scripts.provenance import base_fingerprint
from scripts.recipe import TrainingRecipe
from tests.tiny_runs import (
    difference,
    losses_of,
    metrics_of,
    run_training,
    same_bits,
    tiny_recipe,
    weights_of,
    write_recipe,
)

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def base_run(tiny_model_dir, tmp_path_factory) -> Path:
    """A finished run of four steps, each of two micro-batches of two rows. Copy, do not change."""
    folder = tmp_path_factory.mktemp("train")
    recipe = write_recipe(folder, tiny_model_dir)
    assert train_lora.main(["--config", str(recipe)]) == 0
    return folder / "outputs/tiny"


@pytest.fixture
def train(base_run, tiny_model_dir, tmp_path):
    """Train with some recipe keys changed, on the same rows; give the run's folder."""

    def train(**values) -> Path:
        rows = str(base_run.parent.parent / "rows.jsonl")
        settings = {"dataset_name": rows, **values}
        recipe = TrainingRecipe(**tiny_recipe(tmp_path, tiny_model_dir, **settings))
        assert train_lora.train(recipe) == recipe.run_dir / "adapter"
        return recipe.run_dir

    return train


@pytest.fixture
def trainer_module(base_run):
    """`scripts.adapter_trainer`, imported after the back end that patches TRL."""
    from scripts import adapter_trainer

    return adapter_trainer


def provenance_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "provenance.json").read_text())


def checkpoints_of(run_dir: Path) -> dict[str, Path]:
    return {path.name: path for path in run_dir.glob("checkpoints/*/checkpoint-*")}


# Results


def test_run_writes_what_it_promises(base_run, tiny_model_dir):
    names = {path.name for path in (base_run / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert (base_run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (base_run / ".adapter.tmp").exists()
    config = json.loads((base_run / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(tiny_model_dir))
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert all(defect(path) is None for path in checkpoints_of(base_run).values())


def test_metrics_have_a_line_for_each_step_and_measurement(base_run):
    rows = metrics_of(base_run)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]
    assert {row["padding"] for row in steps} == {0.0}
    assert [row["tokens"] for row in steps] == sorted(row["tokens"] for row in steps)
    assert all(row["tokens_per_second"] > 0 and row["grad_norm"] > 0 for row in steps)
    assert steps[0]["learning_rate"] == pytest.approx(2e-3)
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert held_out[1] < held_out[0]  # it learns


def test_provenance_names_everything_the_adapter_depends_on(base_run, tiny_model_dir):
    provenance = provenance_of(base_run)
    assert provenance["base_model"]["fingerprint"] == base_fingerprint(tiny_model_dir)
    assert {"torch", "peft", "trl", "transformers", "python"} <= provenance["versions"].keys()
    assert len(provenance["dataset"]["input_hash"]) == 64
    training = provenance["training"]
    expected = {
        "steps": 4,
        "resumed_from": 0,
        "best_step": 4,
        "padding": 0.0,
        "rows": 24,
        "rows_per_forward": 2,
        "skipped_steps": 0,
        "devices": 1,
        "seed": 3407,
    }
    assert {key: training[key] for key in expected} == expected
    rows = metrics_of(base_run)
    assert training["tokens"] == max(row.get("tokens", 0) for row in rows)
    assert training["held_out_loss"] == rows[-2]["eval_loss"]


def test_second_call_is_up_to_date(base_run, capsys):
    before = (base_run / "adapter/adapter_model.safetensors").stat().st_mtime_ns
    assert train_lora.main(["--config", str(base_run / "recipe.yaml")]) == 0
    out, err = capsys.readouterr()
    assert "is up to date" in err
    assert out == f"{base_run}/adapter\n"
    assert (base_run / "adapter/adapter_model.safetensors").stat().st_mtime_ns == before


def test_same_seed_same_bytes_and_another_seed_others(base_run, train):
    file = "adapter/adapter_model.safetensors"
    again = train(run_name="again", logging_steps=3)
    assert (again / file).read_bytes() == (base_run / file).read_bytes()
    assert [row["step"] for row in metrics_of(again) if "loss" in row] == [3, 4]
    assert not same_bits(train(seed=3408, max_steps=2) / "adapter", base_run / "adapter")


def test_tuned_model_is_measured_to_be_better(base_run, capsys):
    from scripts import evaluate_model

    few = ["--eval-prompts", "2", "--eval-answer-tokens", "8"]
    assert evaluate_model.main(["--config", str(base_run / "recipe.yaml"), *few]) == 0
    result = json.loads((base_run / "evaluation.json").read_text())
    answers = result["prompts"][0]["answers"]
    assert answers["base (HF)"]["tokens"] == answers["tuned (HF)"]["tokens"] == 8
    assert answers["base (HF)"]["text"] != answers["tuned (HF)"]["text"]
    assert result["tuned"]["loss"] < result["base"]["loss"] - 0.1
    # The trainer measured the same rows at its last step.
    measured = provenance_of(base_run)["training"]["held_out_loss"]
    assert result["tuned"]["loss"] == pytest.approx(measured, abs=0.02)


@pytest.mark.parametrize("flag", ["use_rslora", "use_dora"])
def test_variants_of_lora_are_trained_and_named(flag, base_run, train):
    from safetensors import safe_open

    run_dir = train(**{flag: True}, max_steps=2)
    config = json.loads((run_dir / "adapter/adapter_config.json").read_text())
    assert config[flag] is True
    with safe_open(run_dir / "adapter/adapter_model.safetensors", "pt") as weights:
        magnitudes = [name for name in weights.keys() if "magnitude" in name]  # noqa: SIM118
    assert bool(magnitudes) is (flag == "use_dora")
    assert all(loss < 12 for loss in losses_of(run_dir).values())


def test_tool_rows_are_trained_and_held_out(train):
    run_dir = train(
        dataset_name="scripts/data/finetome_sample.jsonl",
        max_rows=40,
        tool_rows=40,
        max_length=512,
        max_steps=1,
    )
    tool_rows = (run_dir / "data/eval_tools.jsonl").read_text().splitlines()
    trained = (run_dir / "data/train.jsonl").read_text().splitlines()
    assert tool_rows
    assert any("tool_call" in row for row in trained)
    assert provenance_of(run_dir)["training"]["rows"] <= len(trained)


def test_peft_back_end_agrees_with_unsloth(base_run, tiny_model_dir, tmp_path):
    rows = str(base_run.parent.parent / "rows.jsonl")
    recipe = write_recipe(tmp_path, tiny_model_dir, dataset_name=rows, backend="peft", max_steps=2)
    done = run_training(recipe)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "outputs/tiny"
    assert done.stdout == f"{run_dir}/adapter\n"
    assert "Unsloth" not in done.stderr
    theirs, ours = losses_of(base_run), losses_of(run_dir)
    assert ours[1] == pytest.approx(theirs[1], abs=5e-3)
    assert abs(theirs[2] - theirs[1]) > 5e-2  # another step's rows are further away


def test_padded_batches_train_the_same(base_run, train, capsys):
    run_dir = train(packing=False)
    assert provenance_of(run_dir)["training"]["padding"] > 0.02
    for step, loss in losses_of(run_dir).items():
        assert loss == pytest.approx(losses_of(base_run)[step], abs=1e-2)


# Which weights are kept, and when a run ends


def test_best_checkpoint_is_picked_and_early_stopping_stops(train, capsys):
    run_dir = train(
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_steps=6,
        save_steps=1,
        early_stopping_patience=2,
    )
    held_out = [row["eval_loss"] for row in metrics_of(run_dir) if "eval_loss" in row]
    best = 1 + held_out.index(min(held_out))
    assert len(held_out) == best + 2 < 6
    training = provenance_of(run_dir)["training"]
    assert (training["best_step"], training["steps"]) == (best, best + 2)
    checkpoints = checkpoints_of(run_dir)
    assert same_bits(run_dir / "adapter", checkpoints[f"checkpoint-{best}"])
    assert not same_bits(run_dir / "adapter", checkpoints[f"checkpoint-{best + 2}"])
    assert "stopped early" in capsys.readouterr().err


def test_interrupted_run_goes_on_from_the_step_it_reached(
    base_run, train, trainer_module, monkeypatch, capsys
):
    own, stops = trainer_module.SFTTrainer.training_step, [signal.SIGINT]

    def interrupted_step(self, *args, **kwargs):
        if self.state.global_step == 2 and stops:
            signal.raise_signal(stops.pop())
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.SFTTrainer, "training_step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            train()
    assert "the same command goes on from there" in capsys.readouterr().err
    run_dir = train()
    assert "going on from step 3 " in capsys.readouterr().err
    assert provenance_of(run_dir)["training"]["resumed_from"] == 3
    assert losses_of(run_dir) == losses_of(base_run)
    assert same_bits(run_dir / "adapter", base_run / "adapter")


def test_run_that_died_before_its_adapter_was_written_only_writes_it(
    base_run, train, tmp_path, capsys
):
    run_dir = tmp_path / "outputs/tiny"
    shutil.copytree(base_run, run_dir)
    shutil.rmtree(run_dir / "adapter")
    assert train() == run_dir
    assert same_bits(run_dir / "adapter", base_run / "adapter")
    said = capsys.readouterr().err
    assert "going on from step 4 " in said
    assert "train: 0 steps" in said
    assert losses_of(run_dir) == losses_of(base_run)


def test_run_that_stopped_early_does_not_train_on_when_its_adapter_is_lost(train):
    settings = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 6}
    settings |= {"save_steps": 1, "early_stopping_patience": 2}
    run_dir = train(**settings)
    steps = list(losses_of(run_dir))
    assert len(steps) < 6
    (run_dir / "adapter").replace(run_dir / "former")
    train(**settings)
    assert list(losses_of(run_dir)) == steps
    assert same_bits(run_dir / "adapter", run_dir / "former")


def test_changed_recipe_starts_anew_and_names_the_key(base_run, train, capsys):
    run_dir = train(max_steps=1)
    first = next(iter(checkpoints_of(run_dir).values()))
    train(max_steps=1, learning_rate=1e-3, save_total_limit=3)
    messages = capsys.readouterr().err
    assert "starting anew" in messages
    assert "(learning_rate 0.002 -> 0.001)" in messages  # the limit changes nothing that is trained
    assert "the former adapter is kept as" in messages
    assert first.is_dir()
    assert len(list(run_dir.glob("adapter-until-*"))) == 1
    assert list(losses_of(run_dir)) == [1]


# What goes wrong


def test_loss_that_is_not_a_number_stops_before_a_checkpoint(
    train, trainer_module, monkeypatch, tmp_path
):
    own = trainer_module.AdapterTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = own(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss

    monkeypatch.setattr(trainer_module.AdapterTrainer, "compute_loss", poisoned)
    with pytest.raises(CommandError, match="stopped at step 3: the loss became nan") as caught:
        train(save_steps=1)
    assert caught.value.exit_code == 1
    run_dir = tmp_path / "outputs/tiny"
    assert not (run_dir / "adapter").exists()
    checkpoints = checkpoints_of(run_dir)
    assert "checkpoint-3" not in checkpoints
    good = checkpoints["checkpoint-2"]
    assert str(caught.value).endswith(f"the last good checkpoint is {good}")
    assert newest_whole(good.parent) == good
    weights = weights_of(good).values()
    assert all(bool(weight.isfinite().all()) for weight in weights)


@pytest.fixture
def scarce_memory(trainer_module, monkeypatch):
    """Let every forward pass of several rows run out of memory, after it changed the gradients."""
    own = trainer_module.SFTTrainer.training_step
    seen: list[int] = []

    def step(self, model, inputs, num_items_in_batch=None):
        seen.append(trainer_module.padding_free.num_rows(inputs))
        loss = own(self, model, inputs, num_items_in_batch)
        # The first micro-batch still fits, so there are gradients to lose.
        if len(seen) > 1 and seen[-1] > 1:
            raise torch.OutOfMemoryError("pretended")
        return loss

    monkeypatch.setattr(trainer_module.SFTTrainer, "training_step", step)
    return seen


def test_run_out_of_memory_goes_on_with_fewer_rows(base_run, train, scarce_memory, capsys):
    run_dir = train()
    assert scarce_memory[:4] == [2, 2, 1, 1]
    assert set(scarce_memory[2:]) == {1}
    assert "out of memory; 1 rows instead of 2" in capsys.readouterr().err
    assert provenance_of(run_dir)["training"]["rows_per_forward"] == 1
    for step, loss in losses_of(run_dir).items():
        assert loss == pytest.approx(losses_of(base_run)[step], abs=1e-2)
    assert difference(run_dir / "adapter", base_run / "adapter") < 0.05


def test_run_out_of_memory_twice_halves_twice(base_run, train, trainer_module, monkeypatch):
    own, seen = trainer_module.SFTTrainer.training_step, []

    def step(self, model, inputs, num_items_in_batch=None):
        seen.append(trainer_module.padding_free.num_rows(inputs))
        if seen[-1] > 1:
            raise RuntimeError("[enforce fail] not enough memory: you tried to allocate 9 bytes")
        return own(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(trainer_module.SFTTrainer, "training_step", step)
    run_dir = train(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert seen[:6] == [4, 2, 1, 1, 1, 1]
    assert difference(run_dir / "adapter", base_run / "adapter") < 0.05


def test_gradients_of_a_failed_pass_would_be_seen(
    base_run, train, scarce_memory, trainer_module, monkeypatch
):
    monkeypatch.setattr(trainer_module.AdapterTrainer, "trained_weights", lambda self: [])
    run_dir = train()
    assert difference(run_dir / "adapter", base_run / "adapter") > 0.1


def test_single_row_out_of_memory_is_one_line(train, trainer_module, monkeypatch):
    def step(self, *args, **kwargs):
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(trainer_module.SFTTrainer, "training_step", step)
    with pytest.raises(CommandError, match="use_gradient_checkpointing: true") as caught:
        train(per_device_train_batch_size=1)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_other_errors_are_no_lack_of_memory(train, trainer_module, monkeypatch):
    def step(self, *args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(trainer_module.SFTTrainer, "training_step", step)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train()


def test_lack_of_memory_in_the_probe_is_answered_too(train, trainer_module, monkeypatch):
    own = trainer_module.AdapterTrainer.compute_loss

    def loss(self, model, inputs, *args, **kwargs):
        if trainer_module.padding_free.num_rows(inputs) > 1:
            raise torch.OutOfMemoryError("pretended")
        return own(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer_module.AdapterTrainer, "compute_loss", loss)
    assert provenance_of(train(max_steps=1))["training"]["rows_per_forward"] == 1


def test_torchs_own_errors_are_known(trainer_module):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert trainer_module.is_out_of_memory(caught.value)
    assert trainer_module.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert trainer_module.is_out_of_memory(MemoryError())
    assert not trainer_module.is_out_of_memory(RuntimeError("shapes do not match"))


def test_weights_that_are_not_finite_are_no_checkpoint(trainer_module):
    weight = torch.nn.Parameter(torch.tensor([1.0, float("inf")]))
    trainer = SimpleNamespace(
        trained_weights=lambda: [weight], state=SimpleNamespace(global_step=7)
    )
    with pytest.raises(CommandError, match="not finite at step 7"):
        trainer_module.AdapterTrainer._save_checkpoint(trainer, None, None)


def refused(folder: Path, model_dir: Path, **values) -> CommandError:
    with pytest.raises(CommandError) as caught:
        train_lora.main(["--config", str(write_recipe(folder, model_dir, **values))])
    assert "\n" not in str(caught.value)
    return caught.value


def test_folder_without_tokenizer_is_exit_3(tiny_model_dir, tmp_path):
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model_dir)
    for path in model_dir.glob("tokenizer*"):
        path.unlink()
    error = refused(tmp_path, model_dir)
    assert str(error).startswith(f"model '{model_dir}' has no tokenizer")
    assert error.exit_code == 3


def test_missing_data_set_is_exit_2(tiny_model_dir, tmp_path):
    assert refused(tmp_path, tiny_model_dir, dataset_name="nowhere.jsonl").exit_code == 2


def test_rows_that_do_not_fit_are_exit_2(tiny_model_dir, tmp_path):
    error = refused(tmp_path, tiny_model_dir, max_length=16)
    assert "raise max_length" in str(error)
    assert error.exit_code == 2


def test_unknown_recipe_key_is_one_line_and_exit_2(tiny_model_dir, tmp_path):
    done = run_training(write_recipe(tmp_path, tiny_model_dir, lora_rank=4))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "unknown key 'lora_rank', did you mean" in done.stderr


def test_evaluation_before_training_says_what_to_do(tiny_model_dir, tmp_path):
    from scripts import evaluate_model

    recipe = write_recipe(tmp_path, tiny_model_dir)
    with pytest.raises(CommandError, match=r"python -m scripts\.train_lora") as caught:
        evaluate_model.main(["--config", str(recipe)])
    assert caught.value.exit_code == 3


def test_folder_that_is_no_model(tmp_path):
    with pytest.raises(CommandError, match=r"has no config\.json"):
        resolve_model(TrainingRecipe(model_name_or_path=str(tmp_path)))


def test_hub_name_is_left_to_the_hub():
    name = "mistralai/Mistral-7B-v0.3"
    assert resolve_model(TrainingRecipe(model_name_or_path=name)) == name


def test_fingerprint_sees_a_changed_weight(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    assert base_fingerprint(tmp_path / "model") == base_fingerprint(tiny_model_dir)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert base_fingerprint(tmp_path / "model") != base_fingerprint(tiny_model_dir)
    assert base_fingerprint(Path("mlabonne/nothing")) is None


def test_training_and_export_agree_on_the_fingerprint(tiny_model_dir):
    from export.base_model import base_fingerprint as theirs

    assert theirs(tiny_model_dir) == base_fingerprint(tiny_model_dir)


def test_tracker_that_is_not_installed_is_named_before_anything_is_loaded(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train_lora.importlib.util, "find_spec", lambda name: None)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"run_name: r\noutput_root: {tmp_path}\nreport_to: wandb\n")
    with pytest.raises(CommandError, match="wandb is not installed; pip install wandb"):
        train_lora.main(["--config", str(recipe)])
    assert capsys.readouterr().err == ""
