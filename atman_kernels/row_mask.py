"""What a model asks of attention, read from transformers' masks: where rows begin, what is padding, which window.

The kernels never see a mask of size s x s. :class:`RowMask` says the same per batch row; it is made from the arguments
of transformers' mask functions, or from a finished 4D mask if that is exactly causal attention with padding. Everything
else is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atman_kernels.plan import AttentionPlan, dense_plan


@dataclass(frozen=True)
class RowMask:
    """What stands in the place of a mask: where the keys of each batch row lie, for all layers of one kind.

    Attributes:
        q_length: query rows of this forward.
        k_offset: position in the text of the first key that the layers hold (above 0 for a sliding-window cache).
        seen: keys written so far, counted from ``k_offset``; a 0-d tensor where a static cache counts on the device.
        valid: (B, Tk) bool, False on padding; None: no padding.
        window: rows see this many nearest keys; None: all.
        plan: the layout; None for a single row, which needs it only if there is a bias.
        one_row: SDPA's (B, 1, 1, Tk) mask if there is a single row; None: no mask needed.
        refused: what the model's mask function asks for that the kernels do not compute, or None.
        arguments: names of the attention function's own arguments that the model's forward was given.
    """

    q_length: int
    k_offset: int
    seen: int | Tensor
    valid: Tensor | None = None
    window: int | None = None
    plan: AttentionPlan | None = None
    one_row: Tensor | None = None
    refused: str | None = None
    arguments: tuple[str, ...] = ()

    # generate() prepares the mask of a static cache; the model asks it for its rank before it hands it back.
    ndim = 4

    def contiguous(self) -> RowMask:
        """Itself: ``generate()`` of transformers 5.23 asks this of every mask it is given ready made."""
        return self

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> RowMask:
        """The same on another device, as accelerate asks for before a layer that lies there."""
        parts = {name: getattr(self, name) for name in ("seen", "valid", "plan", "one_row")}
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in parts.items() if hasattr(x, "to")}
        return replace(self, **moved)


def row_mask_of(mask: RowMask | Tensor | None, q: Tensor, k: Tensor, window: int | None) -> RowMask:
    """The layout behind whatever mask arrives: a layer may stand in a model that made its mask for sdpa or eager."""
    batch, q_length, n_keys = q.shape[0], q.shape[1], k.shape[1]
    if isinstance(mask, RowMask):
        if mask.refused is not None:
            raise unsupported(mask.refused)
        return mask
    if mask is None:
        # As in sdpa: without a mask, several rows start together with the keys, and a single row sees all of them.
        seen = n_keys if q_length == 1 else q_length
        return RowMask(q_length, 0, seen, window=window)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise unsupported(
            f"an attention mask of type {type(mask).__name__} and shape {tuple(mask.shape)} inside the layers"
        )
    if mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[2:] != (q_length, n_keys):
        raise unsupported(
            f"a 4D attention mask of shape {tuple(mask.shape)} where {(batch, 1, q_length, n_keys)} is one mask per row"
        )
    return _row_mask_of_matrix(mask[:, 0].expand(batch, -1, -1), window)


def _row_mask_of_matrix(mask: Tensor, window: int | None) -> RowMask:
    """The layout of a (B, Tq, Tk) mask that is exactly causal with padding; anything else is refused."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise unsupported(f"a 4D attention mask of dtype {mask.dtype} (neither bool nor float)")
    visible = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((visible | (mask <= torch.finfo(mask.dtype).min)).all()):
        raise unsupported("a 4D attention mask with values other than 0 and -inf (pass a bias per key as key_bias)")
    q_length, n_keys = mask.shape[1:]
    row = torch.arange(q_length, device=mask.device)[:, None]
    key = torch.arange(n_keys, device=mask.device)
    # The newest key that any row sees shows how far the rows stand behind the keys.
    position = row + (torch.where(visible, key, -1) - row).amax().clamp(max=n_keys - q_length)
    valid = visible.any(dim=1)
    causal = (key <= position) & valid[:, None]
    for reach in (None, window):
        if torch.equal(visible, causal if reach is None else causal & (position - key < reach)):
            return RowMask(q_length, 0, position[-1, 0] + 1, valid, reach)
    raise unsupported("a 4D attention mask that is not causal attention with padding")


def lay_out(
    batch: int, q_length: int, kv_length: int, seen: int | Tensor, valid: Tensor | None, device: torch.device
) -> AttentionPlan:
    """Each batch row as one sequence: from its first valid key (B, Tk) to the newest one seen, the rows at its end."""
    if valid is None and isinstance(seen, int) and seen == kv_length:
        return dense_plan(batch, q_length, kv_length, device)
    end = torch.zeros(batch, dtype=torch.int64, device=device) + seen
    start = torch.zeros_like(end)
    if valid is not None:
        index = torch.arange(kv_length, device=device)
        start = torch.minimum(torch.where(valid, index, kv_length).amin(dim=1), end)
    q_start = (start - (end - q_length)).clamp(min=0)
    return AttentionPlan.from_rows(
        q_start, q_length - q_start, start, end - start, max_q=q_length, max_k=kv_length, covers=False
    )


def unsupported(what: str) -> ValueError:
    """The one error for all that the kernels do not compute."""
    return ValueError(f'attn_implementation="atman" does not support {what}; use "eager" or "sdpa" for it')


class _Visible:
    """The function of a mask, if it is a causal triangle, a window, or both."""

    device = None

    def __init__(self, causal: bool = False, window: int | None = None) -> None:
        self.causal = causal
        self.window = window

    def __and__(self, other: _Visible) -> _Visible:
        windows = [w for w in (self.window, other.window) if w is not None]
        return _Visible(self.causal or other.causal, min(windows) if windows else None)

    def to(self, device: object) -> _Visible:
        return self


class _Row:
    """A query's position, less a constant."""

    def __init__(self, back: int = 0) -> None:
        self.back = back

    def __sub__(self, distance: object) -> _Row:
        return _Row(self.back + distance) if isinstance(distance, int) else NotImplemented

    def new_ones(self, *args: object, **kwargs: object) -> _Visible:
        return _Visible()


class _Key:
    """A key's position."""

    def __le__(self, row: object) -> _Visible:
        return _Visible(causal=True) if isinstance(row, _Row) and row.back == 0 else NotImplemented

    def __gt__(self, row: object) -> _Visible:
        return _Visible(window=row.back) if isinstance(row, _Row) and row.back > 0 else NotImplemented


def read_mask_function(mask_function: Callable[..., Any]) -> tuple[int | None, str | None]:
    """(window, None) for a causal mask function, (None, what it is) for one that the kernels do not compute.

    transformers composes mask functions from closures; running one on symbols instead of positions shows what it
    computes without looking into them, and torch.compile can trace it.
    """
    try:
        visible = mask_function(0, 0, _Row(), _Key())
    except Exception:
        visible = None
    if isinstance(visible, _Visible) and visible.causal:
        return visible.window, None
    return None, _describe(mask_function)


_MASK_NAMES = {
    "packed_sequence_mask_function": "packed sequences told apart by position_ids that restart (pass attention_plan)",
    "chunked_overlay": "chunked attention",
    "blockwise_overlay": "blocks of bidirectional attention",
    "bidirectional_mask_function": "bidirectional attention",
    "sliding_window_bidirectional_overlay": "bidirectional sliding-window attention",
}


def _describe(mask_function: Callable[..., Any]) -> str:
    """What to call a mask function that was not understood: the parts of it that are neither causal nor a window."""
    unknown = []
    for part in _parts(mask_function):
        name = getattr(part, "__qualname__", type(part).__qualname__)
        factory = name.removesuffix(".<locals>.inner_mask")
        if factory not in ("causal_mask_function", "sliding_window_overlay"):
            unknown.append(_MASK_NAMES.get(factory, f"the mask function {name}"))
    return ", ".join(unknown) or "a combination of causal and window masks other than their intersection"


def _parts(mask_function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    inner = inspect.getclosurevars(mask_function).nonlocals if inspect.isfunction(mask_function) else {}
    for part in inner.get("mask_functions", ()):
        yield from _parts(part)
    if "mask_functions" not in inner:
        yield mask_function
