"""Recipe: default < YAML < flag, and errors that name key and way out."""

import dataclasses
from pathlib import Path

import pytest

from scripts._cli import CommandError
from scripts.recipe import TrainingRecipe, parse_recipe, write_atomically

RECIPES = sorted(Path("scripts/recipes").rglob("*.yaml"))


def parse(*argv: str) -> TrainingRecipe:
    return parse_recipe("test", list(argv))[0]


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flag_beats_yaml_beats_default(tmp_path):
    config = write(tmp_path, "learning_rate: 2e-4\nlora_r: 8\n")
    recipe = parse("--config", config, "--lora-r", "4")
    assert (recipe.learning_rate, recipe.lora_r, recipe.seed) == (2e-4, 4, 3407)
    assert recipe.run_name == "mine"


def test_scientific_notation_is_a_number(tmp_path):
    recipe = parse("--config", write(tmp_path, "learning_rate: 2e-4"))
    assert recipe.learning_rate == pytest.approx(0.0002)
    assert isinstance(recipe.learning_rate, float)


@pytest.mark.parametrize("flag", ["--learning-rate", "--learning_rate"])
def test_both_spellings_of_a_flag(tmp_path, flag):
    assert parse("--config", write(tmp_path, "{}"), flag, "1e-3").learning_rate == 1e-3


def test_unknown_key_names_the_nearest(tmp_path):
    with pytest.raises(
        CommandError, match=r"unknown key 'learning_rat', did you mean 'learning_rate'"
    ):
        parse("--config", write(tmp_path, "learning_rat: 1"))


def test_all_mistakes_are_reported_at_once(tmp_path):
    config = write(tmp_path, "lora_rr: 8\nmax_length: long\nload_in_4bit: perhaps\n")
    with pytest.raises(CommandError, match=r"lora_rr.*max_length: got 'long'.*load_in_4bit"):
        parse("--config", config)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lora_r: 0", "lora_r: got 0, expected at least 1"),
        ("prompt_format: zephyr", "expected model or alpaca"),
        ("lr_scheduler_type: cosin", "expected linear or cosine"),
        ("lora_dropout: 1", "expected at least 0 and less than 1"),
        ("seed: 1.5", "seed: got 1.5, expected int"),
        ("lora_r: true", "lora_r: got True, expected int"),
        ("- a\n- b", "holds a list"),
        ("a: [", "no valid YAML"),
    ],
)
def test_bad_values(tmp_path, line, message):
    with pytest.raises(CommandError) as caught:
        parse("--config", write(tmp_path, line))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_recipe_lists_what_there_is():
    with pytest.raises(
        CommandError, match=r"nowhere\.yaml' does not exist.*smollm2-135m-cpu\.yaml"
    ):
        parse("--config", "nowhere.yaml")


def test_resolved_recipe_is_a_recipe_of_the_same_run(tmp_path):
    recipe = parse("--config", write(tmp_path, "lora_r: 8"))
    assert parse("--config", write(tmp_path, recipe.to_yaml())) == recipe


def test_shipped_recipes_load():
    assert len(RECIPES) >= 3
    for path in RECIPES:
        assert parse("--config", str(path)).run_name == path.stem


def test_colab_recipes_train_on_finetome_in_alpaca_format():
    for name in ("tinyllama-1.1b-colab", "mistral-7b-colab"):
        recipe = parse("--config", f"scripts/recipes/{name}.yaml")
        assert (recipe.dataset_name, recipe.prompt_format) == ("mlabonne/FineTome-100k", "alpaca")
        assert recipe.load_in_4bit


def test_write_atomically_leaves_no_temporary_file(tmp_path):
    write_atomically(tmp_path / "a" / "b.txt", "é")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_every_key_is_used_somewhere():
    """A key that nothing reads is a promise that nobody keeps."""
    sources = "".join(
        path.read_text() for path in Path("scripts").glob("*.py") if path.name != "recipe.py"
    )
    unused = [
        item.name
        for item in dataclasses.fields(TrainingRecipe)
        if f"recipe.{item.name}" not in sources
    ]
    assert set(unused) <= {"run_name", "output_root"}  # read through run_dir
