"""WAAD and FAI over a rollout's tokens, as in Figure 2 of arXiv 2510.13554."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from atmanrl.report.plots import FIGURE_STYLE

# Token texts may hold dollars, which must not start a formula.
_STYLE: Any = {**FIGURE_STYLE, "font.size": 8, "text.parse_math": False}
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
