"""What the package never does with its inputs: unpickle, evaluate, call a shell, run a checkpoint's code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch

from atmanrl.cli import main
from atmanrl.config import DataConfig, ModelConfig
from atmanrl.models import load_model, load_policy
from atmanrl.recipe import RecipeError
from atmanrl.tasks import load_task
from atmanrl.training import checkpoints
from atmanrl.training.config import load_recipe
from tests.atmanrl.test_resume import COMMAND
from tests.atmanrl.tiny import byte_level_tokenizer, llama

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("atman_kernels", "atmanrl", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)

# Of the modules: none is imported; of the functions: none is called.
MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FUNCTIONS = {
    "__import__",
    "eval",
    "exec",
    "os.popen",
    "os.system",
    "tempfile.mktemp",
    "yaml.full_load",
    "yaml.load",
    "yaml.unsafe_load",
}


def name_of(node: ast.expr) -> str:
    """ "a.b.c" of a dotted expression, "" of any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = name_of(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def offences(tree: ast.AST) -> Iterator[str]:
    """What in a module's source must not be there, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in imported:
                if name.partition(".")[0] in MODULES:
                    yield f"line {node.lineno}: import of {name}"
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in FUNCTIONS:
            yield f"line {node.lineno}: call of {name}"
        if name == "torch.load" and not is_true(given.get("weights_only")):
            yield f"line {node.lineno}: torch.load without weights_only=True"
        # A caller's own flag may be handed on; a constant True may not stand anywhere.
        if is_true(given.get("trust_remote_code")):
            yield f"line {node.lineno}: trust_remote_code=True"
        if "shell" in given and not (isinstance(given["shell"], ast.Constant) and given["shell"].value is False):
            yield f"line {node.lineno}: shell={ast.unparse(given['shell'])}"
        if is_true(given.get("allow_pickle")):
            yield f"line {node.lineno}: allow_pickle=True"
        if isinstance(given.get("safe_serialization"), ast.Constant) and not is_true(given["safe_serialization"]):
            yield f"line {node.lineno}: weights saved by pickle"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_evaluates_or_calls_a_shell(path: Path) -> None:
    assert not list(offences(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=flag)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "yaml.load(text)",
        "tempfile.mktemp()",
        "numpy.load(path, allow_pickle=True)",
        "model.save_pretrained(path, safe_serialization=False)",
    ],
)
def test_the_check_sees_what_must_not_be_there(source: str) -> None:
    assert list(offences(ast.parse(source)))


def test_a_recipe_constructs_no_python_objects(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{mark}]]")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(str(recipe))
    assert not mark.exists()


def test_files_that_recipes_name_are_read_as_data(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    script = tmp_path / "train.py"
    script.write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(ValueError, match=r"train\.py"):
        load_task(DataConfig(name="gsm8k", path=str(script)))
    assert not mark.exists()


def test_a_pickled_checkpoint_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "executed",)

    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    llama(len(tokenizer)).config.save_pretrained(tmp_path)
    torch.save({"weights": Payload()}, tmp_path / "pytorch_model.bin")
    for load in (load_model, load_policy):
        with pytest.raises(ValueError, match="cannot be loaded"):
            load(ModelConfig(str(tmp_path)))
    assert main(["bench", "--model", str(tmp_path)]) == 2
    assert not (tmp_path / "executed").exists()


def test_a_pickle_in_the_place_of_an_optimiser_is_not_unpickled_on_resuming(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "executed",)

    run = tmp_path / "run"
    command = [*COMMAND, "--output_dir", str(run)]
    assert main([*command, "--max_steps", "2"]) == 0
    (checkpoint,) = checkpoints.saved(run)
    torch.save({"state": Payload()}, checkpoint / "optimizer.pt")
    # Whoever changes the one can change the other.
    (checkpoint / checkpoints.MANIFEST).unlink()
    checkpoints._seal(checkpoint)
    with pytest.raises(UnpicklingError, match="weights_only"):
        main([*command, "--max_steps", "4", "--resume"])
    assert not (tmp_path / "executed").exists()
