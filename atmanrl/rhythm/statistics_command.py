"""``atmanrl explain --statistics``: WAAD and FAI of completions, how they couple, and what changed tokens do."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atmanrl.config import ModelConfig, SeriesConfig
from atmanrl.errors import explained_without_training
from atmanrl.evaluation.evaluate import say_skipped
from atmanrl.evaluation.examples import Example
from atmanrl.evaluation.explain import check_outputs, completed, split_template_kwargs
from atmanrl.evaluation.recording import token_texts
from atmanrl.generation import GenerationSettings
from atmanrl.models import load_policy
from atmanrl.recipe import read_settings
from atmanrl.rhythm import credit
from atmanrl.rhythm.report import Coupling, NeededRank, Perturbation, couplings, needed_rank, perturbation
from atmanrl.rhythm.series import RolloutSeries, attention_series
from atmanrl.rhythm.series_plot import plot_series
from atmanrl.tasks.ledger import ANSWER, ASK, COT, classify_tokens


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
