"""Configuration dataclasses; importing them loads no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

AnswerLoss = Literal["value", "all"]
Weights = Literal["model", "float8"]
CreditStrategy = Literal["none", "local", "global", "coupled", "random", "entropy", "saliency"]
CreditSign = Literal["both", "positive"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


@dataclass(frozen=True)
class MaskConfig:
    """Settings of the mask optimisation. The defaults are the paper's (AtManRL, arXiv 2604.16158).

    The trainable number of a CoT token is H; the bias its key column gets is ``scale * min(H, upper)``, natural-log
    units. AdamW updates H alone, for a fixed number of steps.

    Attributes:
        steps: optimiser steps.
        lr: step size of AdamW.
        betas: AdamW's moment decays.
        eps: AdamW's denominator offset.
        weight_decay: decoupled weight decay; alone it restores 1 - (1 - lr * weight_decay) ** steps of the mask.
        init: H at the start, negative: every CoT token suppressed.
        scale: factor from the clamped H to the bias.
        upper: upper clamp of H; 0 means a token is at most fully enabled.
        sparsity: nats that restoring one token completely costs: the loss gains
            ``sparsity * sum_v |min(H_v, upper) / init - 1|``, the L1 norm of what was restored. 0 in the paper.
        answer_loss: which tokens the loss averages over: "value", the answer's, or "all", the marker's as well.
        weights: "model" computes with the model's weights, "float8" with the decoder layers' weights and their inputs
            rounded to e4m3, one scale per row (models of the fast path only).
        capture: replay the steps from a CUDA graph, captured once per batch; models on a GPU only.

    Raises:
        ValueError: for a value outside its range, with the value.
    """

    steps: int = 200
    lr: float = 1e-3
    betas: tuple[float, float] = (0.6, 0.9999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    init: float = -0.4
    scale: float = 10.0
    upper: float = 0.0
    sparsity: float = 0.0
    answer_loss: AnswerLoss = "value"
    weights: Weights = "model"
    capture: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int):
            raise ValueError(f"steps must be a whole number, got {self.steps}")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        # Recipes are YAML, where a pair arrives as a list.
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not (-math.inf < self.init < 0 and self.init < self.upper):
            raise ValueError(f"init must be negative, finite and below upper ({self.upper}), got {self.init}")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if not self.sparsity >= 0:
            raise ValueError(f"sparsity must not be negative, got {self.sparsity}")
        if self.answer_loss not in get_args(AnswerLoss):
            raise ValueError(f"answer_loss must be one of {get_args(AnswerLoss)}, got {self.answer_loss!r}")
        if self.weights not in get_args(Weights):
            raise ValueError(f"weights must be one of {get_args(Weights)}, got {self.weights!r}")


@dataclass(frozen=True)
class SeriesConfig:
    """Heads and windows of WAAD and FAI. The defaults are those of arXiv 2510.13554 (v2).

    Attributes:
        layers: number of evenly spaced layers from the first to the last third of the model.
        head_share: share of those layers' heads in each of the two sets, of lowest and of highest mean distance.
        window: W of WAAD, in tokens.
        horizon: first and last distance, in tokens, of the later rows that FAI averages.

    Raises:
        ValueError: for a value outside its range, with the value.
    """

    layers: int = 5
    head_share: float = 0.3
    window: int = 10
    horizon: tuple[int, int] = (10, 100)

    def __post_init__(self) -> None:
        object.__setattr__(self, "horizon", tuple(self.horizon))
        if self.layers < 1 or self.window < 1:
            raise ValueError(f"layers and window must be at least 1, got {self.layers} and {self.window}")
        if not 0 < self.head_share <= 0.5:
            raise ValueError(f"head_share must lie in (0, 0.5], got {self.head_share}")
        if len(self.horizon) != 2 or not 0 <= self.horizon[0] <= self.horizon[1]:
            raise ValueError(f"horizon must be two numbers 0 <= low <= high, got {self.horizon}")


@dataclass(frozen=True)
class CreditConfig:
    """Credit assignment: gamma_t multiplies the advantage of token t. The defaults are those of arXiv 2510.13554.

    Where the paper leaves a choice open, the default is this project's (docs/math.md).

    Attributes:
        strategy: "none"; "local" (local-chunk), "global" (global-anchor) or "coupled" of the paper; its control arms
            "random" and "entropy"; or "saliency", from the scores of the run's saliency estimator.
        gain: gamma of a chosen token (the paper's gamma_amp); 1 chooses nothing.
        share: share of a rollout's tokens that is chosen.
        alpha: share of a locally dominated token's bonus that goes to the token that introduces it.
        lookback: tokens before a token among which its introduction is sought.
        waad_quantile: a token is locally dominated only if its WAAD is at most this quantile of the rollout's.
        delta_quantile: and if the largest change of WAAD shortly before it is at least this quantile.
        floor: least gamma of the "saliency" strategy.
        sign: "both", or "positive": negative advantages are left as they are.
        series: of the statistics behind local, global and coupled.

    Raises:
        ValueError: for a value outside its range, with the value.
    """

    strategy: CreditStrategy = "none"
    gain: float = 1.5
    share: float = 0.4
    alpha: float = 0.5
    lookback: int = 3
    waad_quantile: float = 0.5
    delta_quantile: float = 0.5
    floor: float = 0.5
    sign: CreditSign = "both"
    series: SeriesConfig = field(default_factory=SeriesConfig)

    def __post_init__(self) -> None:
        if isinstance(self.series, Mapping):
            object.__setattr__(self, "series", SeriesConfig(**self.series))
        for name, choices in (("strategy", CreditStrategy), ("sign", CreditSign)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        if not 0 < self.gain < math.inf:
            raise ValueError(f"gain must be positive and finite, got {self.gain}")
        for name in ("share", "alpha", "waad_quantile", "delta_quantile", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.lookback < 1:
            raise ValueError(f"lookback must be at least 1, got {self.lookback}")


@dataclass(frozen=True)
class LedgerConfig:
    """The built-in task: copy the asked pairs from a ledger, with planted filler in between.

    Attributes:
        pairs: name-value pairs in a prompt.
        asked: how many of them are asked for, at most ``pairs``.
        filler_probability: chance that one more filler word stands after a copied pair (geometric count).
        lookup_probability: chance that a true pair nobody asked for is copied after a pair as well.
        random_value_fraction: share of the pre-training examples whose chain of thought holds random values.
        random_name_probability: chance of each copied name in those chains to be random as well.
        train_size: prompts in the training split.
        test_size: prompts in the test split; no training prompt is among them, whatever the seeds.
    """

    pairs: int = 5
    asked: int = 3
    filler_probability: float = 0.45
    lookup_probability: float = 0.25
    random_value_fraction: float = 0.3
    random_name_probability: float = 0.2
    train_size: int = 4096
    test_size: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.asked <= self.pairs:
            raise ValueError(f"asked must lie between 1 and pairs ({self.pairs}), got {self.asked}")
        for name in ("filler_probability", "lookup_probability"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("random_value_fraction", "random_name_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.train_size < 1 or self.test_size < 1:
            raise ValueError(f"train_size and test_size must be positive, got {self.train_size} and {self.test_size}")


@dataclass(frozen=True)
class DataConfig:
    """The task of training and evaluation, and the source of its rows.

    Attributes:
        name: "ledger", "gsm8k" or "mmlu".
        path: hub id, local JSONL or Parquet file, or directory of such files named after the splits; None is the
            task's own (openai/gsm8k, cais/mmlu; Ledger is generated).
        subset: the hub configuration; None is the task's own ("main", "all").
        train_split: split, or file stem in a directory, to train on; None is the task's own.
        test_split: the same for the held-out rows.
        test_path: local file with the held-out rows where ``path`` is a single file.
        test_fraction: share of the rows held out, by seed, where the source has no test rows of its own.
        train_limit: keep this many training rows, chosen by seed; None keeps all.
        test_limit: the same for the test rows.
        seed: of the generated rows, the hold-out and the limits.
        prompt_style: "chat" makes message lists for the model's chat template, "plain" makes strings.
        system_prompt: content of a system message before the question, chat style only.
        answers: "strict" accepts an answer only behind the phrase the prompt asks for, "flexible" also behind others
            and, failing those, the last number or letter.
        ledger: numbers of the built-in task.
    """

    name: Literal["ledger", "gsm8k", "mmlu"] = "ledger"
    path: str | None = None
    subset: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    test_path: str | None = None
    test_fraction: float = 0.1
    train_limit: int | None = None
    test_limit: int | None = None
    seed: int = 0
    prompt_style: Literal["chat", "plain"] = "chat"
    system_prompt: str | None = None
    answers: Literal["strict", "flexible"] = "strict"
    ledger: LedgerConfig = field(default_factory=LedgerConfig)

    def __post_init__(self) -> None:
        for name, choices in (
            ("name", ("ledger", "gsm8k", "mmlu")),
            ("prompt_style", ("chat", "plain")),
            ("answers", ("strict", "flexible")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"data {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.name == "ledger":
            elsewhere = ("path", "subset", "train_split", "test_split", "test_path")
            if given := [name for name in elsewhere if getattr(self, name) is not None]:
                raise ValueError(
                    f"{given[0]} is not for ledger, whose rows are generated; name gsm8k or mmlu for others"
                )
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction must lie in (0, 1), got {self.test_fraction}")
        for name in ("train_limit", "test_limit"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be positive or None, got {limit}")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters trained in place of the weights, through PEFT (the ``peft`` extra).

    Attributes:
        rank: of the update B A; alpha: its scale is alpha / rank; dropout: in front of A, during the update only.
        targets: names of the adapted layers, or "all-linear".
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"


@dataclass(frozen=True)
class ModelConfig:
    """The policy.

    Attributes:
        name: Hugging Face id, local directory, or "ledger" for the built-in task's own checkpoint.
        revision: branch, tag or commit of a Hugging Face id.
        dtype: of the parameters.
        attn_implementation: attention of the policy's own passes (generation and update); "auto" is
            flash_attention_2 where flash-attn is installed and computes in ``dtype``, else sdpa.
        lora: train adapters instead of the weights.

    Raises:
        ValueError: for an unknown dtype.
    """

    name: str
    revision: str | None = None
    dtype: Dtype = "float32"
    attn_implementation: str = "auto"
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation before and after training.

    Attributes:
        prompts: held-out prompts, 0 for no evaluation.
        samples: completions per prompt.
        temperature: of the sampling; 0 decodes greedily.
        seed: of the sampling, the same before and after.
        batch_size: prompts generated together.
        saliency: also optimise masks, and report the saliency per token class.
        before: evaluate the untrained policy too, on the same prompts.
    """

    prompts: int = 0
    samples: int = 1
    temperature: float = 1.0
    seed: int = 1234
    batch_size: int = 64
    saliency: bool = True
    before: bool = True

    def __post_init__(self) -> None:
        if self.prompts < 0 or self.samples < 1 or self.batch_size < 1:
            raise ValueError(
                f"prompts must not be negative, samples and batch_size at least 1; "
                f"got {self.prompts}, {self.samples} and {self.batch_size}"
            )
        if self.temperature < 0 or (self.temperature == 0 and self.samples > 1):
            raise ValueError(
                f"temperature must not be negative, and is 0 for one sample alone; got {self.temperature} "
                f"for {self.samples}"
            )


# Only "paper" is a default; docs/benchmarks.md has each preset's agreement with it and what it saves. Those with fewer
# steps keep steps * lr, how far a token can move.
MASK_PRESETS = {
    "paper": MaskConfig(),
    "half": MaskConfig(steps=100, lr=2e-3),
    "quarter": MaskConfig(steps=50, lr=4e-3),
    "tenth": MaskConfig(steps=20, lr=1e-2),
    "float8": MaskConfig(weights="float8"),
}
