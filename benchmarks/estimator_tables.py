"""Markdown of the estimator benchmark's results, for docs/estimators.md (benchmarks.tables writes it there)."""

from __future__ import annotations

from typing import Any

from benchmarks.claim_report import Measure, table

TITLES = {
    "auroc": "AUROC",
    "precision": "precision@k",
    "leave_one_out": "rank, leave-one-out",
    "substitution": "rank, substitution",
    "comprehensiveness": "comprehensiveness",
    "sufficiency": "sufficiency",
}
SETS = {"sampled": "Sampled chains", "busy": "Reference chains with more idle tokens"}
ARMS = {
    "outcome": "outcome only",
    "mask": "`mask`",
    "sparse-mask": "`sparse-mask`",
    "leave-one-out": "`leave-one-out`",
}
REWARDS = (
    Measure("accuracy", "accuracy (%)", 100, 1),
    Measure("cot_tokens", "CoT length (tokens)"),
    Measure("filler_tokens", "filler per CoT (tokens)"),
    Measure("repeated", "chains that repeat needed values (%)", 100, 1),
    Measure("restored_auroc", "AUROC of `mask`"),
    Measure("deletion_auroc", "AUROC of leave-one-out"),
    Measure("deletion_mass", "summed deletion effects per CoT (nats)"),
    Measure("early_answering_aoc", "early answering AOC"),
    Measure("causal_influence", "causal influence (nats)", decimals=3),
    Measure("mistake_unchanged", "answers unchanged by a mistake (%)", 100, 1),
    Measure("comprehensiveness", "comprehensiveness of leave-one-out", decimals=3),
    Measure("sufficiency", "sufficiency of leave-one-out", decimals=3),
)


def estimator_tables(files: list[dict[str, Any]]) -> str:
    """Per results file: every estimator's measures and cost on sampled chains; gains of `sparse-mask` on both sets."""
    if not files:
        return "Not yet measured.\n"
    parts = []
    for content in files:
        (first, found), *others = content["sets"].items()
        parts.append(
            f"torch {content['versions']['torch']}, commit {content['commit']}, held-out prompts."
            f" **{SETS[first]}**, {found['rollouts']} of {found['tokens']:.1f} tokens on average; the last column is"
            " the share of chains whose reward three filler words lower.\n"
        )
        parts.append(_measures(found["results"], content["reward_falls"]))
        parts.append("`sparse-mask` minus `mask`, paired over prompts, 95 % intervals:\n")
        parts.append(f"- {SETS[first]}: {_gains(found['results'])}")
        for name, other in others:
            parts[-1] += f"- {SETS[name]} ({other['tokens']:.1f} tokens): {_gains(other['results'])}"
    return "\n".join(parts)


def reward_tables(files: list[dict[str, Any]]) -> str:
    """What training on each estimator's reward did, over seeds."""
    if not files:
        return "Not yet measured.\n"
    (content,) = files
    seeds = len({run["seed"] for run in content["runs"]})
    pairs = [(arm, "outcome") for arm in ARMS if arm != "outcome"]
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    head = (
        f"{versions}, commit {content['commit']}; {seeds} seeds per arm. Means over seeds; differences are"
        " paired by seed, with 95 % Student intervals.\n"
    )
    return f"{head}\n{table(content, REWARDS, ARMS, pairs)}"


def _measures(results: dict[str, Any], falls: dict[str, Any]) -> str:
    mask = _passes(results["mask"])
    lines = [_row(["estimator", *TITLES.values(), "cost / mask's", "filler lowers reward"]), _rule(3 + len(TITLES))]
    for name, row in results.items():
        cells = [f"{_passes(row) / mask:.3f}", f"{falls[name]['value']:.2f}"]
        lines.append(_row([f"`{name}`", *(_value(row, key) for key in TITLES), *cells]))
    return "\n".join(lines) + "\n"


def _gains(results: dict[str, Any]) -> str:
    best = results["sparse-mask"]["over_mask"]
    gains = ", ".join(
        f"{title} {best[key]['value']:+.3f} [{best[key]['low']:+.3f}, {best[key]['high']:+.3f}]"
        for key, title in TITLES.items()
    )
    return f"{gains}.\n".replace("-0.", "−0.")


def _value(row: dict[str, Any], key: str) -> str:
    return f"{row['measures'][key]['value']:.3f}".replace("-", "−")


def _passes(row: dict[str, Any]) -> float:
    return float(row["forwards"] + row["backwards"])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return f"|---|{'---:|' * (columns - 1)}"
