"""``atmanrl train``: recipe -> task and policy -> evaluation, training, evaluation -> run directory."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

# Imported later, for instance by a model's first backward, it would keep the group in the defaults of its functions.
import torch.distributed.nn.functional  # noqa: F401
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from atmanrl.config import LoraSettings
from atmanrl.errors import InputError, RunError, explained_without_training, what_lacked
from atmanrl.evaluation.compare import write_comparison
from atmanrl.evaluation.evaluate import evaluate
from atmanrl.evaluation.records import Run
from atmanrl.generation import GenerationSettings
from atmanrl.models import computing_dtype, load_policy, plain
from atmanrl.recipe import Overrides
from atmanrl.settings import Settings
from atmanrl.tasks import Task, load_task
from atmanrl.training import checkpoints, directory, preflight
from atmanrl.training.callbacks import MetricsFile, ProgressLine, RolloutPages, StopOnSigterm
from atmanrl.training.config import AtManGRPOConfig, load_recipe, training_config
from atmanrl.training.plan import describe_update
from atmanrl.training.trainer import AtManGRPOTrainer

MODEL, ADAPTER = "model", "adapter"
BEFORE, AFTER = "before.json", "after.json"


def train(
    config: str,
    overrides: Overrides,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    print_config: bool = False,
) -> int:
    """Run a recipe and return the exit status.

    A resumed run keeps every setting that neither the recipe nor an override names.

    Raises:
        InputError: for a recipe, data, a model or an output directory that cannot be used, before anything is computed.
    """
    recipe = load_recipe(config, overrides)
    run = Path(str(recipe.values["output_dir"] or "trainer_output"))
    if resume and (run / directory.CONFIG).is_file():
        recipe = load_recipe(config, overrides, under=run / directory.CONFIG)
    if print_config:
        print(recipe.to_yaml(), end="")
        return 0
    # A dry run computes nothing: the recipe of a large machine can be tried on one that has no half precision.
    args = training_config(recipe, **({"bf16": False, "fp16": False} if dry_run else {}))
    # Where the recipe leaves it to the machine, the run keeps what it began with.
    recipe = recipe.with_value("bf16", args.bf16)
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
    if process.is_main_process:
        directory.check(run, recipe, overwrite=overwrite, resume=resume)
    adapters = lora_config(recipe.model.lora)
    preflight.check_settings(args, recipe.evaluation)
    task = load_task(recipe.data)
    # With several processes the launcher's strategy decides what of it goes to which device.
    device = None if process.num_processes == 1 else "cpu"
    model, tokenizer = load_policy(recipe.model, autocast=bool(args.bf16 or args.fp16), device=device)
    steps = args.arithmetic.optimizer_steps(len(task.train), args.num_train_epochs)
    preflight.check_rows(model, tokenizer, task, args, recipe.evaluation)
    preflight.check_support(model, args)
    if process.is_main_process:
        inputs = preflight.inputs_of(model, tokenizer, task)
        if resume:
            preflight.compare_inputs(run, inputs)
        with directory.made(run):
            preflight.check_outputs(run, model, tokenizer, args, adapters)
        directory.start(run, recipe, inputs, resume=resume)
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
        trained = _train(recipe, args, task, model, tokenizer, adapters, checkpoint, console)
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
    recipe: Settings,
    args: AtManGRPOConfig,
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Any,
    checkpoint: Path | None,
    console: Console,
) -> PreTrainedModel | None:
    """The trained policy, plain and saved; None where the run was asked to stop before its end."""
    run = Path(args.output_dir)
    stop = StopOnSigterm(args.arithmetic.steps_per_generation)
    trainer = AtManGRPOTrainer(model, args, task, tokenizer, callbacks=[stop], peft_config=adapters)
    trainer.remove_callback(PrinterCallback)
    progress = ProgressLine(trainer.seconds)
    trainer.watch = progress.show_part
    trainer.add_callback(progress)
    trainer.add_callback(MetricsFile(trainer.seconds))
    trainer.add_callback(RolloutPages(partial(trainer.sampled, args.page_rollouts), args.page_steps))
    with _explained(run, trainer):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stop.requested:
            step = trainer.state.global_step
            console.print(f"stopped at step {step}; the same command with --resume goes on from there")
            return None
        if adapters is not None:
            with checkpoints.staged(run, ADAPTER, trainer.accelerator) as staging:
                trainer.save_model(str(staging / ADAPTER))
        trained = plain(trainer.accelerator.unwrap_model(trainer.model), model.dtype)
        with checkpoints.staged(run, MODEL, trainer.accelerator) as staging:
            if trainer.accelerator.is_main_process:
                trained.save_pretrained(staging / MODEL)
                tokenizer.save_pretrained(staging / MODEL)
    return trained


@contextmanager
def _explained(run: Path, trainer: AtManGRPOTrainer) -> Iterator[None]:
    """Turn a full disk or an out-of-memory error into a `RunError`; add the next step to any other error.

    Args:
        run: the run's directory.
        trainer: knows how far the run is.
    """
    try:
        yield
    except Exception as error:
        names = [path.name for path in checkpoints.saved(run)[:1]]
        kept = f"{names[0]} is kept and --resume goes on from it" if names else "no checkpoint had been saved yet"
        stopped = f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; {kept}"
        reason = what_lacked(error, trainer.part)
        if reason is None:
            error.add_note(stopped)
            raise
        raise RunError(f"{reason}\n{stopped}") from error


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


class BeforeAfter:
    """Evaluates the policy before and after training on the same prompts, with the same seed, in one process.

    Args:
        recipe: its ``evaluation`` section says how; 0 prompts turn everything off.
        args: masks are optimised as in training.
        task: its test rows are the prompts.
        tokenizer: the policy's.
        run: directory the results go to.
    """

    def __init__(
        self, recipe: Settings, args: AtManGRPOConfig, task: Task, tokenizer: PreTrainedTokenizerBase, run: Path
    ) -> None:
        self.recipe = recipe
        self.args = args
        self.task = task
        self.tokenizer = tokenizer
        self.run = run

    def before(self, model: PreTrainedModel) -> None:
        """Evaluate the untrained policy, unless a stopped run has done so already."""
        if self._wants_before():
            self._evaluate(model, "before").save(self.run / BEFORE)

    def after(self, model: PreTrainedModel, console: Console) -> None:
        """Evaluate the trained policy; with an evaluation before, print and write the comparison."""
        config = self.recipe.evaluation
        if not config.prompts:
            return
        if self._wants_before():
            # Several processes train: none waited for this one to evaluate.
            self.before(load_policy(self.recipe.model)[0])
        after = self._evaluate(model, "after")
        after.save(self.run / AFTER)
        if config.before:
            before = Run.load(self.run / BEFORE)
            write_comparison(self.run, before, after, title=f"AtManRL on {self.task.name}", console=console)

    def _wants_before(self) -> bool:
        config = self.recipe.evaluation
        return config.prompts > 0 and config.before and not (self.run / BEFORE).is_file()

    def _evaluate(self, model: PreTrainedModel, label: str) -> Run:
        config = self.recipe.evaluation
        return evaluate(
            plain(model, computing_dtype(model, bf16=bool(self.args.bf16))),
            self.tokenizer,
            self.task,
            self.task.test.select(range(min(config.prompts, len(self.task.test)))),
            label=label,
            generation=GenerationSettings(
                max_new_tokens=self.args.max_completion_length,
                temperature=config.temperature,
                samples=config.samples,
                batch_size=config.batch_size,
            ),
            mask=self.args.mask,
            estimator=self.args.estimator(),
            saliency=config.saliency,
            chat_template_kwargs=self.args.chat_template_kwargs,
            seed=config.seed,
            settings={"model": self.recipe.model.name},
            progress=sys.stderr.isatty(),
        )


def part_from_others() -> None:
    """Leave the group of processes; every process calls this at the same time, when it has let go of its trainer.

    A process that ends while a thread of gloo still holds the tensors of the last collective is aborted
    (https://github.com/pytorch/pytorch/pull/179291), and the launcher calls the whole run failed. The threads end with
    the last reference to the group: the trainer's, which the collection finds. FSDP2 keeps one in its caches; there the
    threads have let go of the tensors by the time the collection is done.

    A model that is loaded later is whole: transformers no longer shares it out by ZeRO-3 among processes that are gone.
    """
    unset_hf_deepspeed_config()
    PartialState().destroy_process_group()
    gc.collect()
