"""Models and their tokenizers: loading them, the token ids of prompts and completions, and plain copies of weights.

A plain copy is what masks are optimised on: whole weights of one dtype, adapters merged, nothing sharded. Masks take
hundreds of passes over frozen weights. Sharded weights would be gathered anew in each of them, all processes waiting
for one another; adapters and autocast keep the fast path out. Gathering once per generation batch costs one copy of
the weights in memory and leaves every process on its own.
"""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import set_zero3_state
from transformers.utils.import_utils import is_flash_attn_2_available

from atmanrl.errors import InputError

if TYPE_CHECKING:
    from atmanrl.config import ModelConfig

# A tokenizer names one of them as its EOS; a model may have learned to stop with another (Llama 3: <|eot_id|>, while
# the base tokenizer says <|end_of_text|>).
END_OF_TURN = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
    "<|end|>",
)

# What PEFT, torch.compile and activation checkpointing put into the names of the parameters they wrap.
_WRAPPERS = re.compile(r"^base_model\.model\.|(?<=\.)base_layer\.|_orig_mod\.|_checkpoint_wrapped_module\.")


def source_of(config: ModelConfig) -> str:
    """What ``from_pretrained`` takes: the configured name, or the directory of the built-in task's checkpoint."""
    # Not at the top: tasks read answers, and what reads answers knows the tokenizer's ends from here.
    from atmanrl.tasks.ledger import CHECKPOINT

    return str(CHECKPOINT) if config.name == "ledger" else os.path.expanduser(config.name)


def attention_of(config: ModelConfig, *, half: bool) -> str:
    """The attention implementation that "auto" stands for: flash-attn computes in half precision alone."""
    if config.attn_implementation != "auto":
        return config.attn_implementation
    return "flash_attention_2" if half and is_flash_attn_2_available() else "sdpa"


def load_policy(
    config: ModelConfig, *, autocast: bool = False, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy and its tokenizer; every end-of-turn token of the tokenizer ends a completion.

    Args:
        config: which model, in which dtype; ``config.lora`` is not its concern.
        autocast: whether every pass will run in half precision whatever the dtype of the weights.
        device: where the weights go; None: to the GPU where there is one. A model that ZeRO-3 shards while it is loaded
            is left on the processes' devices.

    Raises:
        InputError: as `load_model`, and where there is no tokenizer.
    """
    model = load_model(config, autocast=autocast, device=device)
    with _loading(config):
        tokenizer = AutoTokenizer.from_pretrained(source_of(config), revision=config.revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends: Any = model.generation_config.eos_token_id
    # TRL counts padding as the end of a completion by itself, and generate() warns where padding is one of the ends.
    ends = end_of_turn_ids(tokenizer, ends) - {tokenizer.pad_token_id} | {tokenizer.eos_token_id}
    model.generation_config.eos_token_id = sorted(ends)
    return model, tokenizer


def check_loads(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that `load_policy` can load, as far as its configuration tells; no weights are read.

    Raises:
        InputError: as `load_policy`.
    """
    source = source_of(config)
    with _loading(config):
        AutoConfig.from_pretrained(source, revision=config.revision)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, revision=config.revision)
        if Path(source).is_dir() and not any(Path(source).glob("*.safetensors")):
            raise OSError("the directory has no weights in safetensors")
    return tokenizer


def load_model(config: ModelConfig, *, autocast: bool = False, device: torch.device | str | None = None) -> Any:
    """The model alone, from safetensors; arguments as of `load_policy`.

    Raises:
        InputError: where ``config.name`` is neither a directory with a model nor a model of the hub, or has no
            safetensors.
    """
    dtype = getattr(torch, config.dtype)
    with _loading(config):
        model: Any = AutoModelForCausalLM.from_pretrained(
            source_of(config),
            revision=config.revision,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attention_of(config, half=autocast or dtype in (torch.bfloat16, torch.float16)),
        )
    # Under ZeRO-3 transformers has put each process's part on its device, and DeepSpeed moves nothing any more.
    return model.to(_default_device() if device is None else device) if is_whole(model) else model


@contextmanager
def _loading(config: ModelConfig) -> Iterator[None]:
    """The message of transformers for a name that it cannot load; for a path, the missing files."""
    path = Path(source_of(config))
    refused = f"model {config.name!r} cannot be loaded"
    if not path.exists() and (path.is_absolute() or config.name.startswith((".", "~"))):
        raise InputError(f"{refused}: there is no such directory")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{refused}: the directory has no config.json")
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"{refused}: {error}") from error


def computing_dtype(model: PreTrainedModel, *, bf16: bool) -> torch.dtype:
    """What a policy trained with ``bf16`` computes in: autocast leaves float32 weights to the optimiser alone."""
    return torch.bfloat16 if bf16 else model.dtype


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def end_of_turn_ids(
    tokenizer: PreTrainedTokenizerBase, generation_eos: int | Sequence[int] | None = None
) -> frozenset[int]:
    """Every token id that ends a completion of this model.

    Args:
        tokenizer: its EOS, its padding token and whichever of `END_OF_TURN` are special tokens of its vocabulary.
        generation_eos: ``model.generation_config.eos_token_id``, one id or several.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = [name for name in END_OF_TURN if name in special]
    ids = {*_ids(tokenizer.eos_token_id), *_ids(tokenizer.pad_token_id), *_ids(generation_eos)}
    return frozenset(ids.union(*(_ids(tokenizer.convert_tokens_to_ids(name)) for name in names)))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, Any]],
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids that the model continues: messages through the chat template, strings as they are.

    Messages that end with the user's get an open assistant's turn. A last message of the assistant's is the beginning
    of the completion: its turn stays open. The BOS stands once: Llama-3's template writes it, and so does its tokenizer
    around every text. No EOS or SEP stands behind the prompt, whatever the tokenizer puts around a text.

    Args:
        tokenizer: whose ids and template.
        prompt: text or messages.
        template_kwargs: what else ``apply_chat_template`` takes and the template reads, such as Qwen3's
            ``enable_thinking``.

    Raises:
        ValueError: for messages where the tokenizer has no chat template or the template drops what is to be
            continued; for text that is no Unicode, with the position.
    """
    if isinstance(prompt, str):
        ids = _without_suffix(tokenizer, check_unicode(prompt, "the prompt"))
    else:
        for message in prompt:
            if isinstance(content := message.get("content"), str):
                check_unicode(content, "the prompt")
        text = _rendered(tokenizer, [dict(message) for message in prompt], template_kwargs or {})
        ids = tokenizer.encode(check_unicode(text, "the prompt"), add_special_tokens=False)
    bos = tokenizer.bos_token_id
    while bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids = ids[1:]
    return list(ids)


def encode_completion(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], completion: str) -> list[int]:
    """Token ids of a completion's text such that prompt and completion decode to the one behind the other.

    A SentencePiece tokenizer of Llama 2's kind puts a space before every text that it encodes: here it does not. Where
    no ids decode to the text, as with a tokenizer of words, which keeps no white space, they are those of the
    completion alone.

    Args:
        tokenizer: whose ids.
        prompt_ids: as of `encode_prompt`.
        completion: the text behind the prompt.

    Raises:
        ValueError: for text that is no Unicode, with the position.
    """
    check_unicode(completion, "the completion")
    before = decode(tokenizer, prompt_ids)
    alone: list[int] = tokenizer.encode(completion, add_special_tokens=False)
    for ids in (alone, *(_behind(tokenizer, anchor, completion) for anchor in _ANCHORS)):
        if ids is not None and decode(tokenizer, [*prompt_ids, *ids]) == before + completion:
            return ids
    return alone


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids with their special tokens, nothing cleaned up."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not isinstance(text, str):
        raise TypeError(f"the tokenizer decoded one text to {type(text).__name__}")
    return text


def check_unicode(text: str, name: str) -> str:
    """``text`` itself, if it can be encoded.

    Raises:
        ValueError: where it holds half a surrogate pair, as a text that was cut inside an emoji; with the position.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise ValueError(
            f"{name} is no Unicode text: half a surrogate pair (\\u{half:04x}) at position {error.start}"
        ) from error
    return text


# Texts that a tokenizer is unlikely to join with what follows, so that their tokens can be taken off again.
_ANCHORS = ("\n", ".", "a")


def _behind(tokenizer: PreTrainedTokenizerBase, anchor: str, text: str) -> list[int] | None:
    """The tokens of ``text`` behind ``anchor``; None where the two share a token."""
    before = tokenizer.encode(anchor, add_special_tokens=False)
    ids: list[int] = tokenizer.encode(anchor + text, add_special_tokens=False)
    return ids[len(before) :] if ids[: len(before)] == before else None


def _without_suffix(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of ``text`` with what the tokenizer puts before it, without what it puts behind it."""
    bare: list[int] = tokenizer.encode(text, add_special_tokens=False)
    ids: list[int] = tokenizer.encode(text)
    for start in range(len(ids) - len(bare) + 1):
        if bare and ids[start : start + len(bare)] == bare:
            return ids[: start + len(bare)]
    # An empty text, or one that is cut otherwise between special tokens: of the last ones, none is its own.
    own = {tokenizer.bos_token_id, *bare[-1:]}
    while ids and ids[-1] in tokenizer.all_special_ids and ids[-1] not in own:
        ids = ids[:-1]
    return ids


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], template_kwargs: Mapping[str, Any]
) -> str:
    if tokenizer.chat_template is None and "chat_template" not in template_kwargs:
        raise ValueError(
            "the tokenizer has no chat template, so messages cannot be rendered; give the prompt as text "
            '(a task: set data.prompt_style to "plain")'
        )
    prefilled = bool(messages) and messages[-1].get("role") == "assistant"
    if prefilled and not messages[-1].get("content"):
        # Nothing to continue: an assistant's turn that has just been opened.
        messages, prefilled = messages[:-1], False
    return str(
        tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not prefilled,
            continue_final_message=prefilled,
            **template_kwargs,
        )
    )


def _ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def working_copy(model: nn.Module) -> PreTrainedModel:
    """``model``, or a plain copy of it where computing on it directly would cost a collective or a cast per step.

    Copied, once per call, are models sharded by FSDP2 or ZeRO-3, whose weights are gathered whole on every rank, and
    float32 models under autocast, which become weights of autocast's dtype. LoRA adapters are merged into a copy;
    elsewhere they stay beside their layers. The copy is as large as the whole model in its dtype, and nothing in it is
    collective: ranks may then optimise different numbers of rollouts, or none.

    Args:
        model: a Hugging Face causal LM or PEFT's wrapper of one. Sharded: every rank must call.

    Raises:
        ValueError: for a PEFT method that prepends virtual tokens, which no mask column stands for; for adapters other
            than LoRA's of linear layers where a copy is needed.
    """
    base = _without_peft(model)
    device, to = base.device.type, base.dtype
    if torch.is_autocast_enabled(device) and to == torch.float32:
        to = torch.get_autocast_dtype(device)
    if to == base.dtype and is_whole(base):
        return base
    with torch.autocast(device, enabled=False):
        return plain_copy(model, to)


def _without_peft(model: Any) -> PreTrainedModel:
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        plain: PreTrainedModel = model
        return plain
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(model.active_peft_config).__name__} prepends virtual tokens, which have no mask column"
        )
    inner: PreTrainedModel = model.get_base_model()
    return inner


def plain(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself where its weights are whole, of ``dtype`` and without adapters, else a `plain_copy`."""
    if hasattr(model, "peft_config") or model.dtype != dtype or not is_whole(model):
        return plain_copy(model, dtype)
    return model


def is_whole(model: nn.Module) -> bool:
    """Whether no parameter is sharded by FSDP2 or ZeRO-3."""
    return not any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


@torch.no_grad()
def plain_copy(model: nn.Module, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters gathered, adapters merged, in ``dtype``, on this process's device.

    Every process of a sharded model must call this at the same time. The model itself stays as it is: merging into its
    own weights and back again would round them.

    Args:
        model: a causal LM, as it is or wrapped by FSDP2, DeepSpeed ZeRO-3 or PEFT's LoRA.
        dtype: of the copy's parameters.

    Raises:
        ValueError: for an adapter that is not a LoRA of a linear layer, a parameter the architecture has not, or one of
            the architecture's that the model has not.
    """
    source: Any = model
    device = next(iter(source.parameters())).device
    made = unfilled(copy.deepcopy(source.config), dtype)
    made.to_empty(device=device)
    made.tie_weights()
    targets = dict(made.named_parameters(remove_duplicate=False))
    filled: set[int] = set()
    for name, whole in _whole_parameters(source):
        if name not in targets:
            raise ValueError(f"the policy's parameter {name} has no place in a {type(made).__name__}")
        filled.add(id(targets[name].copy_(whole)))
    for name, target in targets.items():
        if id(target) not in filled:
            raise ValueError(f"the policy has no parameter {name}, which a {type(made).__name__} needs")
    buffers = dict(made.named_buffers())
    for wrapped, buffer in source.named_buffers():
        if (name := _WRAPPERS.sub("", wrapped)) in buffers:
            buffers[name].copy_(buffer)
    made.eval().requires_grad_(False)
    return made


def unfilled(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM of a configuration, whole, without memory for its parameters: they are on the meta device."""
    # Under ZeRO-3 transformers shards each model that it makes, unless it is in the middle of making one.
    with torch.device("meta"), set_zero3_state():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _whole_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    adapters = dict(_merged_weights(model)) if hasattr(model, "peft_config") else {}
    yield from adapters.items()
    for wrapped, parameter in model.named_parameters():
        name = _WRAPPERS.sub("", wrapped)
        if ".lora_" in name or name in adapters:
            continue
        yield name, _whole(parameter)


def _merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """W + sum of the active adapters' updates, for every adapted layer."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    for wrapped, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLinear) or module.merged or module.lora_variant:
            raise ValueError(
                f"{wrapped} is a {type(module).__name__}: only an unmerged plain LoRA of a linear layer is known"
            )
        weight = _whole(module.get_base_layer().weight).clone()
        with _gathered([*module.lora_A.parameters(), *module.lora_B.parameters()]):
            for adapter in [] if module.disable_adapters else module.active_adapters:
                if adapter in module.lora_A:
                    weight += _whole(module.get_delta_weight(adapter)).to(weight.dtype)
        yield f"{_WRAPPERS.sub('', wrapped)}.weight", weight


def _whole(parameter: Any) -> Tensor:
    if isinstance(parameter, DTensor):
        whole: Tensor = parameter.full_tensor()
        return whole
    with _gathered([parameter]):
        own: Tensor = parameter.detach()
        return own.clone() if hasattr(parameter, "ds_id") else own


@contextmanager
def _gathered(parameters: Sequence[Any]) -> Iterator[None]:
    """Within, parameters that ZeRO-3 has sharded are whole. FSDP2's can be computed with as they are."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    # Elsewhere they are empty, and a product of empty vectors is 0, not an error.
    with deepspeed.zero.GatheredParameters(parameters):
        yield
