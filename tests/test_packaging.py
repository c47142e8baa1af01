"""What is installed is what constraints.txt says, and what is published is what the repository holds."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# The installer's own, and what belongs to the build of torch that is chosen.
LEFT_OPEN = ("pip", "setuptools", "wheel", "nvidia-", "cuda-")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(canonicalize_name(name) == name for name, _ in pairs)
    assert len(dict(pairs)) == len(pairs), "a package is pinned twice"
    return dict(pairs)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def required_to_develop() -> list[Requirement]:
    extras = project()["optional-dependencies"]
    return [Requirement(line) for line in (*project()["dependencies"], *extras["dev"], *extras["docs"])]


def installed_for(wanted: list[Requirement]) -> dict[str, str]:
    """Name and version of every installed distribution that the requirements lead to."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
            for line in requires(name) or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    wanted.append(needed)
    return found


def test_everything_that_is_installed_for_this_project_is_pinned_at_its_version() -> None:
    installed = installed_for(required_to_develop())
    pinned = pins()
    # A CUDA build of torch requires the triton that it was made with.
    left_open = (*LEFT_OPEN, *(("triton",) if any(line.startswith("triton") for line in requires("torch")) else ()))
    checked = {name: found for name, found in installed.items() if not name.startswith(left_open)}
    assert len(checked) > 50
    # Without the local part: "2.13.0+cpu" is a build of 2.13.0.
    differing = {
        name: (found, pinned.get(name)) for name, found in checked.items() if Version(found).public != pinned.get(name)
    }
    assert not differing


def test_everything_that_is_pinned_runs_on_the_oldest_python_that_is_promised() -> None:
    # ">=3.11" promises the first release of 3.11 too, which some distributions still have.
    oldest = Version(project()["requires-python"].removeprefix(">="))
    refusing = {
        name: needed
        for name in installed_for(required_to_develop())
        if (needed := metadata(name)["Requires-Python"]) and not SpecifierSet(needed).contains(oldest)
    }
    assert not refusing


def test_every_requirement_admits_its_pin() -> None:
    pinned = pins()
    lines = [*project()["dependencies"], *chain.from_iterable(project()["optional-dependencies"].values())]
    for requirement in map(Requirement, lines):
        pin = pinned.get(canonicalize_name(requirement.name))
        if requirement.name not in ("vllm", "flash-attn", "deepspeed"):
            assert pin is not None, requirement
            assert requirement.specifier.contains(pin), requirement
