"""Recipes: the built-in ones load, and whatever is wrong with one is said by key and file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from atmanrl.config import MASK_PRESETS, MaskConfig
from atmanrl.recipe import RecipeError, build, builtin_recipes, load_recipe, parse_overrides
from atmanrl.training.trainer import AtManGRPOConfig


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("model: ledger\ndata: {name: ledger}\nlearning_rate: 1e-6\nmask: {steps: 5}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_builtin_recipe_is_a_valid_configuration(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, [("output_dir", str(tmp_path)), ("bf16", "false")])
    args = build(AtManGRPOConfig, recipe.training, source=recipe.source)
    assert args.arithmetic.queries == 8
    assert args.arithmetic.generation_batch_size == 64
    assert args.num_iterations == 2
    assert args.scale_rewards == "none"
    assert args.beta == 0.0
    assert (args.saliency_weight == 0) == name.endswith("_outcome")


@pytest.mark.parametrize("name", ["gsm8k", "mmlu"])
def test_the_papers_recipes_have_the_papers_numbers(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, [("output_dir", str(tmp_path)), ("bf16", "false")])
    args = build(AtManGRPOConfig, recipe.training, source=recipe.source)
    assert recipe.model.name == "meta-llama/Llama-3.2-3B-Instruct"
    assert args.mask == MaskConfig()
    assert args.per_device_train_batch_size == 2
    assert (args.learning_rate, args.num_train_epochs, args.epsilon) == (1e-6, 8, 0.2)
    assert (args.max_completion_length, args.temperature) == (1024, 1.0)
    assert args.lr_scheduler_type == "constant"
    assert args.loss_type == "grpo"


@pytest.mark.parametrize("name", ["ledger", "gsm8k", "mmlu"])
def test_an_outcome_twin_differs_in_the_saliency_weight_and_the_directory_alone(name: str) -> None:
    full, twin = (yaml.safe_load(load_recipe(each).to_yaml()) for each in (name, f"{name}_outcome"))
    assert {key for key in full if full[key] != twin[key]} == {"saliency_weight", "output_dir"}


@pytest.mark.parametrize("name", ["gsm8k_vllm_colocate", "gsm8k_vllm_server"])
def test_a_recipe_with_another_sampler_differs_in_the_samplers_keys_and_the_directory_alone(name: str) -> None:
    plain, sampled = (yaml.safe_load(load_recipe(each).to_yaml()) for each in ("gsm8k", name))
    changed = {key for key in sampled if sampled[key] != plain.get(key)}
    assert {key for key in changed if "vllm" not in key} == {"output_dir"}
    assert changed >= {"use_vllm", "vllm_mode"}


def test_overrides_reach_nested_fields_and_the_resolved_recipe_loads_again(recipe: Path, tmp_path: Path) -> None:
    arguments = ["--mask.lr", "2e-3", "--data.ledger.pairs=4", "--model.dtype", "bfloat16", "--log-saliency"]
    loaded = load_recipe(str(recipe), parse_overrides(arguments))
    assert loaded.data.ledger.pairs == 4
    assert loaded.model.name == "ledger"
    assert loaded.model.dtype == "bfloat16"
    args = build(AtManGRPOConfig, {**loaded.training, "output_dir": str(tmp_path)}, source="x")
    assert args.mask == MaskConfig(steps=5, lr=2e-3)
    assert args.learning_rate == 1e-6
    assert args.log_saliency is True
    again = tmp_path / "config.yaml"
    again.write_text(loaded.to_yaml(), encoding="utf-8")
    assert load_recipe(str(again)).to_yaml() == loaded.to_yaml()


def test_a_preset_changes_what_the_recipe_says_and_single_fields_change_the_preset(
    recipe: Path, tmp_path: Path
) -> None:
    def mask(path: Path, *arguments: str) -> MaskConfig:
        loaded = load_recipe(str(path), parse_overrides(arguments))
        return build(AtManGRPOConfig, {**loaded.training, "output_dir": str(tmp_path)}, source="x").mask

    assert mask(recipe, "--mask.preset", "quarter") == MASK_PRESETS["quarter"]
    assert mask(recipe, "--mask.preset", "quarter", "--mask.lr", "2e-3") == MaskConfig(steps=50, lr=2e-3)
    derived = tmp_path / "derived.yaml"
    derived.write_text("base: gsm8k\nmask: {preset: half, eps: 1e-7}\n", encoding="utf-8")
    assert mask(derived, "--bf16", "false") == MaskConfig(steps=100, lr=2e-3, eps=1e-7)
    with pytest.raises(RecipeError, match=r"mask.preset must be one of paper, half, .* got 'cheap'"):
        load_recipe(str(recipe), [("mask.preset", "cheap")])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rat", "1", r"mine.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("mask.step", "1", r"mine.yaml: unknown key 'mask.step'; did you mean 'mask.steps'"),
        ("mask.steps", "many", r"mine.yaml: 'mask.steps' must be an integer, got 'many'"),
        ("mask.steps", "-1", r"mine.yaml: mask.steps must not be negative, got -1"),
        ("num_generations", "1.5", r"mine.yaml: 'num_generations' must be an integer or null, got 1.5"),
        ("learning_rate", "fast", r"mine.yaml: 'learning_rate' must be a number, got 'fast'"),
        ("mask", "3", r"mine.yaml: mask must be a mapping, got 3"),
    ],
)
def test_a_wrong_training_key_or_value_is_named_with_its_file(
    recipe: Path, tmp_path: Path, key: str, value: str, message: str
) -> None:
    loaded = load_recipe(str(recipe), [(key, value)])
    with pytest.raises(RecipeError, match=message):
        build(AtManGRPOConfig, {**loaded.training, "output_dir": str(tmp_path)}, source=loaded.source)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rat", "1", "^command line: unknown key 'learning_rat'"),
        ("mask.step", "1", "^command line: unknown key 'mask.step'"),
        ("mask.steps", "many", "^command line: 'mask.steps' must be an integer"),
        ("mask", "3", "^command line: mask must be a mapping"),
        ("mask.steps", "-1", r"^.*mine\.yaml with --mask\.steps: mask\.steps must not be negative"),
        ("seed", "1", r"^.*mine\.yaml: unknown key 'learning_rat'"),
    ],
)
def test_what_the_command_line_set_is_not_blamed_on_the_file(
    recipe: Path, tmp_path: Path, key: str, value: str, message: str
) -> None:
    if key == "seed":
        recipe.write_text(recipe.read_text(encoding="utf-8").replace("learning_rate", "learning_rat"), encoding="utf-8")
    loaded = load_recipe(str(recipe), [(key, value)])
    training = {**loaded.training, "output_dir": str(tmp_path)}
    with pytest.raises(RecipeError, match=message):
        build(AtManGRPOConfig, training, source=loaded.source, typed=loaded.typed)


def test_bases_that_name_one_another_are_refused(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"c\.yaml: its base 'b\.yaml' leads back to it"):
        load_recipe(str(tmp_path / "a.yaml"))


def test_a_base_that_is_not_there_is_named_with_the_file_that_asks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: ledgr\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine\.yaml: base: no recipe 'ledgr'.*did you mean 'ledger'"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.nam", "ledger", r"unknown key 'data.nam'; did you mean 'data.name'"),
        ("data.name", "gsm9k", r"'data.name' must be 'ledger' or 'gsm8k' or 'mmlu', got 'gsm9k'"),
        ("data.ledger.asked", "9", r"data.ledger.asked must lie between 1 and pairs \(5\), got 9"),
        ("evaluation.samples", "0", r"evaluation.prompts must not be negative, samples and batch_size at least 1"),
        ("evaluation.temperature", "-1", r"temperature must not be negative.*; got -1.0 for 1"),
        ("model.dtype", "bf16", r"'model.dtype' must be 'float32' or 'bfloat16' .*, got 'bf16'"),
        ("seed.value", "1", "--seed.value: 'seed' is the value 3, not a section"),
    ],
)
def test_a_wrong_section_key_or_value_is_named(recipe: Path, key: str, value: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(recipe), [("seed", "3"), (key, value)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: \xff", "broken.yaml: not UTF-8"),
        (b"model: [", "broken.yaml: not YAML"),
        (b"- 1", "broken.yaml: a recipe is a mapping of keys to values, not list"),
        (b"data: {name: ledger}", "broken.yaml: 'model.name' is missing"),
        (b"base: broken.yaml", "broken.yaml: its base 'broken.yaml' leads back to it"),
        (b"base: other.yaml", "other.yaml: its base 'broken.yaml' leads back to it"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    (tmp_path / "other.yaml").write_text("base: broken.yaml\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path))


def test_an_unknown_recipe_is_answered_with_the_nearest_builtin_one() -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'gsm8': neither a file nor one of gsm8k, .*did you mean 'gsm8k'"):
        load_recipe("gsm8")


def test_an_argument_that_is_no_option_is_refused() -> None:
    with pytest.raises(RecipeError, match="unexpected argument '5'"):
        parse_overrides(["--mask.steps", "5", "5"])
