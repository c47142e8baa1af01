"""What all figures have in common, as matplotlib's parameters; importing this module loads no matplotlib."""

from __future__ import annotations

from typing import Any

GRID_COLOUR = "#e4e6e9"
# matplotlib types its parameters by their names, of which a mapping of strings is none.
FIGURE_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GRID_COLOUR,
    "grid.color": GRID_COLOUR,
}
TITLE_STYLE: Any = {
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
