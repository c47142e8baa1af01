"""Every command in README and docs is accepted by the program it calls; one of atmanrl runs on a small problem, or says
that it needs a GPU. Modules of benchmarks, which take minutes to hours, are only looked up, with their options."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from atmanrl.cli import _hyphenated, _parser, main
from atmanrl.recipe import builtin_recipes, parse_overrides
from atmanrl.rhythm.report import series_config
from atmanrl.settings import estimators_from
from atmanrl.tasks.ledger import CHECKPOINT
from atmanrl.training.config import load_recipe, training_config
from tests.atmanrl.saliency_runs import rollout, run
from tests.atmanrl.test_commands import COMPLETION, PROMPT

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("atmanrl", "make", "python", "accelerate", "pip")
# Recipes whose model trains on a CPU.
SMALL = ("ledger", "ledger_outcome")


class Command(NamedTuple):
    """One command of a page; ``inline``: it may leave required options out; ``block``: with the paragraph before it."""

    page: str
    text: str
    inline: bool
    block: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def commands_of(page: Path) -> list[Command]:
    """Commands in the page's shell blocks, and those in inline code that have at least one argument."""
    found = []
    # A backslash at a line's end joins it to the next.
    text = re.sub(r" \\\n +", " ", page.read_text(encoding="utf-8"))
    paragraphs = re.split(r"\n(?:[ \t]*\n)+", text)
    python = False
    for before, paragraph in zip(["", *paragraphs], paragraphs, strict=False):
        python = python or paragraph.startswith("```python")
        shell = not python and (paragraph.startswith(("    ", "```")) or "\n    " in paragraph)
        if python and paragraph.rstrip().endswith("```"):
            python = False
        block = f"{before}\n{paragraph}"
        lines = [line.strip() for line in paragraph.splitlines()] if shell else []
        for line in lines:
            # What follows two spaces or more and is no option describes the command.
            text = re.split(r"\s#|\s{2,}(?![\s-])", line)[0]
            if text.split(" ")[0] in PROGRAMS and "|" not in line:
                # Brackets stand around what may be left out, except in quotes.
                plain = re.sub(r'("[^"]*")|[\[\]]', r"\1", text)
                found.append(Command(page.name, plain, False, block))
        for text in re.findall(r"`([^`\n]+ [^`\n]+)`", "" if shell or python else paragraph):
            if text.split(" ")[0] in PROGRAMS:
                found.append(Command(page.name, text, True, block))
    return found


COMMANDS = [command for page in PAGES for command in commands_of(page)]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_documented_command_is_accepted(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(command.text.replace("$L/", "atmanrl/recipes/accelerate/"))
    if program == "accelerate":
        # Eight processes, as the launch configurations have.
        monkeypatch.setenv("WORLD_SIZE", "8")
        module = arguments.index("-m")
        assert (ROOT / arguments[arguments.index("--config_file") + 1]).is_file()
        program, *arguments = arguments[module + 1 :]
    if program == "atmanrl":
        check_atmanrl(arguments, command.inline, tmp_path)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{re.escape(arguments[0])}:", makefile, re.MULTILINE), f"no target {arguments[0]}"
    elif program == "python":
        check_module(arguments)
    else:
        check_pip(arguments)


def check_atmanrl(arguments: list[str], inline: bool, tmp_path: Path) -> None:
    parser = _parser()
    if inline:
        require_nothing(parser)
    try:
        known, rest = parser.parse_known_args([_hyphenated(each) for each in arguments])
    except SystemExit:
        pytest.fail("the command line is refused")
    overrides = parse_overrides(rest)
    if known.command == "explain":
        if known.statistics:
            series_config(overrides)
        else:
            estimators_from(known.estimator or ["mask"], overrides)
    elif known.command in ("train", "evaluate"):
        config = known.config if known.config in builtin_recipes() else "ledger"
        training_config(load_recipe(config, overrides), output_dir=str(tmp_path), bf16=False)
    else:
        assert not rest


def require_nothing(parser: argparse.ArgumentParser) -> None:
    """Let every option and positional argument of the subcommands be left out."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for subparser in commands.choices.values():
        for action in (*subparser._actions, *subparser._mutually_exclusive_groups):
            action.required = False


def check_module(arguments: list[str]) -> None:
    assert arguments[0] == "-m", "a documented script is a module"
    spec = importlib.util.find_spec(arguments[1])
    assert spec is not None, f"no module {arguments[1]}"
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    assert "__main__" in source
    for option in re.findall(r"--[\w-]+", " ".join(arguments)):
        assert f'"{option}"' in source, f"{arguments[1]} has no {option}"


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    if "-c" in arguments:
        assert (ROOT / arguments[arguments.index("-c") + 1]).is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in re.findall(r"\[([\w,-]+)\]", " ".join(arguments)):
        assert set(extra.split(",")) <= set(project["optional-dependencies"]), f"no extra {extra}"


# What makes a documented command small, behind its own options.
TRAINING = [
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--num_generations", "4"),
    *("--max_steps", "2", "--save_steps", "2", "--max_completion_length", "24", "--report_to", "none"),
    *("--data.ledger.train_size", "8", "--evaluation.prompts", "0", "--mask.steps", "2"),
]
SMALLER = {
    "train": TRAINING,
    "evaluate": ["--evaluation.prompts", "2", "--evaluation.samples", "1", "--mask.steps", "2"],
    "explain": ["--max-new-tokens", "24"],
    "bench": ["--queries", "1", "--rollouts", "2", "--prompt", "8", "--cot", "8", "12", "--arms", "fast", "paper"],
    "compare": [],
    "doctor": [],
}


def needs_a_gpu(command: Command) -> bool:
    """Whether it computes with a recipe for a large model."""
    recipe = re.search(r"--config (\w+)( |$)", command.text)
    return recipe is not None and recipe[1] in set(builtin_recipes()) - set(SMALL) and "--dry-run" not in command.text


TYPED = {
    command.text: command
    for command in COMMANDS
    if command.text.startswith("atmanrl ") and not command.inline and not needs_a_gpu(command)
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the files that the documentation's commands name."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("base: ledger\n", encoding="utf-8")
    row = {"prompt": PROMPT, "completion": COMPLETION, "expected": "c 0 b 6 e 8"}
    for name in ("pairs.jsonl", "rollouts.jsonl"):
        Path(name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    for name in ("A.json", "B.json"):
        run(rollout()).save(name)
    return tmp_path


@pytest.mark.parametrize("text", TYPED, ids=str)
def test_a_documented_command_runs(text: str, folder: Path) -> None:
    stand_ins = {"MODEL": "ledger", "RECIPE": "ledger", "A": "ledger", "B": str(CHECKPOINT), "DIR": "compared"}
    stand_ins["runs/mine/model"] = str(CHECKPOINT)
    text = text.replace('--prompt "..."', f'--prompt "{PROMPT}"').replace('"..."', f'"{COMPLETION}"')
    arguments = [stand_ins.get(word, word) for word in shlex.split(text)[1:]]
    given = {path.name for path in folder.iterdir()}
    assert main([*arguments, *SMALLER[arguments[0]]]) == 0
    written = {path.name for path in folder.iterdir()} - given
    # A file that the command names is there afterwards.
    for option in ("--html", "--plot", "--json", "--output", "--output_dir"):
        if option in arguments:
            assert arguments[arguments.index(option) + 1].split("/")[0] in written


def test_commands_of_every_kind_are_run() -> None:
    assert {text.split(" ")[1] for text in TYPED} == set(SMALLER)


def test_a_command_that_computes_with_a_large_model_says_that_it_needs_a_gpu() -> None:
    found = [command for command in COMMANDS if needs_a_gpu(command)]
    assert len(found) > 5
    for command in found:
        assert "GPU" in command.block, command


def test_the_pages_have_commands_of_every_kind() -> None:
    assert {command.text.split(" ")[0] for command in COMMANDS} == set(PROGRAMS)
    assert len(COMMANDS) > 40


def test_the_makefiles_targets_do_not_shadow_files() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(phony[1].split()) == sorted(targets)
