"""Measurements of a set of completions, and their file format.

A `Run` holds one model's rollouts with a saliency score per chain-of-thought token. `explain` and `evaluate` write
it, the terminal, HTML, JSON and CSV views read it. Importing this module loads no torch.

The file is UTF-8 JSON: an object with ``format`` ("atmanrl.run"), ``version`` (1), ``run`` (what produced it) and
``rollouts``, one object per line. Token data is kept in columns, all of the chain of thought's length::

    {"prompt_id": "17", "sample": 0,
     "prompt": {"ids": [...], "texts": [...]}, "cot": {...}, "marker": {...}, "answer": {...}, "rest": {...},
     "classes": ["needed", "filler", ...], "scores": {"restored": [0.31, ...]},
     "predicted": "8", "expected": "8", "correct": true, "truncated": false, "skipped": null,
     "loss": {"initial": 2.1, "final": 0.4, "unmasked": 0.1}, "measures": {"causal_influence": 0.2}, "trajectory": null}
"""

from __future__ import annotations

import csv
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import ArrayLike

from atmanrl.errors import InputError

FORMAT = "atmanrl.run"
VERSION = 1
RESTORED = "restored"
"""The mask's score 1 - H_v / c: 0 for a token left as suppressed as it started, 1 for one fully enabled."""
DELETION = "deletion"
"""Name of the score: rise of the answer's mean negative log-likelihood (nats) when the token is hidden."""
DELETIONS = frozenset({DELETION, "leave-one-out"})
"""Scores that are these effects, whichever name they were asked for by."""


CLASSES = ("needed", "filler", "other")
"""Classes of tokens that have a meaning of their own in summaries and pictures, in reading order: a score should find
the needed ones. A task may name others, which follow alphabetically."""
NEEDED, FILLER, OTHER = CLASSES


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens with the text each contributes; the texts joined give the span's text.

    A token that ends inside a multi-byte character contributes "", the token completing the character all of it.

    Attributes:
        ids: token ids.
        texts: one for each.
    """

    ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.texts):
            raise ValueError(f"{len(self.ids)} token ids but {len(self.texts)} token texts")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def text(self) -> str:
        """The span's text."""
        return "".join(self.texts)


@dataclass(frozen=True)
class MaskLoss:
    """Answer loss in nats per token: at the initial mask, after the last update, and with no mask."""

    initial: float
    final: float
    unmasked: float


@dataclass(frozen=True)
class Trajectory:
    """A recorded optimisation: ``steps`` (S,), the answer ``loss`` (S,) and the score ``restored`` (S, T) at them."""

    steps: tuple[int, ...]
    loss: tuple[float, ...]
    restored: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not len(self.steps) == len(self.loss) == len(self.restored):
            raise ValueError(
                f"a trajectory needs one loss and one row of scores per step, "
                f"got {len(self.steps)} steps, {len(self.loss)} losses and {len(self.restored)} rows"
            )


@dataclass(frozen=True)
class RolloutRecord:
    """One completion, split on tokens, with its scores.

    Attributes:
        prompt_id: identifies the prompt; runs are compared prompt by prompt over equal ids.
        sample: index among this prompt's completions.
        prompt, cot, marker, answer: the spans of `atmanrl.Rollout`, with their texts.
        rest: what follows the answer's value (end of turn and the like), neither masked nor in the loss.
        classes: class of each chain-of-thought token, e.g. "needed", "filler" and "other".
        scores: named scores of the chain-of-thought tokens, ``RESTORED`` from the mask; empty where nothing was
            computed.
        predicted: the parsed answer, or None where none was found.
        expected: the ground truth, or None where there is none.
        correct: whether the two agree, None without a ground truth.
        truncated: the completion reached the length limit before it ended.
        skipped: why no saliency was computed ("no answer found"), or None.
        loss: the mask's losses where a mask was optimised.
        measures: named numbers of the whole completion, such as the faithfulness measures of
            `atmanrl.evaluation.faithfulness`.
        trajectory: the optimisation's course where it was recorded.
    """

    prompt_id: str
    prompt: TokenSpan
    cot: TokenSpan
    answer: TokenSpan = TokenSpan()
    marker: TokenSpan = TokenSpan()
    rest: TokenSpan = TokenSpan()
    sample: int = 0
    classes: tuple[str, ...] = ()
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    predicted: str | None = None
    expected: str | None = None
    correct: bool | None = None
    truncated: bool = False
    skipped: str | None = None
    loss: MaskLoss | None = None
    measures: Mapping[str, float] = field(default_factory=dict)
    trajectory: Trajectory | None = None

    def __post_init__(self) -> None:
        where = f"rollout {self.prompt_id!r}, sample {self.sample}"
        if self.classes and len(self.classes) != len(self.cot):
            raise ValueError(f"{where}: {len(self.cot)} chain-of-thought tokens but {len(self.classes)} classes")
        for name, values in self.scores.items():
            if len(values) != len(self.cot):
                raise ValueError(f"{where}: {len(self.cot)} chain-of-thought tokens but {len(values)} scores {name!r}")
            bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
            if bad is not None:
                raise ValueError(f"{where}: score {name!r} of token {bad} is {values[bad]}")
        if self.trajectory is not None and any(len(row) != len(self.cot) for row in self.trajectory.restored):
            raise ValueError(f"{where}: a row of the trajectory does not have {len(self.cot)} scores")

    @property
    def restored(self) -> tuple[float, ...] | None:
        """The mask's score per chain-of-thought token, None where no mask was optimised."""
        return self.scores.get(RESTORED)

    @property
    def unusable(self) -> bool:
        """Whether its row could not be used at all; ``skipped`` says why, and summaries leave it out."""
        return not self.prompt.ids

    def token_class(self, index: int) -> str:
        """Class of chain-of-thought token ``index``, "other" where the task names none."""
        return self.classes[index] if self.classes else OTHER


@dataclass(frozen=True)
class Run:
    """Rollouts of one model under one setting.

    Attributes:
        label: what a reader calls this run ("before", "step 200").
        rollouts: in the order of the prompts.
        score: the name in `RolloutRecord.scores` that views colour and summarise.
        settings: what produced the run: model, task, generation, mask, seed. Any JSON values; tuples become lists.
    """

    label: str
    rollouts: tuple[RolloutRecord, ...]
    score: str = RESTORED
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", json.loads(_to_json(dict(self.settings))))

    def save(self, path: str | Path) -> None:
        """Write the run as one JSON file, atomically."""
        head = {"label": self.label, "score": self.score, "settings": self.settings}
        lines = ",\n".join(_to_json(asdict(rollout)) for rollout in self.rollouts)
        opening = f'{{"format": "{FORMAT}", "version": {VERSION},\n"run": {_to_json(head)},\n"rollouts": [\n'
        write_text_atomically(path, f"{opening}{lines}\n]}}\n")

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a run written by `save`.

        Raises:
            ValueError: for a file that is not such a run, naming the file, and the line where the JSON breaks.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: {(error.strerror or str(error)).lower()}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path}: not a saliency file: its 'format' is not {FORMAT!r}")
        if data.get("version") != VERSION:
            raise ValueError(f"{path}: version {data.get('version')} of the format, this program reads {VERSION}")
        try:
            rollouts = tuple(_rollout_from_json(item) for item in data["rollouts"])
            return cls(rollouts=rollouts, **data["run"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def write_csv(self, file: TextIO) -> None:
        """One row per chain-of-thought token: prompt_id, sample, position, token_id, text, class and every score."""
        names = sorted({name for rollout in self.rollouts for name in rollout.scores})
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["prompt_id", "sample", "position", "token_id", "text", "class", *names])
        for rollout in self.rollouts:
            columns = [rollout.scores.get(name) for name in names]
            for i, (token_id, text) in enumerate(zip(rollout.cot.ids, rollout.cot.texts, strict=True)):
                values = ["" if column is None else column[i] for column in columns]
                token_class = rollout.token_class(i)
                writer.writerow([rollout.prompt_id, rollout.sample, i, token_id, text, token_class, *values])


def paired_rollouts(before: Run, after: Run) -> list[tuple[RolloutRecord, RolloutRecord]]:
    """Rollouts of two runs with equal prompt and sample index, in the order of ``before``.

    Rows that could not be used are left out.

    Raises:
        ValueError: if the runs share no prompt, or one prompt_id stands for two different prompts.
    """
    partners = {(rollout.prompt_id, rollout.sample): rollout for rollout in after.rollouts}
    pairs = []
    for rollout in before.rollouts:
        partner = partners.get((rollout.prompt_id, rollout.sample))
        if partner is None or rollout.unusable or partner.unusable:
            continue
        if partner.prompt.ids != rollout.prompt.ids:
            raise ValueError(
                f"prompt {rollout.prompt_id!r} is not the same prompt in {before.label!r} and {after.label!r}: "
                f"the runs cannot be paired"
            )
        pairs.append((rollout, partner))
    if not pairs:
        raise ValueError(f"{before.label!r} and {after.label!r} share no prompt: the runs cannot be paired")
    return pairs


def check_writable(path: str | Path, option: str = "", *, made: bool = False) -> None:
    """Refuse a file that cannot be written, before anything is computed for it.

    Args:
        path: a file that may be there already.
        option: how the command line names it, for the message.
        made: missing directories above it will be made.

    Raises:
        InputError: for a directory, a parent that is none, or a place that the process may not write to.
    """
    path = Path(path)
    named = f"{option} {path}".lstrip()
    if not made and not path.parent.is_dir():
        raise InputError(f"{named}: there is no directory {path.parent}")
    if path.is_dir():
        raise InputError(f"{named}: is a directory")
    if path.exists() and not path.is_file():
        return
    parent = next((each for each in path.resolve().parents if each.exists()), Path("/"))
    if not parent.is_dir():
        raise InputError(f"{named}: {parent} is not a directory")
    try:
        # Permissions alone do not tell: a file system may be read-only, or full.
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"x")
    except OSError as error:
        raise InputError(f"{named}: cannot be written ({(error.strerror or str(error)).lower()})") from error


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 so that a reader finds either the old file or the whole new one.

    A link is followed. A pipe, a terminal or another device is written to as it is.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8", newline="\n")
        return
    path = path.resolve()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        # A temporary file is private to its owner; the result gets what the process's umask gives any new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        # A full disk needs the room.
        os.unlink(name)
        raise


def decimals(values: ArrayLike) -> tuple[float, ...]:
    """The shortest decimals that still tell float32 values apart: files stay small and lose nothing."""
    return tuple(float(str(value)) for value in np.asarray(values, dtype=np.float32))


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _rollout_from_json(item: dict[str, Any]) -> RolloutRecord:
    item = dict(item)
    for name in ("prompt", "cot", "marker", "answer", "rest"):
        item[name] = TokenSpan(ids=tuple(item[name]["ids"]), texts=tuple(item[name]["texts"]))
    item["classes"] = tuple(item["classes"])
    item["scores"] = {name: tuple(values) for name, values in item["scores"].items()}
    if item["loss"] is not None:
        item["loss"] = MaskLoss(**item["loss"])
    if item["trajectory"] is not None:
        item["trajectory"] = Trajectory(**{name: _as_tuples(value) for name, value in item["trajectory"].items()})
    return RolloutRecord(**item)


def _as_tuples(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(_as_tuples(value) if isinstance(value, Sequence) else value for value in values)
