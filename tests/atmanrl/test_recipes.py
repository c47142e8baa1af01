"""Recipes: the built-in ones load, and whatever is wrong with one is said by key and file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atmanrl.config import MASK_PRESETS, DataConfig, EvaluationConfig, MaskConfig, ModelConfig
from atmanrl.recipe import RecipeError, builtin_recipes, parse_overrides
from atmanrl.saliency import ESTIMATORS, make_estimator
from atmanrl.settings import SECTIONS, _known, estimator_sections, estimators_from
from atmanrl.training.config import AtManGRPOConfig, load_recipe, training_config


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("model: ledger\ndata: {name: ledger}\nlearning_rate: 1e-6\nmask: {steps: 5}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_builtin_recipe_is_a_valid_configuration(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, [("output_dir", str(tmp_path)), ("bf16", "false")])
    args = training_config(recipe)
    assert args.arithmetic.queries == 8
    assert args.arithmetic.generation_batch_size == 64
    assert args.num_iterations == 2
    assert args.scale_rewards == "none"
    assert args.beta == 0.0
    assert (args.saliency_weight == 0) == name.endswith("_outcome")


@pytest.mark.parametrize("name", ["gsm8k", "mmlu"])
def test_the_papers_recipes_have_the_papers_numbers(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, [("output_dir", str(tmp_path)), ("bf16", "false")])
    args = training_config(recipe)
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
    assert "use_vllm" in changed


def test_overrides_reach_nested_fields_and_the_resolved_recipe_loads_again(recipe: Path, tmp_path: Path) -> None:
    arguments = ["--mask.lr", "2e-3", "--data.ledger.pairs=4", "--model.dtype", "bfloat16", "--log-saliency"]
    loaded = load_recipe(str(recipe), parse_overrides(arguments))
    assert loaded.data.ledger.pairs == 4
    assert loaded.model.name == "ledger"
    assert loaded.model.dtype == "bfloat16"
    args = training_config(loaded, output_dir=str(tmp_path))
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
        return training_config(loaded, output_dir=str(tmp_path)).mask

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
        ("learning_rat", "1", r"unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("mask.step", "1", r"unknown key 'mask.step'; did you mean 'mask.steps'"),
        ("mask.steps", "many", r"'mask.steps' must be an integer, got 'many'"),
        ("mask.steps", "-1", r"mask.steps must not be negative, got -1"),
        ("mask.betas", "0.5", r"'mask.betas' must be a list of 2 \(a number, a number\), got 0.5"),
        ("mask.betas", "[0.5]", r"'mask.betas' must be a list of 2 \(a number, a number\), got \[0.5\]"),
        ("num_generations", "1.5", r"'num_generations' must be an integer or null, got 1.5"),
        ("learning_rate", "fast", r"'learning_rate' must be a number, got 'fast'"),
        ("seed", "null", r"'seed' must be an integer, got null"),
        ("log_saliency", "3", r"'log_saliency' must be true or false, got 3"),
        ("mask", "3", r"'mask' must be a mapping of its settings, got 3"),
        ("sparse_mask.sparsty", "3", r"unknown key 'sparse_mask.sparsty'; did you mean 'sparse_mask.sparsity'"),
        ("estimator.steps", "3", r"unknown key 'estimator'; did you mean 'saliency_estimator'"),
    ],
)
def test_a_wrong_training_key_or_value_is_named_with_its_place(
    recipe: Path, tmp_path: Path, key: str, value: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=rf"^--{key}: {message}"):
        training_config(load_recipe(str(recipe), [(key, value)]), output_dir=str(tmp_path))
    written = yaml.safe_load(value)
    for name in reversed(key.split(".")):
        written = {name: written}
    content = {"model": "ledger", **written}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    line = 1 + key.count(".") + (1 if "unknown key 'estimator'" not in message else 0)
    with pytest.raises(RecipeError, match=rf"mine\.yaml, line {line}: {message}"):
        training_config(load_recipe(str(recipe)), output_dir=str(tmp_path))


def test_a_key_that_stands_twice_is_refused_with_both_lines(recipe: Path) -> None:
    recipe.write_text("model: ledger\nmask:\n  steps: 3\n  steps: 4\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine\.yaml, line 4: 'mask.steps' stands here again, after line 3"):
        load_recipe(str(recipe))


def test_an_option_is_not_blamed_for_what_the_file_says(recipe: Path) -> None:
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("learning_rate", "learning_rat"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine\.yaml, line 3: unknown key 'learning_rat'"):
        load_recipe(str(recipe), [("seed", "1")])


def fields_of(cls: type, prefix: str) -> set[str]:
    return {f"{prefix}{item.name}" for item in dataclasses.fields(cls) if item.init}


def test_the_resolved_recipe_has_every_field_with_its_value_and_reads_as_itself(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(str(recipe), parse_overrides(["--sparse-mask.sparsity", "0.2", "--hub-token", "secret"]))
    text = loaded.to_yaml()
    assert "secret" not in text
    resolved = yaml.safe_load(text)
    sections = {"model": ModelConfig, "data": DataConfig, "evaluation": EvaluationConfig, "mask": MaskConfig}
    for name, cls in sections.items():
        assert fields_of(cls, "") == set(resolved[name])
    assert fields_of(AtManGRPOConfig, "") <= set(resolved)
    again = tmp_path / "config.yaml"
    again.write_text(text, encoding="utf-8")
    assert load_recipe(str(again)).to_yaml() == text


def test_a_run_keeps_its_settings_where_defaults_have_changed_since(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "config.yaml"
    old = yaml.safe_load(load_recipe(str(recipe)).to_yaml()) | {"epsilon": 0.3, "page_steps": 7}
    run.write_text(yaml.safe_dump(old), encoding="utf-8")
    resumed = load_recipe(str(recipe), [("page_steps", "9")], under=run)
    assert (resumed.values["epsilon"], resumed.values["page_steps"]) == (0.3, 9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_setting_of_an_estimator_can_be_set_in_its_section(recipe: Path, tmp_path: Path, name: str) -> None:
    recipe.write_text("model: ledger\n", encoding="utf-8")
    made = make_estimator(name)
    own = getattr(made, "config", made)
    changes = {"steps": 3, "sparsity": 0.7, "seed": 5, "similarity": 0.4, "head_share": 0.2}
    section, changed = name.replace("-", "_"), 0
    for field, value in changes.items():
        if hasattr(own, field):
            options = ["--saliency-estimator", name, f"--{name}.{field}", str(value)]
            loaded = load_recipe(str(recipe), parse_overrides(options))
            estimator = training_config(loaded, output_dir=str(tmp_path)).estimator()
            assert getattr(getattr(estimator, "config", estimator), field) == value
            assert loaded.values[section][field] == value
            (explained,) = estimators_from([name], parse_overrides(options[2:]))
            assert explained == estimator
            changed += 1
    assert changed or name in ("gradient", "attention")


def test_a_section_of_an_estimator_that_does_not_score_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"--sparse_mask.steps belongs to --estimator sparse-mask, not fai, mask"):
        estimators_from(["fai", "mask"], [("sparse_mask.steps", "3")])


KEYS = sorted(key for key, _ in _known({**SECTIONS, **estimator_sections()}, AtManGRPOConfig))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text("a1e-: no", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "steps"]), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_whatever_a_key_is_set_to_is_taken_or_refused_by_its_name(recipe: Path, key: str, value: object) -> None:
    message = None
    try:
        load_recipe(str(recipe), [(key, yaml.safe_dump(value))])
    except RecipeError as error:
        message = str(error)
    if message is not None:
        assert message.startswith((f"--{key}", str(recipe)))
        assert key.partition(".")[0] in message


def test_bases_that_name_one_another_are_refused(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"c\.yaml, line 1: its base 'b\.yaml' leads back to it"):
        load_recipe(str(tmp_path / "a.yaml"))


def test_a_base_that_is_not_there_is_named_with_the_file_that_asks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: ledgr\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine\.yaml, line 1: base: no recipe 'ledgr'.*did you mean 'ledger'"):
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
        ("seed.value", "1", "--seed.value: 'seed' must be an integer, got"),
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
        (b"- 1", "broken.yaml: a recipe is a mapping of keys to values"),
        (b"data: {name: ledger}", "broken.yaml: 'model.name' is missing"),
        (b"base: broken.yaml", "broken.yaml, line 1: its base 'broken.yaml' leads back to it"),
        (b"base: other.yaml", "other.yaml, line 1: its base 'broken.yaml' leads back to it"),
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
