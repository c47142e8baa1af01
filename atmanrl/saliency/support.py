"""One check per model, before anything is computed: what saliency hands to a model must arrive there.

Packed rollouts rest on four things that a model may drop without a word: the key bias and the layout reach the
attention of every layer, each layer attends once, positions are read rather than counted, and rotary embeddings depend
on nothing but the position.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels.hf import AttentionCall, observing
from atmanrl.rollout import Rollout
from atmanrl.saliency.likelihood import ModelLikelihood, attention, eval_mode, frozen
from atmanrl.saliency.packing import pack, whole

# They choose their factors by the longest sequence of the call, so that a rollout would depend on its companions.
_BY_LENGTH = ("dynamic", "longrope")
# Of losses, nats: far above the rounding of a few tokens, far below what a dropped argument changes.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1
# Of keys relative to the largest: one embedding and one projection.
_EPS_OF_KEYS = 64

_ADVICE = (
    "use a model whose layers get position_ids and keyword arguments, as those of Llama, Mistral, Qwen and Gemma do"
)

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_model(model: PreTrainedModel, owner: nn.Module | None = None) -> None:
    """Raise unless packed, biased rollouts mean in this model what they mean one by one.

    Runs a few forwards over about ten tokens, once per model object. Nothing in it is collective, and it decides by
    the weights alone: ranks that hold the same whole model decide alike.

    Args:
        model: whole and plain (see :func:`working_copy`); given back as it was.
        owner: the object that the verdict is remembered for, where ``model`` is a copy made from it.

    Raises:
        ValueError: naming the model and what it ignores.
    """
    owner = model if owner is None else owner
    if owner in _checked:
        return
    with _naming(type(model).__name__):
        if _compare(model):
            _checked.update((owner, model))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """What a model's own code raises in the check, with the model's name in front and what to do behind it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "DefaultCPUAllocator" in text or text.endswith(_ADVICE):
            raise
        said = (text if name in text else f"{name}: {text}").removesuffix('; use "eager" or "sdpa" for it')
        lost = "" if "saliency would be wrong" in said else "; its saliency cannot be computed"
        raise ValueError(f"{said}{lost}; {_ADVICE}") from error


def _compare(model: PreTrainedModel) -> bool:
    """Whether the comparison could be made: not where the model's own losses are no numbers."""
    name = type(model).__name__
    _refuse_factors_by_length(model, name)
    rollouts = _rollouts(model.config.get_text_config(decoder=True).vocab_size)
    hidden = len(rollouts[0].prompt_ids) + 1
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        # Another implementation may not take these dtypes, as flash-attn does not take float32.
        with eval_mode(model), attention(model, "eager"):
            own = torch.stack([_own_loss(model, rollout) for rollout in rollouts])
            without_key = _own_loss(model, rollouts[0], hidden)
        if not bool(own.isfinite().all()):
            # Whoever computes with such weights names the rollout.
            return False
        with frozen(model), torch.no_grad():
            packed, biased, seen = _packed_losses(model, rollouts, name)
            _check_calls(model, seen, name)
            _check_positions(model, rollouts, seen, name)
    tolerance = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)
    if not torch.allclose(packed, own, rtol=tolerance, atol=tolerance):
        raise _ignoring(
            name, "that rollouts packed side by side are separate", f"loss {packed[0]:.4g}, alone {own[0]:.4g}"
        )
    expected = torch.stack([without_key, own[1]])
    if not torch.allclose(biased, expected, rtol=tolerance, atol=tolerance):
        raise _ignoring(
            name, "key_bias", f"loss without a key {biased[0]:.4g}, by its attention mask {without_key:.4g}"
        )
    return True


def _rollouts(vocabulary: int) -> list[Rollout]:
    ids = tuple(torch.randint(0, vocabulary, (23,), generator=torch.Generator().manual_seed(0)).tolist())
    return [
        Rollout(ids[:3], ids[3:8], ids[8:10], ids[10:11]),
        Rollout(ids[11:16], ids[16:20], ids[20:22], ids[22:]),
    ]


def _refuse_factors_by_length(model: PreTrainedModel, name: str) -> None:
    for module in model.modules():
        kinds = getattr(module, "rope_type", ())
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in _BY_LENGTH:
                raise ValueError(
                    f"{name} has rotary embeddings of type {kind!r}, whose factors follow the longest sequence"
                    " of the call: rollouts packed into one call would change each other; use a model with rotary"
                    " embeddings of a fixed type"
                )


def _own_loss(model: PreTrainedModel, rollout: Rollout, hidden: int | None = None) -> Tensor:
    """The answer's mean loss as the model alone computes it; ``hidden`` is a key to mask."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids], device=model.device)
    arguments: dict[str, Tensor] = {}
    if hidden is not None:
        mask = torch.ones_like(ids)
        mask[0, hidden] = 0
        arguments = {"attention_mask": mask, "position_ids": torch.arange(ids.shape[1], device=ids.device)[None]}
    logits = model(input_ids=ids, use_cache=False, **arguments).logits[0, -len(rollout.answer_ids) - 1 : -1]
    return nn.functional.cross_entropy(logits.double(), ids[0, -len(rollout.answer_ids) :])


class _Seen:
    """What each forward's layers were called with."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def __call__(self, call: AttentionCall) -> None:
        self.calls.append(call)

    def reads_distance(self, layer_idx: int) -> bool:
        return False


def _packed_losses(
    model: PreTrainedModel, rollouts: list[Rollout], name: str
) -> tuple[Tensor, Tensor, list[AttentionCall]]:
    """Mean losses without a bias, those with -inf on the first rollout's second CoT token, and the latter's calls."""
    batch = pack([whole(rollout) for rollout in rollouts], device=model.device)
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    bias = torch.zeros(len(batch.cot_columns), dtype=dtype, device=model.device)
    seen = _Seen()
    try:
        with observing(seen):
            likelihood = ModelLikelihood(model, batch)
            _check_calls(model, seen.calls, name, biased=False)
            packed = likelihood(batch.key_bias(bias))
            seen.calls.clear()
            bias[1] = -torch.inf
            biased = likelihood(batch.key_bias(bias))
    except ValueError as error:
        # The stand-in for a mask is read only where no layout arrived.
        if "(1, 1, 0, 0)" not in str(error):
            raise
        raise _ignoring(name, "key_bias", "its layers get none of the forward's keyword arguments") from error
    return batch.mean_per_rollout(packed.double()).cpu(), batch.mean_per_rollout(biased.double()).cpu(), seen.calls


def _check_calls(model: PreTrainedModel, calls: list[AttentionCall], name: str, *, biased: bool = True) -> None:
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    times = Counter(call.layer_idx for call in calls)
    twice = sorted(layer for layer, n in times.items() if n > 1)
    if twice:
        raise ValueError(
            f"{name} attends {times[twice[0]]} times in layer {twice[0]}, but the keys and values of one attention"
            " per layer are kept: its saliency would be wrong"
        )
    if len(times) < layers:
        raise ValueError(f"{layers - len(times)} of the {layers} layers of {name} mix positions without attention")
    deaf = [call.layer_idx for call in calls if biased and call.key_bias is None]
    if deaf:
        raise _ignoring(name, "key_bias", f"it reaches no attention in layers {deaf}")


def _check_positions(model: PreTrainedModel, rollouts: list[Rollout], calls: list[AttentionCall], name: str) -> None:
    """The first layer's keys of each packed rollout are those of the rollout alone."""
    start = 0
    packed = min(calls, key=lambda call: call.layer_idx).k[0]
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids], device=model.device)
        seen = _Seen()
        with observing(seen):
            model(input_ids=ids, use_cache=False)
        rows = len(rollout.completion_ids) - 1
        alone = min(seen.calls, key=lambda call: call.layer_idx).k[0, len(rollout.prompt_ids) : -1]
        error = (packed[start : start + rows] - alone).abs().max() / alone.abs().max()
        if not error <= _EPS_OF_KEYS * torch.finfo(model.dtype).eps:
            raise _ignoring(name, "position_ids", f"keys of the first layer differ by {float(error):.2g} of their size")
        start += rows


def _ignoring(name: str, what: str, found: str) -> ValueError:
    return ValueError(f"{name} ignores {what} ({found}): its saliency would be wrong; {_ADVICE}")
