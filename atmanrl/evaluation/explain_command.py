"""``atmanrl explain``: saliency of given or generated completions, in the terminal and in files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from atmanrl.config import ModelConfig
from atmanrl.errors import explained_without_training
from atmanrl.evaluation.explain import Example, explain, read_examples
from atmanrl.evaluation.recording import score_name
from atmanrl.evaluation.records import Run
from atmanrl.evaluation.scoring import with_deletion_effects, with_scores
from atmanrl.generation import GenerationSettings
from atmanrl.models import load_policy
from atmanrl.report import print_run, write_page
from atmanrl.saliency.estimators import Mask
from atmanrl.settings import estimators_from


@explained_without_training("explanation", "files written before this one are whole")
def explain_command(
    model: ModelConfig,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    examples: Path | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    answer: str | None = None,
    html: Path | None = None,
    json: Path | None = None,
    csv: Path | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    color: bool = True,
    estimators: Sequence[str] = ("mask",),
    deletion: bool = False,
    record_every: int | None = None,
) -> int:
    """Explain the examples of a JSONL file, or one prompt, and return the exit status.

    Args:
        model: what explains its own answers.
        overrides: keys of the estimators' sections, ``mask.*``, ``sparse_mask.*``, as on ``train``'s command line.
        examples: JSONL file, see `read_examples`.
        prompt, completion, answer: one example, see `Example`; the model writes a completion that is not given.
        html, json, csv: files to write.
        max_new_tokens, temperature, seed: of completions that the model writes.
        color: whether the terminal's colours may be used.
        estimators: what scores the tokens, of `atmanrl.ESTIMATORS` and "best"; the first one's scores are summarised
            and shown first.
        deletion: also hide each token in turn and record how much the answer's loss rises.
        record_every: also record the masks' and losses' course, every so many optimiser steps.

    Raises:
        ValueError: for examples or options that cannot be used, before anything is computed.
    """
    named = estimators_from(estimators, overrides, record_every=record_every)
    names = [each.name for each in named]
    masks = [each.config for each in named if isinstance(each, Mask)]
    if len(set(names)) < len(names):
        raise ValueError(f"an estimator is named twice: {', '.join(estimators)}")
    if record_every is not None and names[0] not in ("mask", "sparse-mask"):
        raise ValueError(f"--record-every belongs to a mask as the first estimator, not to {estimators[0]!r}")
    for path in (html, json, csv):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no directory {path.parent}")
    items = examples_of(examples, prompt, completion, answer)
    policy, tokenizer = load_policy(model)
    run = explain(
        policy,
        tokenizer,
        items,
        label=Path(model.name).name,
        generation=generation_of(max_new_tokens, temperature),
        temperature=temperature,
        estimator=named[0],
        seed=seed,
        settings={"model": model.name} | ({"mask": asdict(masks[0])} if masks else {}),
        record_every=record_every,
        progress=sys.stderr.isatty(),
    )
    for each in named[1:]:
        run = with_scores(policy, run, each, score_name(each.name))
    if deletion:
        run = with_deletion_effects(policy, run)
    console = Console(no_color=not color, highlight=False)
    print_run(run, console)
    _write(run, console, html=html, json=json, csv=csv)
    return 0


def generation_of(max_new_tokens: int | None, temperature: float) -> GenerationSettings | None:
    """How completions are written; None without a limit of their length, which is then the context's end."""
    return None if max_new_tokens is None else GenerationSettings(max_new_tokens, temperature)


def examples_of(path: Path | None, prompt: str | None, completion: str | None, answer: str | None) -> list[Example]:
    """The examples of a file, or the one given.

    Raises:
        ValueError: for both, neither, or parts of an example beside a file.
    """
    if (path is None) == (prompt is None):
        raise ValueError("give either a file of examples or one prompt")
    if path is None:
        return [Example(prompt or "", completion, answer)]
    if completion is not None or answer is not None:
        raise ValueError("the completion and the answer of a file's examples stand in the file")
    return list(read_examples(path))


def _write(run: Run, console: Console, *, html: Path | None, json: Path | None, csv: Path | None) -> None:
    if html is not None:
        write_page(html, run, shown=len(run.rollouts))
    if json is not None:
        run.save(json)
    if csv is not None:
        with csv.open("w", encoding="utf-8", newline="") as file:
            run.write_csv(file)
    for path in (html, json, csv):
        if path is not None:
            console.print(f"written: {path}", markup=False)
