"""Looking on while a model attends: each layer's queries, keys and lse, and from them statistics of its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from atman_kernels.plan import AttentionPlan, SharedPrefix
from atman_kernels.statistics import AttentionStatistics, statistics_of_rows


class AttentionCall(NamedTuple):
    """One attention of one layer as it was computed; a packed batch has B = 1.

    Attributes:
        layer_idx: position of the layer in the model.
        q, k: (B, Tq, Hq, D) and (B, Tk, Hkv, D), after the rotary embedding.
        lse: (B, Hq, Tq).
        plan: where the sequences lie; key_bias: (B, Tk), with -inf on padding, or None; prefix: shared keys or None.
        sm_scale: factor of the scores, None for the default; window: the layer's sliding window or None.
    """

    layer_idx: int
    q: Tensor
    k: Tensor
    lse: Tensor
    plan: AttentionPlan
    key_bias: Tensor | None
    prefix: SharedPrefix | None
    sm_scale: float | None
    window: int | None

    def statistics(
        self, *, window: int, horizon: tuple[int, int], rows: Tensor | None = None, need_distance: bool = True
    ) -> AttentionStatistics:
        """Statistics of this attention with a batch axis; arguments as in :func:`attention_statistics`."""
        return statistics_of_rows(
            self.q,
            self.k,
            self.lse,
            plan=self.plan,
            key_bias=self.key_bias,
            prefix=self.prefix,
            window=window,
            horizon=horizon,
            rows=rows,
            sm_scale=self.sm_scale,
            attention_window=self.window,
            need_distance=need_distance,
        )


Observer = Callable[[AttentionCall], None]
_observers: list[Observer] = []


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Inside the block, ``observer`` is called with every attention that attn_implementation="atman" computes.

    Single rows without a bias, which a decoding model hands to SDPA, are not shown. Process-wide; blocks nest.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def show(call: AttentionCall) -> None:
    """Hand a call to the observers, if there are any."""
    for observer in _observers:
        observer(call)
