"""WAAD and FAI over a rollout's tokens, as in Figure 2 of arXiv 2510.13554."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e6e9",
    "axes.edgecolor": "#e4e6e9",
    # Token texts may hold dollars, which must not start a formula.
    "text.parse_math": False,
}
_MOST_LABELS = 120


def plot_series(
    path: Path,
    tokens: Sequence[str],
    waad: Sequence[float],
    fai: Sequence[float],
    *,
    local: Sequence[bool],
    anchors: Sequence[bool],
    dominated: Sequence[bool],
) -> None:
    """Two panels over the tokens: WAAD with the tokens chosen by its change, FAI with its anchors.

    Args:
        path: the picture; its ending decides the format.
        tokens: texts; written below the axis up to 120 of them.
        waad, fai: one value per token.
        local: the highest changes of WAAD; anchors: the highest FAI; dominated: anchors that read locally.
    """
    n = len(tokens)
    places = range(n)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(6.0, min(0.16 * n, 30.0)), 4.2), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.plot(places, waad, color="#0072b2", linewidth=1.2)
        chosen = [i for i in places if local[i]]
        upper.plot(chosen, [waad[i] for i in chosen], "o", color="#0072b2", markersize=3.5, label="changes most next")
        upper.set_ylabel("WAAD (tokens)")
        upper.legend(loc="upper right", frameon=False)
        lower.plot(places, fai, color="#d55e00", linewidth=1.2)
        for label, marker, of_kind in (("anchor", "o", False), ("anchor, locally dominated", "s", True)):
            chosen = [i for i in places if anchors[i] and dominated[i] == of_kind]
            lower.plot(chosen, [fai[i] for i in chosen], marker, color="#d55e00", markersize=4, label=label)
        lower.set_ylabel("FAI")
        lower.legend(loc="upper right", frameon=False)
        if n <= _MOST_LABELS:
            texts = [token.strip() or repr(token) for token in tokens]
            lower.set_xticks(list(places), texts, rotation=90, fontsize=6.5)
        else:
            lower.set_xlabel("response token")
        figure.savefig(path, dpi=160, facecolor="white")
