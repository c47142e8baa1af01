"""Other implementations of mask optimisation, for comparison: same problem, same frozen weights.

Every arm maps the bias of all CoT tokens, (C_total,), to the rollouts' losses (n,) and the gradient of their sum. The
peers cover models with full causal attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from atmanrl.rollout import Rollout
from atmanrl.saliency.likelihood import AnswerLikelihood
from atmanrl.saliency.mask import WARM_UP, Replayed
from atmanrl.saliency.packing import PackedRollouts, pack, whole

LossesAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]
PeerArm = Callable[[PreTrainedModel, Sequence[Rollout]], LossesAndGradient]


def packed_engine(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    make: Callable[[PreTrainedModel, PackedRollouts], AnswerLikelihood],
) -> LossesAndGradient:
    """This package's step, on the fast or the general path."""
    batch = pack([whole(rollout) for rollout in rollouts], device=model.device)
    likelihood = make(model, batch)

    def arm(cot_bias: Tensor) -> tuple[Tensor, Tensor]:
        leaf = cot_bias.detach().requires_grad_()
        losses = batch.mean_per_rollout(likelihood(batch.key_bias(leaf)))
        return losses.detach(), torch.autograd.grad(losses.sum(), [leaf])[0]

    return arm


def captured(arm: PeerArm) -> PeerArm:
    """Another arm, on a GPU, with its step replayed from a CUDA graph."""

    def replayed(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> LossesAndGradient:
        eager = arm(model, rollouts)
        bias = torch.empty(sum(len(rollout.cot_ids) for rollout in rollouts), device=model.device)
        step = Replayed(lambda: torch.cat(eager(bias)))
        bias.zero_()
        for _ in range(WARM_UP + 1):
            step()

        def run(cot_bias: Tensor) -> tuple[Tensor, Tensor]:
            bias.copy_(cot_bias)
            losses, gradient = step().split([len(rollouts), len(bias)])
            return losses.clone(), gradient.clone()

        return run

    return replayed


def paper_style_loop(
    model: PreTrainedModel, rollouts: Sequence[Rollout], *, answer_logits_only: bool = False
) -> LossesAndGradient:
    """One rollout at a time through eager attention with a dense s x s mask, prompt rows and all, in every step.

    Args:
        answer_logits_only: leave the vocabulary out for the other rows, which a first implementation would not.
    """
    model.set_attn_implementation("eager")
    device = model.device

    def arm(cot_bias: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradients = [], []
        for rollout, bias in zip(rollouts, cot_bias.split([len(r.cot_ids) for r in rollouts]), strict=True):
            ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids], device=device)
            length, prompt, answer = len(rollout), len(rollout.prompt_ids), len(rollout.answer_ids)
            leaf = bias.detach().requires_grad_()
            columns = nn.functional.pad(leaf, (prompt, length - prompt - len(leaf)))
            hidden = torch.full((length, length), -torch.inf, device=device).triu(1)
            logits = model(
                input_ids=ids,
                attention_mask=(hidden + columns)[None, None].to(model.dtype),
                use_cache=False,
                logits_to_keep=answer + 1 if answer_logits_only else 0,
            ).logits
            loss = nn.functional.cross_entropy(logits[0, -answer - 1 : -1].float(), ids[0, -answer:])
            gradients.append(torch.autograd.grad(loss, [leaf])[0])
            losses.append(loss.detach())
        return torch.stack(losses), torch.cat(gradients)

    return arm


def in_groups(arm: PeerArm, size: int) -> PeerArm:
    """``arm`` on ``size`` rollouts at a time."""

    def make(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> LossesAndGradient:
        groups = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        steps = [arm(model, group) for group in groups]
        n_tokens = [sum(len(rollout.cot_ids) for rollout in group) for group in groups]

        def step(cot_bias: Tensor) -> tuple[Tensor, Tensor]:
            found = [run(part) for run, part in zip(steps, cot_bias.split(n_tokens), strict=True)]
            return torch.cat([losses for losses, _ in found]), torch.cat([gradient for _, gradient in found])

        return step

    return make


def batched_sdpa(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> LossesAndGradient:
    """All rollouts left-padded into one batch on SDPA, the trainable bias inside a (B, 1, s, s) mask."""
    model.set_attn_implementation("sdpa")
    padded = _LeftPadded(rollouts, model.device)
    length = padded.ids.shape[1]
    row, key = torch.arange(length, device=model.device)[:, None], torch.arange(length, device=model.device)
    seen = (key <= row) & (key >= padded.start[:, None, None])
    # A row of padding sees itself, so that no row is without a key.
    hidden = torch.zeros(seen.shape, device=model.device).masked_fill(~(seen | (key == row)), -torch.inf)[:, None]

    def mask_of(columns: Tensor) -> dict[str, Any]:
        return {"attention_mask": (hidden + columns[:, None, None, :]).to(model.dtype)}

    return padded.arm(model, mask_of)


def batched_flex(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> LossesAndGradient:
    """All rollouts left-padded into one batch on compiled FlexAttention, the bias a buffer its score_mod captures.

    For GPUs: elsewhere FlexAttention has no backward.
    """
    function = torch.compile(flex_attention)

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        *,
        columns: Tensor,
        blocks: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        def add_bias(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return score + columns[b, column]

        o: Any = function(query, key, value, add_bias, blocks, scaling, enable_gqa=query.shape[1] != key.shape[1])
        return o.transpose(1, 2), None

    AttentionInterface.register("flex_key_bias", attend)
    model.set_attn_implementation("flex_key_bias")
    padded = _LeftPadded(rollouts, model.device)
    n, length = padded.ids.shape

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & ((column >= padded.start[b]) | (column == row))

    blocks = create_block_mask(visible, n, None, length, length, device=str(model.device))
    return padded.arm(model, lambda columns: {"columns": columns, "blocks": blocks})


class _LeftPadded:
    """Rollouts as a padded batch that ends flush, so that the answers lie in its last columns."""

    def __init__(self, rollouts: Sequence[Rollout], device: torch.device) -> None:
        length = max(len(rollout) for rollout in rollouts)
        self.start = torch.tensor([length - len(rollout) for rollout in rollouts], device=device)
        rows = [[0] * (length - len(r)) + [*r.prompt_ids, *r.completion_ids] for r in rollouts]
        self.ids = torch.tensor(rows, device=device)
        self.positions = (torch.arange(length, device=device) - self.start[:, None]).clamp(min=0)
        self._answers = torch.tensor([len(rollout.answer_ids) for rollout in rollouts], device=device)
        first = [length - len(r) + len(r.prompt_ids) for r in rollouts]
        self._cot = torch.tensor(
            [i * length + j for i, r in enumerate(rollouts) for j in range(first[i], first[i] + len(r.cot_ids))],
            device=device,
        )

    def arm(self, model: PreTrainedModel, mask_of: Callable[[Tensor], dict[str, Any]]) -> LossesAndGradient:
        longest = int(self._answers.max())
        targets = self.ids[:, -longest:]
        counted = torch.arange(longest, device=targets.device) >= longest - self._answers[:, None]

        def arm(cot_bias: Tensor) -> tuple[Tensor, Tensor]:
            leaf = cot_bias.detach().requires_grad_()
            columns = leaf.new_zeros(self.ids.numel()).index_copy(0, self._cot, leaf).view(self.ids.shape)
            logits = model(
                input_ids=self.ids,
                position_ids=self.positions,
                use_cache=False,
                logits_to_keep=longest + 1,
                **mask_of(columns),
            ).logits[:, :-1]
            nll = nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
            losses = (nll * counted).sum(1) / self._answers
            return losses.detach(), torch.autograd.grad(losses.sum(), [leaf])[0]

        return arm
