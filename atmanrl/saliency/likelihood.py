"""The likelihood of a packed batch's answers as a function of the key bias, on a model that is borrowed frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Importing it registers attn_implementation="atman".
from atman_kernels.hf import KeyValueRecord
from atmanrl.saliency.packing import PackedRollouts


class AnswerLikelihood(Protocol):
    """Maps the bias of every packed column, (R_total,), to the (L_total,) negative log-likelihoods of the loss tokens.

    Differentiable in the bias, once. Implementations run the prompts when they are made and never again.
    """

    def __call__(self, key_bias: Tensor) -> Tensor: ...


class ModelLikelihood:
    """Any causal LM on attn_implementation="atman", differentiated by autograd through its own modules.

    Args:
        model: inside :func:`frozen`.
        batch: packed rollouts on the model's device.
        prompts: an earlier batch's likelihood; where its prompts are the same, their keys and values are taken.
    """

    def __init__(self, model: PreTrainedModel, batch: PackedRollouts, prompts: ModelLikelihood | None = None) -> None:
        self._model = model
        self._batch = batch
        self._prefix: KeyValueRecord | None
        if prompts is not None and prompts.prompts == batch.prompts:
            self._prefix = prompts._prefix
        else:
            self._prefix = prompt_keys_and_values(model, batch)

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """Whose keys and values are held."""
        return self._batch.prompts

    def __call__(self, key_bias: Tensor) -> Tensor:
        logits = self.logits(key_bias)
        return nn.functional.cross_entropy(logits.to(key_bias.dtype), self._batch.loss_targets, reduction="none")

    def logits(self, key_bias: Tensor | None = None) -> Tensor:
        """(L_total, V) logits of the rows that predict the loss tokens, in the model's dtype."""
        batch = self._batch
        logits: Tensor = self._model(
            input_ids=batch.ids[None],
            position_ids=batch.positions[None],
            attention_mask=_no_mask(batch),
            use_cache=False,
            logits_to_keep=batch.loss_rows,
            key_bias=None if key_bias is None else key_bias[None],
            attention_plan=batch.plan,
            shared_prefix=self._prefix,
        ).logits[0]
        return logits


@torch.no_grad()
def prompt_keys_and_values(model: PreTrainedModel, batch: PackedRollouts) -> KeyValueRecord | None:
    """Run every distinct prompt once and keep each layer's keys (after the rotary embedding) and values.

    None where no segment has anything before it.

    Raises:
        ValueError: for a model in which something else than attention mixes positions (a recurrent state, a
            convolution): the rows of rollouts packed side by side would mix.
    """
    if model._is_stateful:
        raise ValueError(f"{type(model).__name__} has a recurrent state, which no mask column reaches")
    if not len(batch.prompt_ids):
        return None
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


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model is in eval mode, its parameters need no gradient, and it attends through "atman".

    Gradients with respect to inputs can be taken inside, whatever the caller's grad mode (no_grad, inference_mode), and
    autocast is off: products are in the weights' dtype.
    Everything is restored afterwards, also after an error: the attention implementation (of sub-configurations too),
    the mode of each module, each parameter's ``requires_grad``; ``.grad`` is never touched. Eval mode also switches
    dropout and gradient checkpointing off.

    Raises:
        ValueError: if the model does not dispatch its attention through transformers' AttentionInterface.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(model.device.type, enabled=False))
        stack.enter_context(eval_mode(model))
        stack.enter_context(_no_parameter_gradients(model))
        stack.enter_context(attention(model, "atman"))
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside the block; each one's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            # Not module.train(): that would also switch children that were in eval mode.
            module.training = True


@contextmanager
def _no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model attends through the implementation of that name inside the block, and through its own afterwards.

    Raises:
        ValueError: where the model does not take it.
    """
    config = model.config
    before = {"": config._attn_implementation}
    for part in config.sub_configs:
        sub_config = getattr(config, part, None)
        if sub_config is not None:
            before[part] = sub_config._attn_implementation
    model.set_attn_implementation(name)
    try:
        if config._attn_implementation != name:
            raise ValueError(
                f"{type(model).__name__} does not support attn_implementation={name!r}: its attention does not go"
                " through transformers' AttentionInterface"
            )
        yield
    finally:
        model.set_attn_implementation(before)
