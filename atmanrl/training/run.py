"""``atmanrl train``: recipe -> task and policy -> evaluation, training, evaluation -> run directory."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from jinja2 import TemplateError
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from atmanrl.errors import InputError
from atmanrl.generation import context_length
from atmanrl.models import encode_prompt, load_policy, plain
from atmanrl.recipe import EvaluationConfig, LoraSettings, Recipe, build, load_recipe
from atmanrl.tasks import Task, load_task
from atmanrl.training import checkpoints, run_directory
from atmanrl.training.before_after import BeforeAfter
from atmanrl.training.callbacks import MetricsFile, ProgressLine, RolloutPages, StopOnSigterm
from atmanrl.training.dry_run import describe_update
from atmanrl.training.failures import explained, explained_without_training
from atmanrl.training.processes import part_from_others
from atmanrl.training.trainer import AtManGRPOConfig, AtManGRPOTrainer

MODEL, ADAPTER = "model", "adapter"


def train(
    config: str,
    overrides: Sequence[tuple[str, str]],
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
) -> int:
    """Run a recipe and return the exit status.

    Raises:
        InputError: for a recipe, data or an output directory that cannot be used, before anything is computed.
    """
    recipe = load_recipe(config, overrides)
    # A dry run computes nothing: the recipe of a large machine can be tried on one that has no half precision.
    anywhere = {"bf16": False, "fp16": False} if dry_run else {}
    training = {"disable_tqdm": True, **recipe.training, **anywhere}
    args = build(AtManGRPOConfig, training, source=recipe.source, typed=recipe.typed)
    console = Console()
    process = PartialState()
    if not sys.stderr.isatty():
        # One line per log entry, not one per file that is read or written.
        disable_progress_bar()
    if dry_run:
        if process.is_main_process:
            console.print(describe_update(recipe, args), highlight=False, soft_wrap=True)
        return 0
    if process.num_processes != args.arithmetic.processes:
        # accelerate joins processes on a CPU only where it is told that the CPU is meant, or which backend.
        joining = "--ddp_backend gloo" if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else "--use_cpu true"
        raise InputError(
            f"launched as {args.arithmetic.processes} processes that do not know one another: on a machine without an "
            f"accelerator pass {joining}"
        )
    run = Path(args.output_dir)
    if process.is_main_process:
        run_directory.check(run, recipe, overwrite=overwrite, resume=resume)
    task = load_task(recipe.data)
    # With several processes the launcher's strategy decides what of it goes to which device.
    device = None if process.num_processes == 1 else "cpu"
    model, tokenizer = load_policy(recipe.model, autocast=bool(args.bf16 or args.fp16), device=device)
    steps = args.arithmetic.optimizer_steps(len(task.train), args.num_train_epochs)
    _check_context(model, tokenizer, task, args, recipe.evaluation)
    if process.is_main_process:
        run_directory.start(run, recipe, resume=resume)
        console.print(args.arithmetic.describe(), highlight=False, soft_wrap=True)
        console.print(f"steps             {args.max_steps if args.max_steps > 0 else steps} optimiser steps")
    process.wait_for_everyone()
    checkpoint = checkpoints.last_checkpoint(run) if resume else None

    with _sigterm_ends_with_status_0():
        evaluation = BeforeAfter(recipe, args, task, tokenizer, run)
        # Before the trainer is made: it seeds the generators, so that an evaluation changes no number of the training.
        if process.num_processes == 1:
            with explained_without_training("evaluation", "nothing has been trained yet"):
                evaluation.before(model)
        trained = _train(recipe, args, task, model, tokenizer, checkpoint, console)
        part_from_others()
        if trained is not None and process.is_main_process:
            with explained_without_training("evaluation", f"the trained policy is kept: {run / MODEL}"):
                evaluation.after(trained, console)
    return 0


@contextmanager
def _sigterm_ends_with_status_0() -> Iterator[None]:
    """Nothing is lost before the first generation batch; from then on the trainer's own handler saves.

    The caller's handler stands again afterwards, also where training raised under the trainer's.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _train(
    recipe: Recipe,
    args: AtManGRPOConfig,
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None,
    console: Console,
) -> PreTrainedModel | None:
    """The trained policy, plain and saved; None where the run was asked to stop before its end."""
    run = Path(args.output_dir)
    stop = StopOnSigterm(args.arithmetic.steps_per_generation)
    trainer = AtManGRPOTrainer(
        model, args, task, tokenizer, callbacks=[stop], peft_config=lora_config(recipe.model.lora)
    )
    trainer.remove_callback(PrinterCallback)
    progress = ProgressLine(trainer.seconds)
    trainer.watch = progress.show_part
    trainer.add_callback(progress)
    trainer.add_callback(MetricsFile(trainer.seconds))
    trainer.add_callback(RolloutPages(partial(trainer.sampled, args.page_rollouts), args.page_steps))
    with explained(run, trainer):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stop.requested:
            step = trainer.state.global_step
            console.print(f"stopped at step {step}; the same command with --resume goes on from there")
            return None
        if recipe.model.lora is not None:
            with checkpoints.staged(run, ADAPTER, trainer.accelerator) as staging:
                trainer.save_model(str(staging / ADAPTER))
        trained = plain(trainer.accelerator.unwrap_model(trainer.model), model.dtype)
        with checkpoints.staged(run, MODEL, trainer.accelerator) as staging:
            if trainer.accelerator.is_main_process:
                trained.save_pretrained(staging / MODEL)
                tokenizer.save_pretrained(staging / MODEL)
    return trained


def lora_config(settings: LoraSettings | None) -> Any:
    """PEFT's configuration, None where no adapters are asked for.

    Raises:
        InputError: where PEFT is not installed.
    """
    if settings is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError("model.lora needs the package peft: pip install 'atmanrl[peft]'") from error
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
    )


def _check_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    args: AtManGRPOConfig,
    evaluation: EvaluationConfig,
) -> None:
    """Check that every prompt leaves room for a completion: otherwise the run stops at the first long one."""
    room = context_length(model) - args.max_completion_length
    tested = len(task.test) if args.eval_strategy != "no" else min(evaluation.prompts, len(task.test))
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
