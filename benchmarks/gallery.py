"""Draws docs/images/estimators.png, one chain of thought under several estimators: python -m benchmarks.gallery."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from atmanrl import Rollout, estimate_saliency
from atmanrl.tasks.ledger import CHECKPOINT

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "estimators.png"
PROMPT = "a 6 c 0 b 6 e 8 d 4 ? c b e <cot>"
CHAIN = "c 0 . . b 6 ~ d 4 e 8"
ANSWER = "c 0 b 6 e 8"
NEEDED = (1, 5, 10)
TITLES = {
    "leave-one-out": "leave-one-out (exact)",
    "sparse-mask": "sparse mask (best)",
    "integrated": "integrated gradient",
    "attention": "attention",
    "mask": "the paper's mask",
}


def scores() -> dict[str, np.ndarray]:
    """The chain's scores by each estimator, each brought to a largest magnitude of 1."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT)
    parts = (tokenizer.encode(text, add_special_tokens=False) for text in (CHAIN, ANSWER, "<ans>"))
    rollout = Rollout(tokenizer.encode(PROMPT), *parts)
    found = {}
    for name in TITLES:
        (item,) = estimate_saliency(model, [rollout], name, progress=False)
        values = item.scores.double().numpy()
        found[name] = values / np.abs(values).max()
    return found


def draw(found: dict[str, np.ndarray]) -> Figure:
    """A row of coloured tokens per estimator; the needed tokens are framed."""
    mpl.rcParams["font.family"] = "DejaVu Sans"
    tokens = CHAIN.split()
    figure = Figure(figsize=(9.6, 3.0), layout="constrained", dpi=160)
    axes = figure.subplots()
    image = axes.imshow(np.stack(list(found.values())), cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto")
    for row, values in enumerate(found.values()):
        for column, token in enumerate(tokens):
            ink = "white" if abs(values[column]) > 0.6 else "black"
            axes.text(column, row, token, ha="center", va="center", color=ink, family="DejaVu Sans Mono", fontsize=13)
    for column in NEEDED:
        frame = mpl.patches.Rectangle((column - 0.47, -0.47), 0.94, len(found) - 0.06, fill=False, lw=1.8)
        axes.add_patch(frame)
    axes.set_yticks(range(len(found)), list(TITLES.values()))
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(f"{PROMPT}     answer  {ANSWER}     (framed: the values that the answer needs)", fontsize=10)
    bar = figure.colorbar(image, ax=axes, ticks=[-1, 0, 1], aspect=12)
    bar.set_label("score / largest", fontsize=9)
    bar.outline.set_visible(False)
    return figure


def main() -> int:
    draw(scores()).savefig(PICTURE, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
