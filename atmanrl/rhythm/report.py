"""What WAAD and FAI say about rollouts: how their peaks couple, and what a changed token does to what follows.

Source: "Attention Illuminates LLM Reasoning" (arXiv 2510.13554), its Tables 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.evaluation.summary import auroc
from atmanrl.generation import GenerationSettings, generate
from atmanrl.rhythm.credit import highest
from atmanrl.rhythm.series import RolloutSeries

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Coupling:
    """How often one kind of peak stands where another is, against chance.

    Attributes:
        name: what is counted; observed: its share; expected: the same with the first kind's places shuffled within each
            rollout; peaks: how many of the first kind there are.
    """

    name: str
    observed: float
    expected: float
    peaks: int

    @property
    def lift(self) -> float:
        """observed / expected - 1; NaN where nothing is expected."""
        return self.observed / self.expected - 1 if self.expected else float("nan")


def couplings(
    series: Sequence[RolloutSeries], *, share: float = 0.2, lookback: int = 3, shuffles: int = 200, seed: int = 0
) -> list[Coupling]:
    """The two couplings of Table 2: entropy at WAAD peaks, and WAAD peaks shortly before FAI peaks.

    A peak is a token among the highest ``share`` of its rollout. "Shortly before" is at most ``lookback`` tokens, the
    token itself included. The paper does not state its thresholds.

    Args:
        series: with entropies.
        shuffles: permutations of a rollout's places that the expectation is a mean over; seed: of them.
    """
    rng = np.random.default_rng(seed)
    pairs: dict[str, list[tuple[Flags, Flags]]] = {
        "high entropy at a WAAD peak": [],
        "WAAD peak before an FAI peak": [],
    }
    for one in series:
        assert one.entropy is not None
        waad, fai, entropy = (_flags(highest(values, share)) for values in (one.waad, one.fai, one.entropy))
        pairs["high entropy at a WAAD peak"].append((waad, entropy))
        # A place counts if there is a WAAD peak on it or up to `lookback` places before.
        near = np.convolve(waad, np.ones(lookback + 1))[: len(waad)] > 0
        pairs["WAAD peak before an FAI peak"].append((fai, near))
    found = []
    for name, flags in pairs.items():
        peaks = int(sum(first.sum() for first, _ in flags))
        hits = sum(int((first & second).sum()) for first, second in flags)
        shuffled = [
            sum(int((rng.permutation(first) & second).sum()) for first, second in flags) for _ in range(shuffles)
        ]
        found.append(Coupling(name, hits / max(1, peaks), float(np.mean(shuffled)) / max(1, peaks), peaks))
    return found


@dataclass(frozen=True)
class Perturbation:
    """Jaccard similarity of the continuations before and after one token is replaced, each a mean over tokens.

    Attributes:
        high, low: at tokens of high and of low FAI; count: tokens replaced of either kind.
    """

    high: float
    low: float
    count: int


def perturbation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    series: Sequence[RolloutSeries],
    *,
    per_rollout: int = 2,
    first_distance: int = 10,
    continuation: int = 64,
) -> Perturbation:
    """Replace tokens of the highest and of the lowest FAI by the model's next best, and let it go on (Table 1).

    Continuations are greedy, from the original token and from its replacement, and are compared as sets of tokens. The
    last ``first_distance`` + 1 tokens of a response, which have no later row to be read by, are not replaced.

    Args:
        per_rollout: tokens of each kind per rollout; rollouts with fewer than twice as many candidates are left out.
        first_distance: lower end of FAI's horizon.
        continuation: tokens generated.
    """
    prefixes: list[list[int]] = []
    kinds: list[bool] = []
    for prompt, response, one in zip(prompts, responses, series, strict=True):
        n = len(response) - first_distance - 1
        if n < 2 * per_rollout:
            continue
        order = torch.argsort(one.fai[:n], descending=True, stable=True).tolist()
        best_other = _next_best(model, prompt, response)
        for place in (*order[:per_rollout], *order[-per_rollout:]):
            before = [*prompt, *response[:place]]
            prefixes += [[*before, response[place]], [*before, best_other[place]]]
        kinds += [True] * per_rollout + [False] * per_rollout
    if not prefixes:
        return Perturbation(float("nan"), float("nan"), 0)
    settings = GenerationSettings(max_new_tokens=continuation, temperature=0.0)
    written = [samples[0] for samples in generate(model, tokenizer, prefixes, settings, seed=0)]
    similar = [jaccard(a, b) for a, b in zip(written[::2], written[1::2], strict=True)]
    high = [value for value, is_high in zip(similar, kinds, strict=True) if is_high]
    low = [value for value, is_high in zip(similar, kinds, strict=True) if not is_high]
    return Perturbation(float(np.mean(high)), float(np.mean(low)), len(high))


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    """|A and B| / |A or B| of two sequences as sets; 1 for two empty ones."""
    first, second = set(a), set(b)
    return len(first & second) / len(first | second) if first | second else 1.0


@dataclass(frozen=True)
class NeededRank:
    """Where FAI ranks the tokens that are known to be needed, a mean over rollouts.

    Attributes:
        percentile: mean rank of the needed tokens among all, 0 lowest to 1 highest; 0.5 is chance.
        auroc: probability that a needed token has a higher FAI than another.
        rollouts: how many have both kinds of tokens.
    """

    percentile: float
    auroc: float
    rollouts: int


def needed_rank(series: Sequence[RolloutSeries], needed: Sequence[Sequence[bool]]) -> NeededRank:
    """Rank of the needed tokens' FAI among a response's leading tokens.

    Args:
        needed: of each response's leading tokens (its chain of thought), which are needed; the rest is left out.
    """
    percentiles, areas = [], []
    for one, flags in zip(series, needed, strict=True):
        truth = np.asarray(flags, dtype=bool)
        if not truth.any() or truth.all():
            continue
        fai = one.fai[: len(truth)].cpu().double().numpy()
        percentiles.append(float(((rankdata(fai)[truth] - 1) / (len(truth) - 1)).mean()))
        areas.append(auroc(fai, truth))
    if not areas:
        return NeededRank(float("nan"), float("nan"), 0)
    return NeededRank(float(np.mean(percentiles)), float(np.mean(areas)), len(areas))


@torch.no_grad()
def _next_best(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> list[int]:
    """For every response token the most probable other token at its place."""
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].clone()
    own = torch.tensor(list(response), device=model.device)
    best: list[int] = logits.scatter_(1, own[:, None], -torch.inf).argmax(1).tolist()
    return best


def _flags(chosen: Tensor) -> Flags:
    flags: Flags = chosen.cpu().numpy()
    return flags
