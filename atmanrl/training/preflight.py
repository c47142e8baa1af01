"""Checks before the first forward: whatever would stop a run later, and whether a resumed run has its own inputs.

A run computes for hours before it saves, evaluates or draws. Each check here does, without weights or in small, what
the run will do then, or compares what the run will need with what there is.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import shutil
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from matplotlib.figure import Figure
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from atmanrl.config import EvaluationConfig
from atmanrl.errors import CANNOT_WRITE, InputError
from atmanrl.generation import context_length
from atmanrl.models import encode_prompt, is_whole, plain_copy, unfilled
from atmanrl.saliency.support import check_model
from atmanrl.tasks import Task
from atmanrl.training.checkpoints import STAGING
from atmanrl.training.config import AtManGRPOConfig
from atmanrl.training.directory import INPUTS, RunDirectoryError

_SAMPLED = 4096


def check_settings(args: AtManGRPOConfig, evaluation: EvaluationConfig) -> None:
    """Make the reporting backends, the optimiser and its schedule, and a picture, each for nothing.

    Raises:
        InputError: naming the setting whose part cannot be made.
    """
    with _refusing("report_to"):
        for backend in get_reporting_integration_callbacks(args.report_to):
            backend()
    if not args.deepspeed:
        with _refusing("optim"):
            cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
            optimizer = cls([nn.Parameter(torch.zeros(1))], **options)
        with _refusing("lr_scheduler_type"):
            get_scheduler(
                args.lr_scheduler_type,
                optimizer,
                num_warmup_steps=0,
                num_training_steps=1,
                scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
            )
    if evaluation.prompts:
        # An unusable MPLBACKEND or configuration of matplotlib shows at the first picture.
        with _refusing("the report's plots"):
            Figure().savefig(io.BytesIO(), format="svg")


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{what} cannot be used: {error}") from error


def check_support(model: PreTrainedModel, args: AtManGRPOConfig) -> None:
    """Refuse a model that the saliency cannot read, before anything is generated.

    A model that ZeRO-3 shards while it is loaded is checked when the trainer is made.

    Raises:
        InputError: see :func:`atmanrl.saliency.support.check_model`.
    """
    if not args.scores_tokens or not is_whole(model):
        return
    try:
        check_model(model)
    except ValueError as error:
        raise InputError(f"{error}; or set saliency_weight: 0") from error


def check_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    args: AtManGRPOConfig,
    evaluation: EvaluationConfig,
) -> None:
    """Encode every prompt of the run: each must leave room for a completion.

    Raises:
        InputError: naming the first row that cannot be used.
    """
    room = context_length(model) - args.max_completion_length
    tested = len(task.test) if args.eval_strategy != "no" else min(evaluation.prompts, len(task.test))
    if (evaluation.prompts or args.eval_strategy != "no") and not tested:
        raise InputError(f"the task {task.name} has no test rows to evaluate on; evaluation.prompts 0 asks for none")
    for name, rows in (("training", task.train), ("test", task.test.select(range(tested)))):
        for i, prompt in enumerate(rows["prompt"]):
            try:
                length = len(encode_prompt(tokenizer, prompt, args.chat_template_kwargs))
            except (ValueError, TemplateError) as error:
                raise InputError(f"prompt {i} of the {name} rows: {error}") from error
            if length > room:
                raise InputError(
                    f"prompt {i} of the {name} rows has {length} tokens: max_completion_length "
                    f"{args.max_completion_length} leaves it {max(room, 0)} of the model's context of "
                    f"{room + args.max_completion_length}"
                )


def check_outputs(
    run: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: AtManGRPOConfig, adapters: Any
) -> None:
    """Save policy and tokenizer as the run will, without weights, and see that there is room for the weights.

    Args:
        run: the run's directory, which exists; it is left as it was.
        adapters: PEFT's configuration, None where the weights themselves are trained.

    Raises:
        InputError: for adapters that the model cannot have or that cannot be merged for the saliency and the trained
            model; for a policy or a tokenizer that cannot be saved; for a disk too small.
    """
    made = unfilled(copy.deepcopy(model.config), model.dtype)
    adapted = made
    if adapters is not None:
        from peft import get_peft_model

        with _refusing("model.lora"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(unfilled(copy.deepcopy(model.config), model.dtype), copy.deepcopy(adapters))
            # On the meta device: names, shapes and kinds of layers, no memory.
            plain_copy(adapted, model.dtype)
    made.generation_config = model.generation_config
    staging = run / STAGING
    try:
        made.save_pretrained(staging / "model", state_dict={})
        tokenizer.save_pretrained(staging / "model")
        if adapters is not None:
            adapted.peft_config["default"].save_pretrained(staging / "adapter")
    except OSError as error:
        if error.errno in CANNOT_WRITE:
            raise
        raise InputError(f"the policy could not be saved: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the policy could not be saved: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _check_room(run, model, adapted, args)


def _check_room(run: Path, model: PreTrainedModel, adapted: nn.Module, args: AtManGRPOConfig) -> None:
    """Compare the free disk with a checkpoint, written beside those that are kept, and the trained model."""

    def size(parameters: Iterable[nn.Parameter]) -> int:
        # Of a tensor that ZeRO-3 has sharded, the whole.
        return sum(getattr(each, "ds_numel", each.numel()) * each.element_size() for each in parameters)

    trained = [each for each in adapted.parameters() if each.requires_grad]
    # A checkpoint has what is trained; of optimisers only AdamW's two moments per weight are known.
    moments = 0 if args.save_only_model or not str(args.optim).split(".")[-1].lower().startswith("adamw_torch") else 2
    saved = (1 + moments) * size(trained)
    kept = len(list(run.glob("checkpoint-*")))
    most = 0 if args.save_strategy == "no" else 1 + (args.save_total_limit or 0)
    needed = max(0, most - kept) * saved + size(model.parameters())
    free = shutil.disk_usage(run).free
    if needed > free:
        raise RunDirectoryError(
            f"output_dir {run} has {free / 2**30:.3g} GiB free; checkpoints of {saved / 2**30:.3g} GiB, as many as "
            f"save_total_limit keeps and one more while it is written, and the trained model need "
            f"{needed / 2**30:.3g} GiB. save_only_model and a lower save_total_limit need less"
        )


def inputs_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, Any]:
    """Fingerprints of the data rows, in their order, of the tokenizer, and of the base model.

    Of a parameter at most 4096 evenly spaced numbers are read, beside its name, shape and type: other weights differ
    nearly everywhere. None for a model that ZeRO-3 has sharded while it was loaded.
    """
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map], default=str)
    return {
        "training rows": [_crc32(json.dumps(row, sort_keys=True, default=str)) for row in task.train],
        "test rows": [_crc32(json.dumps(row, sort_keys=True, default=str)) for row in task.test],
        "tokenizer": {"vocabulary": _crc32(vocabulary), "chat template": _crc32(str(tokenizer.chat_template))},
        "base model": _weights_of(model) if is_whole(model) else None,
    }


def _weights_of(model: PreTrainedModel) -> dict[str, str]:
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_MODELS}
    found = {"config.json": _crc32(json.dumps(config, sort_keys=True, default=str))}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        chosen = flat[:: max(1, len(flat) // _SAMPLED)].contiguous().cpu().view(torch.uint8).numpy().tobytes()
        about = f"{tuple(parameter.shape)} {parameter.dtype}"
        found[name] = hashlib.sha256(about.encode() + chosen).hexdigest()[:16]
    return found


# Where the checkpoint lies and what wrote it.
_NOT_THE_MODELS = ("_name_or_path", "transformers_version", "use_cache")


def compare_inputs(run: Path, now: Mapping[str, Any]) -> None:
    """Refuse to resume a run on other inputs than it was started on.

    Raises:
        RunDirectoryError: saying what changed: how many rows, the first that differs, the first parameter.
    """
    path = run / INPUTS
    if not path.is_file():
        # The run is older than the file.
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changes = [text for name in now for text in _changes(name, before.get(name), now[name])]
    if changes:
        raise RunDirectoryError(f"{run} was started on other inputs, which have changed since: {'; '.join(changes)}")


def _changes(name: str, before: Any, now: Any) -> Iterator[str]:
    if before == now or before is None or now is None:
        return
    if isinstance(now, list):
        first = next(
            (i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now))
        )
        counts = f"{len(before)} before, {len(now)} now, " if len(before) != len(now) else ""
        differing = sum(a != b for a, b in zip(before, now, strict=False)) + abs(len(before) - len(now))
        yield f"{name} ({counts}{differing} differ, the first is row {first})"
        return
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    yield f"{name} ({keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''})"


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"
