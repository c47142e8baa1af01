"""Likelihood of the answers of a packed batch as a function of the key bias: the one thing an estimator needs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels.hf import AttentionRecorder, KeyValueRecord
from atmanrl.saliency.packing import PackedRollouts


class AnswerLikelihood(Protocol):
    """Maps the bias of every packed column, (R_total,), to the (L_total,) negative log-likelihoods of the loss tokens.

    Differentiable in the bias, once. Implementations run the prompts when they are made and never again.
    """

    def __call__(self, key_bias: Tensor) -> Tensor: ...


class ModelLikelihood:
    """Any causal LM on attn_implementation="atman", differentiated by autograd through its own modules.

    Args:
        model: inside :func:`atmanrl.saliency.frozen.frozen`.
        batch: packed rollouts on the model's device.
        prefix: the keys and values of the batch's prompts, where a batch with the same prompts has run them already.
    """

    def __init__(self, model: PreTrainedModel, batch: PackedRollouts, prefix: KeyValueRecord | None = None) -> None:
        self._model = model
        self._batch = batch
        self._prefix = prompt_keys_and_values(model, batch) if prefix is None else prefix

    def __call__(self, key_bias: Tensor) -> Tensor:
        logits = self.logits(key_bias)
        return nn.functional.cross_entropy(logits.to(key_bias.dtype), self._batch.loss_targets, reduction="none")

    def logits(self, key_bias: Tensor, capture: AttentionRecorder | None = None) -> Tensor:
        """(L_total, V) logits of the rows that predict the loss tokens, in the model's dtype.

        ``capture`` receives every layer's q, k, v and lse.
        """
        batch = self._batch
        logits: Tensor = self._model(
            input_ids=batch.ids[None],
            position_ids=batch.positions[None],
            attention_mask=_no_mask(batch),
            use_cache=False,
            logits_to_keep=batch.loss_rows,
            key_bias=key_bias[None],
            attention_plan=batch.plan,
            shared_prefix=self._prefix,
            capture=capture,
        ).logits[0]
        return logits


@torch.no_grad()
def prompt_keys_and_values(model: PreTrainedModel, batch: PackedRollouts) -> KeyValueRecord:
    """Run every distinct prompt once and keep each layer's keys (after the rotary embedding) and values.

    Raises:
        ValueError: for a model in which something else than attention mixes positions (a recurrent state, a
            convolution): the rows of rollouts packed side by side would mix.
    """
    if model._is_stateful:
        raise ValueError(f"{type(model).__name__} has a recurrent state, which no mask column reaches")
    record = KeyValueRecord()
    model(
        input_ids=batch.prompt_ids[None],
        position_ids=batch.prompt_positions[None],
        attention_mask=_no_mask(batch),
        use_cache=False,
        logits_to_keep=1,
        attention_plan=batch.prompt_plan,
        capture=record,
    )
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(record) < layers:
        raise ValueError(
            f"{layers - len(record)} of the {layers} layers of {type(model).__name__} mix positions without attention"
        )
    return record


def _no_mask(batch: PackedRollouts) -> Tensor:
    # The plan says what each row sees. A 4-D mask, unused, keeps transformers from reading that off the positions,
    # which would synchronise with the device in every forward.
    return torch.empty(1, 1, 0, 0, device=batch.ids.device)
