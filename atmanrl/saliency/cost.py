"""Necessary cost of mask optimisation, from shapes: operations of a step, bytes at the peak; and the free memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.flops import attention_backward_flops, attention_forward_flops, visible_pairs
from atmanrl.saliency.packing import PackedRollouts

# 64 MiB in float32.
_LOGITS_AT_A_TIME = 2**24


class DecoderShape(NamedTuple):
    """Sizes of a gated-MLP decoder: layers L, hidden h, heads, MLP width m, vocabulary V; norms of q and k heads."""

    layers: int
    hidden: int
    heads_q: int
    heads_kv: int
    head_dim: int
    mlp: int
    vocabulary: int
    head_norms: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> DecoderShape:
        """The shape of a Llama-like model.

        Raises:
            ValueError: if its layers have no gated MLP.
        """
        config = model.config.get_text_config(decoder=True)
        names = _names_in_a_layer(model)
        if not cls.known(model):
            raise ValueError(f"{type(model).__name__} has no gated MLP, whose operations and bytes are counted here")
        heads_q = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads_q=heads_q,
            heads_kv=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads_q,
            mlp=config.intermediate_size,
            vocabulary=config.vocab_size,
            head_norms="self_attn.q_norm" in names,
        )

    @staticmethod
    def known(model: PreTrainedModel) -> bool:
        """Whether the model's layers have a gated MLP."""
        return "mlp.gate_proj" in _names_in_a_layer(model)

    @property
    def width_q(self) -> int:
        """Columns of q."""
        return self.heads_q * self.head_dim

    @property
    def width_kv(self) -> int:
        """Columns of k, and of v."""
        return self.heads_kv * self.head_dim


def _names_in_a_layer(model: PreTrainedModel) -> set[str]:
    return {name.rpartition("layers.0.")[2] for name, _ in model.named_modules() if "layers.0." in name}


def necessary_flops(shape: DecoderShape, batch: PackedRollouts, windows: list[int | None]) -> int:
    """Operations of one step, forward and backward, that no implementation of the paper's mask can leave out.

    With R rows of which N predict a loss token: the linear layers of R rows, without layer 0's q, k, v (constant) and
    layer L-1's parts after k and v outside the N rows; the vocabulary for N rows; the same again for input gradients;
    attention over visible pairs, 4 per pair and column of q forward, 10 (own keys) or 6 (prefix keys) backward, layer
    0 only 4. A multiplication with its addition counts as 2. What is done once per batch is not in it.

    Args:
        shape: of the decoder; batch: the packed rollouts; windows: of each layer's attention, None for full.
    """
    rows, loss_rows = batch.n_rows, len(batch.loss_rows)
    h, dq, dkv = shape.hidden, shape.width_q, shape.width_kv
    inputs_q, inputs_kv, after = 2 * h * dq, 4 * h * dkv, 2 * dq * h + 6 * h * shape.mlp
    linear = 2 * h * shape.vocabulary * loss_rows
    attention = 0
    for layer, window in enumerate(windows):
        first, last = layer == 0, layer == shape.layers - 1
        queries = loss_rows if last else rows
        linear += queries * after
        if not first:
            linear += queries * inputs_q + rows * inputs_kv
        own, prefix = visible_pairs((batch.loss_plan if last else batch.plan).sequences, causal=True, window=window)
        attention += attention_forward_flops(own + prefix, shape.heads_q, shape.head_dim)
        needs = dict.fromkeys(("need_dq", "need_dk", "need_dv"), not first)
        attention += attention_backward_flops(own, prefix, shape.heads_q, shape.head_dim, **needs)
    return 2 * linear + attention


def loss_rows_at_a_time(vocabulary: int) -> int:
    """Rows whose logits the cross entropy holds at once, at least one."""
    return max(1, _LOGITS_AT_A_TIME // vocabulary)


def peak_bytes(
    shape: DecoderShape,
    item: int,
    rows: int,
    loss_rows: int,
    prompt_rows: int,
    *,
    on_cpu: bool,
) -> int:
    """Memory that the fast path needs at its peak on top of the weights.

    Args:
        shape: of the decoder; item: bytes of a weight.
        rows, loss_rows, prompt_rows: packed rows, those that predict a loss token, and rows of distinct prompts.
        on_cpu: row-wise parts run in blocks, and their products take no room.
    """
    h, m, dq, dkv = shape.hidden, shape.mlp, shape.width_q, shape.width_kv
    # With norms of their own, q and k are also kept before them.
    queries = 2 * h + 2 * m + (3 if shape.head_norms else 2) * dq
    keys = (3 if shape.head_norms else 2) * dkv
    # Per query row a second rstd and the logsumexp, per row the first rstd, in float32.
    layer = rows * (item * (queries + keys) + 4 * (2 + shape.heads_q))
    last = loss_rows * (item * queries + 4 * (1 + shape.heads_q)) + rows * (item * keys + 4)
    outside = item * (rows * (2 * h + 2 * shape.head_dim) + 2 * shape.layers * prompt_rows * dkv)
    attention_backward = item * rows * (2 * dq + 2 * dkv)
    mlp_backward = 0 if on_cpu else item * rows * (4 * m + 2 * h)
    # A block of logits and its softmax in float32.
    loss = (item + 4) * shape.vocabulary * min(loss_rows, loss_rows_at_a_time(shape.vocabulary))
    return (shape.layers - 1) * layer + last + outside + max(attention_backward, mlp_backward, loss)


def saved_bytes(model: PreTrainedModel, forward: Callable[[], object]) -> int:
    """Bytes of what autograd saves in ``forward()``: storages count once, the weights of ``model`` never."""
    saved: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        # Held until the hooks have run, so that no address is given out twice.
        alive = forward()
    del alive
    return sum(size for pointer, size in saved.items() if pointer not in weights)


def free_bytes(device: torch.device) -> int | None:
    """What a computation on the device may still take; None where that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the allocator holds without using it is free for us as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    return min((free for free in (free_in_machine(), free_in_cgroup()) if free is not None), default=None)


def free_in_machine(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def free_in_cgroup(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container (cgroup v2) may still take; None without a limit. Cached files count as free."""
    limit, used, statistics = (root / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.exists() or (most := limit.read_text().strip()) == "max":
        return None
    cached = next(
        int(line.split()[1]) for line in statistics.read_text().splitlines() if line.startswith("inactive_file ")
    )
    return max(0, int(most) - int(used.read_text()) + cached)
