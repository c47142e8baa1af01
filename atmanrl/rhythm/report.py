"""``atmanrl explain --statistics``: coupling of the peaks of WAAD and FAI, and the effect of replaced tokens.

Source: "Attention Illuminates LLM Reasoning" (arXiv 2510.13554), its Tables 1 and 2 and Figure 2.
"""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.config import ModelConfig, SeriesConfig
from atmanrl.errors import explained_without_training
from atmanrl.evaluation.evaluate import say_skipped
from atmanrl.evaluation.examples import Example
from atmanrl.evaluation.explain import check_outputs, completed, split_template_kwargs
from atmanrl.evaluation.recording import token_texts
from atmanrl.evaluation.summary import auroc
from atmanrl.generation import GenerationSettings, generate
from atmanrl.models import load_policy
from atmanrl.recipe import RecipeError
from atmanrl.report.plots import FIGURE_STYLE
from atmanrl.rhythm import credit
from atmanrl.rhythm.series import RolloutSeries, attention_series
from atmanrl.settings import read_settings
from atmanrl.tasks.ledger import ANSWER, ASK, COT, classify_tokens

# Token texts may hold dollars, which must not start a formula.
_STYLE: Any = {**FIGURE_STYLE, "font.size": 8, "text.parse_math": False}
_MOST_LABELS = 120

Flags = NDArray[np.bool_]


@explained_without_training("explanation", "files written before this one are whole")
def statistics_command(
    model: ModelConfig,
    examples: Sequence[Example],
    overrides: Sequence[tuple[str, str]] = (),
    *,
    plot: Path | None = None,
    json: Path | None = None,
    generation: GenerationSettings | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    color: bool = True,
) -> int:
    """Print the coupling table and the perturbation test, plot the first example's series, and return the exit status.

    Args:
        model: whose attention is read.
        examples: prompts; the model writes completions that are not given.
        overrides: ``series.*`` keys, the fields of `SeriesConfig`.
        plot: picture of the first example (.png, .svg, .pdf); json: every series and number.
        generation: how completions are written, where None at ``temperature`` up to the context's end; seed: of the
            sampling.

    Raises:
        ValueError: for examples or options that cannot be used, before anything is computed.
    """
    template_kwargs, overrides = split_template_kwargs(overrides)
    config = series_config(overrides)
    check_outputs(plot=plot, json=json)
    if plot is not None and plot.suffix[1:] not in FigureCanvasBase.filetypes:
        raise ValueError(f"--plot {plot}: unknown kind of picture; use .png, .svg or .pdf")
    policy, tokenizer = load_policy(model)
    done = completed(
        policy,
        tokenizer,
        examples,
        generation=generation,
        temperature=temperature,
        chat_template_kwargs=template_kwargs,
        seed=seed,
    )
    usable = [i for i, fault in enumerate(done.faults) if fault is None]
    prompts, responses = [done.prompts[i] for i in usable], [done.completions[i] for i in usable]
    generated = done.generation
    series = attention_series(policy, prompts, responses, config, entropy=True)
    texts = [token_texts(tokenizer, response) for response in responses]
    coupled = couplings(series)
    changed = perturbation(policy, tokenizer, prompts, responses, series, first_distance=config.horizon[0])
    prompt_words = [str(tokenizer.decode(prompt)).split() for prompt in prompts]
    needed = needed_rank(series, [_needed(p, t) for p, t in zip(prompt_words, texts, strict=True)])
    console = Console(no_color=not color, highlight=False)
    console.print(_origin(len(responses), generated), markup=False)
    _print(console, coupled, changed, needed)
    if plot is not None:
        _plot(plot, texts[0], series[0], config)
        console.print(f"written: {plot}", markup=False)
    if json is not None:
        content = {
            "model": model.name,
            "generation": None if generated is None else asdict(generated) | {"seed": seed},
            "series": asdict(config),
            "couplings": [{**asdict(item), "lift": item.lift} for item in coupled],
            "perturbation": asdict(changed),
            "needed": asdict(needed),
            "rollouts": [
                {"tokens": list(tokens), "waad": one.waad.tolist(), "fai": one.fai.tolist()}
                for tokens, one in zip(texts, series, strict=True)
            ],
        }
        json.write_text(json_format.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        console.print(f"written: {json}", markup=False)
    return say_skipped(done.faults)


def series_config(overrides: Sequence[tuple[str, str]]) -> SeriesConfig:
    """A `SeriesConfig` from ``series.*`` overrides.

    Raises:
        RecipeError: for any other key, or a value out of its range.
    """
    for key, _ in overrides:
        if key.partition(".")[0] != "series":
            raise RecipeError(f"--{key}: besides the options of this command only --series.* can be set")
    return read_settings(overrides, {"series": SeriesConfig}).made["series"]  # type: ignore[no-any-return]


def _needed(prompt: Sequence[str], tokens: Sequence[str]) -> list[bool]:
    """Which chain-of-thought tokens of a Ledger completion are needed; nothing where the prompt is no ledger's."""
    if ASK not in prompt or prompt[-1] != COT:
        return []
    words = [token.strip() for token in tokens]
    end = words.index(ANSWER) if ANSWER in words else len(words)
    asked = list(prompt[prompt.index(ASK) + 1 : -1])
    return [kind == "needed" for kind in classify_tokens({"asked": asked}, words)[:end]]


def _origin(n: int, generated: GenerationSettings | None) -> str:
    """Whose attention the numbers are of: how the completions came about."""
    rollouts = f"{n} rollout{'' if n == 1 else 's'}"
    if generated is None:
        return f"{rollouts}, completions as given"
    if generated.temperature > 0:
        return f"{rollouts}, completions sampled at temperature {generated.temperature:g}"
    return f"{rollouts}, completions greedy; --temperature 1 reads samples of the policy, as the paper does"


def _print(console: Console, coupled: Sequence[Coupling], changed: Perturbation, needed: NeededRank) -> None:
    table = Table("coupling", "observed", "by chance", "lift", "peaks", box=None)
    for item in coupled:
        table.add_row(
            item.name, f"{item.observed:.3f}", f"{item.expected:.3f}", f"{100 * item.lift:+.0f} %", str(item.peaks)
        )
    console.print(table)
    if changed.count:
        console.print(
            f"continuations after a replaced token, Jaccard: high FAI {changed.high:.3f}, low FAI {changed.low:.3f}"
            f" ({changed.count} tokens each)"
        )
    else:
        console.print("no response is long enough for the perturbation test")
    if needed.rollouts:
        console.print(
            f"needed tokens' FAI: mean percentile {100 * needed.percentile:.0f}, AUROC {needed.auroc:.3f}"
            f" (rollouts: {needed.rollouts})"
        )


def _plot(path: Path, tokens: Sequence[str], series: RolloutSeries, config: SeriesConfig) -> None:
    dominated, _ = credit.locally_dominated(series.waad, series.fai)
    plot_series(
        path,
        tokens,
        series.waad.tolist(),
        series.fai.tolist(),
        local=credit.highest(credit.waad_change(series.waad), 0.4).tolist(),
        anchors=credit.highest(series.fai, 0.4).tolist(),
        dominated=dominated.tolist(),
        first_distance=config.horizon[0],
    )


def plot_series(
    path: Path,
    tokens: Sequence[str],
    waad: Sequence[float],
    fai: Sequence[float],
    *,
    local: Sequence[bool],
    anchors: Sequence[bool],
    dominated: Sequence[bool],
    first_distance: int,
) -> None:
    """Two panels over the tokens: WAAD with the tokens chosen by its change, FAI with its anchors.

    Args:
        path: the picture; its ending decides the format.
        tokens: texts; written below the axis up to 120 of them.
        waad, fai: one value per token.
        local: what local-chunk credit amplifies; anchors: what global-anchor credit does; dominated: anchors that read
            locally.
        first_distance: lower end of FAI's horizon; as many of the last tokens have no row to be read by.
    """
    n = len(tokens)
    places = range(n)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(6.0, min(0.16 * n, 30.0)), 4.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.plot(places, waad, color="#0072b2", linewidth=1.2)
        chosen = [i for i in places if local[i]]
        upper.plot(
            chosen, [waad[i] for i in chosen], "o", color="#0072b2", markersize=3.5, label="amplified: local-chunk"
        )
        upper.set_ylabel("WAAD (tokens)")
        lower.plot(places, fai, color="#d55e00", linewidth=1.2)
        for label, marker, of_kind in (
            ("amplified: global-anchor", "o", False),
            ("the same, locally dominated", "s", True),
        ):
            chosen = [i for i in places if anchors[i] and dominated[i] == of_kind]
            lower.plot(chosen, [fai[i] for i in chosen], marker, color="#d55e00", markersize=4, label=label)
        if first_distance:
            lower.axvspan(
                max(n - first_distance, 0) - 0.5, n - 0.5, color="#f1f2f4", zorder=0, label="no row of the horizon"
            )
        lower.set_ylabel("FAI")
        for axis in (upper, lower):
            axis.set_xlim(-0.5, n - 0.5)
            # Above the curves, which leave no corner free.
            axis.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncol=3, frameon=False)
        if n <= _MOST_LABELS:
            texts = [token.strip() or repr(token) for token in tokens]
            lower.set_xticks(list(places), texts, rotation=90, fontsize=6.5)
        else:
            lower.set_xlabel("response token")
        figure.savefig(path, dpi=160, facecolor="white")


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
        waad, fai, entropy = (_flags(credit.highest(values, share)) for values in (one.waad, one.fai, one.entropy))
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
