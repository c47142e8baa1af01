"""Looking on while a model attends: each layer's queries, keys and lse, and from them statistics of its attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from torch import Tensor

from atman_kernels.plan import AttentionPlan, SharedPrefix
from atman_kernels.statistics import AttentionStatistics, mean_of_chosen_rows, statistics_of_rows


class AttentionCall(NamedTuple):
    """One attention of one layer as it was computed; a packed batch has B = 1.

    Attributes:
        layer_idx: position of the layer in the model.
        q, k: (B, Tq, Hq, D) and (B, Tk, Hkv, D), after the rotary embedding.
        lse: (B, Hq, Tq).
        plan: where the sequences lie.
        key_bias: (B, Tk), with -inf on padding, or None.
        prefix: shared keys or None.
        sm_scale: factor of the scores, None for the default.
        window: the layer's sliding window or None.
        row_distance: (B, Hq, Tq), how far back each row looks in the mean, where the attention found it on its way.
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
    row_distance: Tensor | None = None

    def statistics(
        self, *, window: int, horizon: tuple[int, int], rows: Tensor | None = None, need_distance: bool = True
    ) -> AttentionStatistics:
        """Statistics of this attention with a batch axis; arguments as in :func:`attention_statistics`."""
        found = statistics_of_rows(
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
            need_distance=need_distance and self.row_distance is None,
        )
        if need_distance and self.row_distance is not None:
            found = found._replace(distance=mean_of_chosen_rows(self.row_distance, self.plan, rows))
        return found


class Observer(Protocol):
    """Looks on at every attention of a model."""

    def __call__(self, call: AttentionCall) -> None: ...

    def reads_distance(self, layer_idx: int) -> bool:
        """Whether it will ask for the distance in this layer, which is cheaper to find on the attention's way."""
        ...


_observers: list[Observer] = []


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Inside the block, ``observer`` is called with every attention that attn_implementation="atman" computes.

    Single rows without a bias, which a decoding model hands to SDPA, are not shown. Process-wide; blocks nest.

    Args:
        observer: an :class:`Observer`: called with an :class:`AttentionCall` per layer and forward, and asked
            beforehand whether it will read the distance there.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def distance_is_read(layer_idx: int) -> bool:
    """Whether an observer will ask for the distance in this layer."""
    return any(observer.reads_distance(layer_idx) for observer in _observers)


def show(call: AttentionCall) -> None:
    """Hand a call to the observers, if there are any."""
    for observer in _observers:
        observer(call)
