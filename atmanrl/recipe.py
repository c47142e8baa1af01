"""What recipes and command lines say: values and the place of each, file and line or option; no types yet.

Importing this module loads no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from atmanrl.config import MASK_PRESETS
from atmanrl.errors import InputError

RECIPES = Path(__file__).parent / "recipes"
Overrides = Sequence[tuple[str, str]]


class RecipeError(InputError):
    """A recipe or an override that cannot be used; the message names the key and its place."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with 1e-6 as a number, as YAML 1.2 has it."""


_Loader.yaml_implicit_resolvers = {
    start: [*rules, ("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"))]
    if start in "-+0123456789"
    else rules
    for start, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass
class Given:
    """Values that somebody wrote, nested, the place of each dotted key, and the text of those that options set."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def lay(self, other: Given) -> None:
        """Put ``other`` on top."""
        self.values = _merged(self.values, other.values)
        self.places |= other.places
        # What lies on top may be no option.
        self.texts = {key: text for key, text in self.texts.items() if key not in other.places} | other.texts


def read(path: Path, above: tuple[Path, ...] = ()) -> Given:
    """What a recipe file says, presets written out, laid over the recipe that it names as its ``base``."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    given = Given(_constructed(node, path), dict(_places(node, path)))
    mask = given.values.get("mask")
    if isinstance(mask, dict) and "preset" in mask:
        place = given.places.pop("mask.preset")
        given.values["mask"] = {**mask_preset(mask.pop("preset"), place=place), **mask}
    base = given.values.pop("base", None)
    if base is None:
        return given
    beside = path.parent / str(base)
    place = given.places.pop("base")
    try:
        found = beside if beside.is_file() else find_recipe(str(base))
    except RecipeError as error:
        raise RecipeError(f"{place}: base: {error}") from error
    above = (*above, path.resolve())
    if found.resolve() in above:
        raise RecipeError(f"{place}: its base {base!r} leads back to it")
    under = read(found, above)
    under.lay(given)
    return under


def _constructed(node: yaml.Node, path: Path) -> dict[str, Any]:
    loader = _Loader("")
    try:
        return loader.construct_document(node)  # type: ignore[no-any-return]
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    finally:
        loader.dispose()


def _places(node: yaml.MappingNode, path: Path, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The file and line of every key.

    Raises:
        RecipeError: for a key that stands twice, of which YAML would take the last in silence.
    """
    seen: dict[str, str] = {}
    for key, value in node.value:
        name, place = f"{prefix}{key.value}", f"{path}, line {key.start_mark.line + 1}"
        if name in seen:
            raise RecipeError(f"{place}: '{name}' stands here again, after line {seen[name].rpartition(' ')[2]}")
        seen[name] = place
        yield name, place
        if isinstance(value, yaml.MappingNode):
            yield from _places(value, path, f"{name}.")


def option(key: str, text: str) -> Given:
    """What one option says."""
    if key == "mask.preset":
        preset = mask_preset(text, place="--mask.preset")
        return Given({"mask": preset}, {f"mask.{name}": "--mask.preset" for name in preset})
    loader = _Loader(text)
    try:
        value: Any = loader.get_single_data()
    except yaml.YAMLError as error:
        raise RecipeError(f"--{key}: not a YAML value: {text!r}") from error
    finally:
        loader.dispose()
    places = {}
    for name in reversed(list(_leading(key))):
        places[name] = f"--{key}"
    for name in reversed(key.split(".")):
        value = {name: value}
    return Given(value, places, {key: text})


def _leading(key: str) -> Iterator[str]:
    """ "a", "a.b", "a.b.c"."""
    parts = key.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])


def mask_preset(name: object, *, place: str) -> dict[str, Any]:
    """The fields of `MaskConfig` in which the preset ``name`` differs from the paper's.

    Raises:
        RecipeError: for an unknown preset, naming the known ones.
    """
    if not isinstance(name, str) or name not in MASK_PRESETS:
        raise RecipeError(f"{place}: mask.preset must be one of {', '.join(MASK_PRESETS)}, got {name!r}")
    paper = asdict(MASK_PRESETS["paper"])
    return {key: value for key, value in asdict(MASK_PRESETS[name]).items() if value != paper[key]}


def _merged(base: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in data.items():
        below = base.get(key)
        if isinstance(below, str) and isinstance(value, dict) and key in ("model", "data"):
            below = {"name": below}
        merged[key] = _merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


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


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Split ``--a.b value``, ``--a.b=value`` and bare ``--flag`` (true) into pairs; hyphens become underscores.

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
