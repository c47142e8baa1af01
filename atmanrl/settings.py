"""Settings, checked: jsonargparse knows types, nesting and defaults of the dataclasses; importing this loads no torch.

The dataclasses are those of `atmanrl.config`, the estimators, and the trainer's configuration. What jsonargparse has no
place for stands here: the place of a wrong key in the message, the nearest known keys, and what a key must be in words.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from atmanrl.config import DataConfig, EvaluationConfig, ModelConfig
from atmanrl.errors import InputError
from atmanrl.recipe import Given, Overrides, RecipeError, find_recipe, option, read

SECTIONS: Mapping[str, type] = {"model": ModelConfig, "data": DataConfig, "evaluation": EvaluationConfig}


@dataclass(frozen=True)
class Settings:
    """Checked settings: every field of every section with its value.

    Attributes:
        source: the file, or "command line".
        values: plain values by key, nested, defaults included.
        made: the sections' dataclasses by name.
        places: where each given key stands.
    """

    source: str
    values: Mapping[str, Any]
    made: Mapping[str, Any]
    places: Mapping[str, str]

    @property
    def model(self) -> ModelConfig:
        """The section of that name."""
        return self.made["model"]  # type: ignore[no-any-return]

    @property
    def data(self) -> DataConfig:
        """The section of that name."""
        return self.made["data"]  # type: ignore[no-any-return]

    @property
    def evaluation(self) -> EvaluationConfig:
        """The section of that name."""
        return self.made["evaluation"]  # type: ignore[no-any-return]

    def make(self, cls: type, prefix: str = "", **changed: Any) -> Any:
        """An instance of ``cls`` from its fields among the values, nested dataclasses included.

        Raises:
            RecipeError: for whatever the dataclass refuses, with the key's place.
        """
        inside: Any = self.values
        for name in prefix.split(".")[:-1]:
            inside = inside[name]
        given = {item.name: inside[item.name] for item in fields(cls) if item.init and item.name in inside}
        hints = typing.get_type_hints(cls)
        for name, value in given.items():
            nested = _dataclass_in(hints[name])
            if nested is not None and value is not None:
                given[name] = self.make(nested, f"{prefix}{name}.")
            elif isinstance(value, list) and any(typing.get_origin(hint) is tuple for hint in _choices(hints[name])):
                given[name] = tuple(value)
        try:
            return cls(**{**given, **changed})
        except InputError:
            raise
        except ValueError as error:
            raise RecipeError(f"{self._place(prefix, given, str(error))}: {prefix}{error}") from error

    def _place(self, prefix: str, given: Mapping[str, Any], message: str) -> str:
        """Of the key that a message begins with; else the source, with the options that set keys beside it."""
        key = f"{prefix}{message.split(' ')[0]}"
        if key in self.places:
            return self.places[key]
        typed = [self.places[f"{prefix}{name}"] for name in given if f"{prefix}{name}" in self.places]
        options = [place for place in typed if place.startswith("--")]
        return " with ".join([self.source, ", ".join(options)]) if options else self.source

    def with_value(self, key: str, value: Any) -> Settings:
        """The same settings with another value of a top-level key."""
        return replace(self, values={**self.values, key: value})

    def to_yaml(self) -> str:
        """Every setting, itself a recipe; secrets are left out."""
        open_values = {key: None if key.endswith("_token") else value for key, value in self.values.items()}
        return yaml.safe_dump(open_values, sort_keys=False, allow_unicode=True)


def read_settings(
    overrides: Overrides,
    sections: Mapping[str, object],
    *,
    recipe: str | None = None,
    under: Path | None = None,
    top: type | None = None,
) -> Settings:
    """Settings from a recipe and overrides.

    Args:
        overrides: (dotted key, YAML value), as `parse_overrides` reads them from a command line.
        sections: a dataclass per section, or an instance whose values are the section's defaults.
        recipe: a built-in recipe or a file; None: the overrides alone.
        under: a complete recipe, such as a run's ``config.yaml``, whose values stand wherever ``recipe`` and overrides
            say nothing.
        top: dataclass of the keys outside of the sections; None: there are none.

    Raises:
        RecipeError: for a missing file, one that is no YAML mapping in UTF-8, an unknown key (with the nearest known
            ones), a missing one, or a value of the wrong type or range, each with its place.
    """
    source = "command line"
    given = Given()
    if under is not None:
        given.lay(read(under))
    if recipe is not None:
        path = find_recipe(recipe)
        source = str(path)
        given.lay(read(path))
    for key, text in overrides:
        given.lay(option(key, text))
    known = dict(_known(sections, top))
    for name in ("model", "data"):
        # `--model gpt2` and `model: gpt2` are what one types first.
        if name in sections and isinstance(given.values.get(name), str):
            given.values[name] = {"name": given.values[name]}
            given.places.setdefault(f"{name}.name", given.places.get(name, source))
    values = _checked(given, given.values, known)
    return _complete(values, given, known, sections, top, source)


def _complete(
    values: Mapping[str, Any],
    given: Given,
    known: Mapping[str, Any],
    sections: Mapping[str, object],
    top: type | None,
    source: str,
) -> Settings:
    """The values with the defaults beside them, their types checked."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, default_env=False)
    for name, section in sections.items():
        cls = section if isinstance(section, type) else type(section)
        skipped = {item.name for item in fields(cls) if f"{name}.{item.name}" not in known}
        parser.add_class_arguments(cls, name, skip=skipped)
        if not isinstance(section, type):
            parser.set_defaults({f"{name}.{key}": value for key, value in vars(section).items() if key not in skipped})
    if top is not None:
        parser.add_class_arguments(top, None, instantiate=False)
    try:
        parsed = parser.parse_object(dict(values))
        everything = yaml.safe_load(parser.dump(parsed, skip_unset=False))
    except Exception as error:
        raise _explained(error, given, known, source) from error
    settings = Settings(source, everything, {}, given.places)
    made = {}
    for name, section in sections.items():
        made[name] = settings.make(section if isinstance(section, type) else type(section), f"{name}.")
    return Settings(source, everything, made, given.places)


def _explained(error: Exception, given: Given, known: Mapping[str, Any], source: str) -> RecipeError:
    """jsonargparse's message in our words: the place, the key, what it must be, and what it is."""
    text = str(error)
    if missing := re.search(r"arguments are required: (\S+)", text):
        return RecipeError(f"{source}: '{missing[1].rstrip(',')}' is missing")
    found = re.search(r'Parser key "([^"]+)"', text)
    if found is None or found[1] not in known:
        return RecipeError(f"{source}: {text}")
    key = found[1]
    value: Any = given.values
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    place = given.places.get(key, source)
    return RecipeError(f"{place}: '{key}' must be {_describe(known[key])}, got {value!r}")


def _known(sections: Mapping[str, object], top: type | None) -> Iterator[tuple[str, Any]]:
    """Every dotted key with its type; of a section, its dataclass."""
    for name, section in sections.items():
        cls = section if isinstance(section, type) else type(section)
        yield name, cls
        yield from _keys(cls, f"{name}.")
    if top is not None:
        yield from _keys(top, "")


def _keys(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for item in fields(cls):
        if not item.init or item.name in _NO_SETTINGS:
            continue
        yield f"{prefix}{item.name}", hints[item.name]
        nested = _dataclass_in(hints[item.name])
        if nested is not None:
            yield from _keys(nested, f"{prefix}{item.name}.")


_NO_SETTINGS = ("record_every", "likelihood")
"""Fields of estimators that the commands fill by options of their own, or that only code can give."""


def _checked(given: Given, values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values under their keys' own names, as the types want them, where all keys are known."""
    checked = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        place = given.places.get(key, "command line")
        if key not in known and (spelled := key.replace("-", "_")) in known:
            given.places.setdefault(spelled, place)
            key = spelled
        if key not in known:
            raise RecipeError(f"{place}: unknown key '{key}'{_near(key, known)}")
        hint = known[key]
        nested = _dataclass_in(hint)
        if value is None and type(None) not in _choices(hint) and hint is not Any:
            raise RecipeError(f"{place}: '{key}' must be {_describe(hint)}, got null")
        if nested is not None and value is not None:
            if not isinstance(value, Mapping):
                raise RecipeError(f"{place}: '{key}' must be a mapping of its settings, got {value!r}")
            value = _checked(given, value, known, f"{key}.")
        elif str in _choices(hint) and isinstance(value, (bool, int, float)) and type(value) not in _choices(hint):
            # `--data.path 007` is a text; `save_strategy: no`, which YAML reads as false, is one of two.
            value = given.texts.get(key, {True: "yes", False: "no"}[value] if isinstance(value, bool) else value)
        checked[key[len(prefix) :]] = value
    return checked


def _near(key: str, known: Mapping[str, Any]) -> str:
    section, _, last = key.rpartition(".")
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    near = [f"{section}.{name}".lstrip(".") for name in difflib.get_close_matches(last, beside, n=3, cutoff=0.6)]
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    near = near or elsewhere[:3]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def estimator_sections() -> dict[str, Any]:
    """The settings of each estimator by the name of its section, "leave_one_out" for "leave-one-out"."""
    from atmanrl.saliency import ESTIMATORS, make_estimator

    settings = {name.replace("-", "_"): _settings_of(make_estimator(name)) for name in ESTIMATORS}
    return {name: section for name, section in settings.items() if list(_keys(type(section), ""))}


def estimator_from(name: str, settings: Settings, *, record_every: int | None = None) -> Any:
    """The estimator ``name`` with the settings of its section.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    from atmanrl.saliency import make_estimator

    made: Any = make_estimator(name, record_every=record_every)
    section = section_of(name)
    if section not in settings.values:
        return made
    own = settings.make(type(_settings_of(made)), f"{section}.")
    if _settings_of(made) is not made:
        return replace(made, config=own)
    return replace(made, **{key: getattr(own, key) for key, _ in _keys(type(own), "")})


def estimators_from(names: Sequence[str], overrides: Overrides, *, record_every: int | None = None) -> list[Any]:
    """The estimators of those names, their settings from the overrides of their sections: ``--sparse-mask.steps 12``.

    Raises:
        RecipeError: for any other key, a section of an estimator that is not among ``names``, or as `read_settings`.
        ValueError: for an unknown name, with the nearest known one.
    """
    settings = read_settings(overrides, estimator_sections())
    made = [estimator_from(name, settings, record_every=record_every) for name in names]
    sections = [section_of(name) for name in names]
    for key, place in settings.places.items():
        section = key.partition(".")[0]
        if section not in sections:
            raise RecipeError(f"{place} belongs to --estimator {section.replace('_', '-')}, not {', '.join(names)}")
    return made


def section_of(estimator: str) -> str:
    """The name of an estimator's section: "sparse_mask" for "sparse-mask", and for "best", which stands for it."""
    from atmanrl.saliency import BEST

    return (BEST if estimator == "best" else estimator).replace("-", "_")


def _settings_of(estimator: Any) -> Any:
    """An estimator is a dataclass of its settings, or has them as its ``config``."""
    config = getattr(estimator, "config", None)
    return config if is_dataclass(config) else estimator


def _choices(hint: Any) -> set[Any]:
    """The types that a value may have."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return set(typing.get_args(hint)) if union else {hint}


def _dataclass_in(hint: Any) -> type | None:
    return next((each for each in _choices(hint) if isinstance(each, type) and is_dataclass(each)), None)


def _describe(hint: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null"}
    names |= {dict: "a mapping", list: "a list"}
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    described: list[str] = []
    for part in parts:
        origin, inner = typing.get_origin(part), typing.get_args(part)
        if origin is Literal:
            described += map(repr, inner)
        elif origin is tuple and Ellipsis not in inner:
            described.append(f"a list of {len(inner)} ({', '.join(_describe(each) for each in inner)})")
        elif origin in (list, tuple):
            described.append(f"a list ({_describe(inner[0])} each)")
        else:
            described.append(names.get(origin or part, str(getattr(part, "__name__", part))))
    return " or ".join(described)
