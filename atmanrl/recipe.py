"""Recipes: one YAML file per run, every key checked against a dataclass; importing this module loads no torch.

A recipe has three sections of its own, ``model``, ``data`` and ``evaluation``; every other key is a field of
`AtManGRPOConfig`, that is of TRL's ``GRPOConfig`` or Hugging Face's ``TrainingArguments`` as well.
``base: NAME`` starts from another recipe, a built-in one or a file beside this one.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

from atmanrl.config import MASK_PRESETS, DataConfig
from atmanrl.errors import InputError

RECIPES = Path(__file__).parent / "recipes"
COMMAND_LINE = "command line"

T = TypeVar("T")
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


class RecipeError(InputError):
    """A recipe or an override that cannot be used; the message names the key and the file."""


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters trained in place of the weights, through PEFT (the ``peft`` extra).

    Attributes:
        rank: of the update B A; alpha: its scale is alpha / rank; dropout: in front of A, during the update only.
        targets: names of the adapted layers, or "all-linear".
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"


@dataclass(frozen=True)
class ModelConfig:
    """The policy.

    Attributes:
        name: Hugging Face id, local directory, or "ledger" for the built-in task's own checkpoint.
        revision: branch, tag or commit of a Hugging Face id.
        dtype: of the parameters.
        attn_implementation: attention of the policy's own passes (generation and update); "auto" is
            flash_attention_2 where flash-attn is installed and computes in ``dtype``, else sdpa.
        lora: train adapters instead of the weights.

    Raises:
        ValueError: for an unknown dtype.
    """

    name: str
    revision: str | None = None
    dtype: Dtype = "float32"
    attn_implementation: str = "auto"
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation before and after training.

    Attributes:
        prompts: held-out prompts, 0 for no evaluation.
        samples: completions per prompt.
        temperature: of the sampling; 0 decodes greedily.
        seed: of the sampling, the same before and after.
        batch_size: prompts generated together.
        saliency: also optimise masks, and report the saliency per token class.
        before: evaluate the untrained policy too, on the same prompts.
    """

    prompts: int = 0
    samples: int = 1
    temperature: float = 1.0
    seed: int = 1234
    batch_size: int = 64
    saliency: bool = True
    before: bool = True

    def __post_init__(self) -> None:
        if self.prompts < 0 or self.samples < 1 or self.batch_size < 1:
            raise ValueError(
                f"prompts must not be negative, samples and batch_size at least 1; "
                f"got {self.prompts}, {self.samples} and {self.batch_size}"
            )
        if self.temperature < 0 or (self.temperature == 0 and self.samples > 1):
            raise ValueError(
                f"temperature must not be negative, and is 0 for one sample alone; got {self.temperature} "
                f"for {self.samples}"
            )


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        source: the file it came from.
        model, data, evaluation: its sections.
        training: the remaining keys, to be checked by `build` against the trainer's configuration.
        typed: the dotted keys that the command line set.
    """

    source: str
    model: ModelConfig
    data: DataConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    training: Mapping[str, Any] = field(default_factory=dict)
    typed: frozenset[str] = frozenset()

    def to_yaml(self) -> str:
        """The recipe with every override applied, itself a recipe."""
        sections = {name: asdict(getattr(self, name)) for name in ("model", "data", "evaluation")}
        return yaml.safe_dump({**sections, **_plain(self.training)}, sort_keys=False, allow_unicode=True)


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name_or_path: str) -> Path:
    """The file of a built-in recipe or of a path.

    Raises:
        RecipeError: naming the built-in recipes, nearest first, where there is neither.
    """
    builtin = RECIPES / f"{name_or_path}.yaml"
    if "/" not in name_or_path and builtin.is_file():
        return builtin
    path = Path(name_or_path)
    if path.is_file():
        return path
    names = builtin_recipes()
    near = difflib.get_close_matches(name_or_path, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(f"no recipe {name_or_path!r}: neither a file nor one of {', '.join(names)}{hint}")


def load_recipe(name_or_path: str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name_or_path: a built-in recipe, or a file.
        overrides: (dotted key, YAML value), as `parse_overrides` reads them from a command line.

    Raises:
        RecipeError: for a missing file, one that is not UTF-8 or not a YAML mapping, an unknown section key, or a
            value of the wrong type.
    """
    path = find_recipe(name_or_path)
    data = _read(path)
    for key, text in overrides:
        _set(data, key, text)
    typed = frozenset(key for key, _ in overrides)
    sections: dict[str, Any] = {}
    for name, section in (("model", ModelConfig), ("data", DataConfig), ("evaluation", EvaluationConfig)):
        value = data.pop(name, {})
        # `--model gpt2` and `model: gpt2` are what one types first.
        value = {"name": value} if isinstance(value, str) and name != "evaluation" else value
        sections[name] = build(section, value, source=str(path), prefix=f"{name}.", typed=typed)
    return Recipe(source=str(path), training=data, typed=typed, **sections)


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a recipe file, presets written out, laid over that of the recipe it names as its ``base``."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, not {type(data).__name__}")
    mask = data.get("mask")
    if isinstance(mask, dict) and "preset" in mask:
        data["mask"] = {**mask_preset(mask.pop("preset"), source=str(path)), **mask}
    base = data.pop("base", None)
    if base is None:
        return data
    beside = path.parent / str(base)
    try:
        found = beside if beside.is_file() else find_recipe(str(base))
    except RecipeError as error:
        raise RecipeError(f"{path}: base: {error}") from error
    above = (*above, path.resolve())
    if found.resolve() in above:
        raise RecipeError(f"{path}: its base {base!r} leads back to it")
    return _merged(_read(found, above), data)


def mask_preset(name: object, *, source: str) -> dict[str, Any]:
    """The fields of `MaskConfig` in which the preset ``name`` differs from the paper's.

    Raises:
        RecipeError: for an unknown preset, naming the known ones.
    """
    if not isinstance(name, str) or name not in MASK_PRESETS:
        raise RecipeError(f"{source}: mask.preset must be one of {', '.join(MASK_PRESETS)}, got {name!r}")
    paper = asdict(MASK_PRESETS["paper"])
    return {key: value for key, value in asdict(MASK_PRESETS[name]).items() if value != paper[key]}


def _merged(base: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in data.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Split ``--a.b value``, ``--a.b=value`` and bare ``--flag`` (true) into pairs.

    Raises:
        RecipeError: for an argument that is no option.
    """
    overrides: list[tuple[str, str]] = []
    remaining = list(arguments)
    while remaining:
        option = remaining.pop(0)
        if not option.startswith("--") or option == "--":
            raise RecipeError(
                f"unexpected argument {option!r}: overrides are written --key value or --section.key value"
            )
        key, equals, value = option[2:].partition("=")
        if not equals:
            value = remaining.pop(0) if remaining and not remaining[0].startswith("--") else "true"
        overrides.append((key.replace("-", "_"), value))
    return overrides


def build(cls: type[T], data: object, *, source: str, prefix: str = "", typed: Collection[str] = ()) -> T:
    """An instance of the dataclass ``cls`` from a mapping, nested dataclasses included.

    Args:
        cls: the dataclass.
        data: keys and values as YAML gives them; "1e-6", which YAML takes for a string, becomes a float where the
            field is one.
        source: named in errors.
        prefix: put before keys in errors ("model.").
        typed: dotted keys, prefix included, that are not ``source``'s: errors call them the command line's.

    Raises:
        RecipeError: for an unknown key, with near matches, a missing one, a value of the wrong type, and whatever
            the dataclass itself refuses.
    """
    if not isinstance(data, Mapping):
        section = prefix.rstrip(".")
        raise RecipeError(f"{_where(section, source, typed)}: {section} must be a mapping, got {data!r}")
    known = {item.name: item for item in fields(cls) if item.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    check_keys(cls, data, source=source, prefix=prefix, typed=typed)
    values = {
        key: _coerce(value, hints[key], source=source, key=f"{prefix}{key}", typed=typed) for key, value in data.items()
    }
    for name, item in known.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise RecipeError(f"{source}: '{prefix}{name}' is missing")
    try:
        return cls(**values)
    except ValueError as error:
        # What it refuses is a value or several that do not go together.
        set_here = [f"--{key}" for key in sorted(typed) if key.startswith(prefix) and key[len(prefix) :] in values]
        where = f"{source} with {', '.join(set_here)}" if set_here else source
        raise RecipeError(f"{where}: {prefix}{error}") from error


def build_section(cls: type[T], name: str, overrides: Sequence[tuple[str, str]]) -> T:
    """An instance of ``cls`` from the overrides of one section, for a command without a recipe.

    Raises:
        RecipeError: for any other key, and as `build`.
    """
    data: dict[str, Any] = {name: {}}
    for key, text in overrides:
        if not key.startswith(f"{name}."):
            raise RecipeError(f"unknown option --{key}; besides the options of this command only --{name}.* can be set")
        _set(data, key, text)
    return build(cls, data[name], source=COMMAND_LINE, prefix=f"{name}.")


def check_keys(
    cls: type, data: Mapping[str, Any], *, source: str, prefix: str = "", typed: Collection[str] = ()
) -> None:
    """Refuse keys that the dataclass ``cls`` has no field for; arguments as of `build`.

    Raises:
        RecipeError: naming the first such key, with near matches.
    """
    known = {item.name for item in fields(cls) if item.init}
    for key in data:
        if key not in known:
            where = _where(f"{prefix}{key}", source, typed)
            raise RecipeError(f"{where}: unknown key '{prefix}{key}'{_near(str(key), known, prefix)}")


def _where(key: str, source: str, typed: Collection[str]) -> str:
    """Who set the key: the command line, where it set the key itself or one inside of it, or the file."""
    return COMMAND_LINE if any(each == key or each.startswith(f"{key}.") for each in typed) else source


def _near(key: str, known: Collection[str], prefix: str) -> str:
    sections = [] if prefix else ["model", "data", "evaluation"]
    near = difflib.get_close_matches(key, [*known, *sections], n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(prefix + name) for name in near)}?" if near else ""


def _set(data: dict[str, Any], key: str, text: str) -> None:
    *sections, last = key.split(".")
    for depth, name in enumerate(sections):
        inner = data.setdefault(name, {})
        if isinstance(inner, str) and name in ("model", "data"):
            inner = data[name] = {"name": inner}
        if not isinstance(inner, dict):
            raise RecipeError(f"--{key}: '{'.'.join(sections[: depth + 1])}' is the value {inner!r}, not a section")
        data = inner
    if key == "mask.preset":
        data.update(mask_preset(text, source=COMMAND_LINE))
        return
    try:
        data[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--{key}: not a YAML value: {text!r}") from error


def _coerce(value: Any, hint: Any, *, source: str, key: str, typed: Collection[str]) -> Any:
    where = _where(key, source, typed)
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None:
        if type(None) in choices or hint is Any:
            return None
        raise RecipeError(f"{where}: '{key}' must be {_describe(hint)}, got null")
    for choice in choices:
        if is_dataclass(choice) and isinstance(choice, type):
            return build(choice, value, source=source, prefix=f"{key}.", typed=typed)
        if typing.get_origin(choice) is tuple and isinstance(value, list):
            return tuple(value)
        if typing.get_origin(choice) is typing.Literal and value in typing.get_args(choice):
            return value
    if isinstance(value, bool):
        if bool in choices:
            return value
        if str in choices:
            # `save_strategy: no`: YAML reads a bare no as false.
            return "yes" if value else "no"
    if float in choices and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value) if int not in choices or not isinstance(value, int) else value
        except ValueError:
            pass
    scalars = {choice for choice in choices if choice in (bool, int, float, str)}
    others = {c for c in choices if c is not type(None) and typing.get_origin(c) is not typing.Literal} - scalars
    accepted = any(type(value) is scalar for scalar in scalars) or (bool(others) and not isinstance(value, bool))
    if not accepted:
        raise RecipeError(f"{where}: '{key}' must be {_describe(hint)}, got {value!r}")
    return value


def _describe(hint: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null"}
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    described: list[str] = []
    for part in parts:
        literal = typing.get_origin(part) is typing.Literal
        described += map(repr, typing.get_args(part)) if literal else [names.get(part, str(part))]
    return " or ".join(described)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
