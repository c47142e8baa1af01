"""Times one whole GRPO update, masks included, at the Llama-3.2-3B shape with random weights in 80 GB.

    python -m benchmarks.update                    8 x 8 rollouts, 200 mask steps, AdamW on float32 weights
    python -m benchmarks.update --lora 16          adapters on bf16 weights
    python -m benchmarks.update --shape llama-30m --device cpu --queries 1 --completion 16 --mask-steps 5

An update is the whole of `AtManGRPOTrainer`'s work on a generation batch: sampling, masks, and every optimiser step of
both passes. Random weights draw tokens evenly, so that every completion has the same length; its last four tokens are
taken for the answer.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from atmanrl.answers import GSM8K_ANSWER, CompletionSplit
from atmanrl.config import LoraSettings, MaskConfig, ModelConfig
from atmanrl.models import attention_of
from atmanrl.saliency.throughput import SHAPES
from atmanrl.tasks import Task
from atmanrl.training.run import lora_config
from atmanrl.training.trainer import AtManGRPOConfig, AtManGRPOTrainer
from benchmarks.device import Device, add_results_argument, commit, results_file, save

MEMORY = 80e9
ANSWER = 4


class Update(AtManGRPOTrainer):
    """Takes the last tokens of every completion for its answer, and notes when parts begin and how much they hold."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.peaks: dict[str, int] = {}
        self._part = "update"
        self.watch = self._begin

    def _split(self, completion_ids: Sequence[int]) -> CompletionSplit:
        ids = tuple(completion_ids)
        return CompletionSplit(ids[:-ANSWER], (), ids[-ANSWER:], None, "", finished=True)

    def note_peak(self) -> None:
        """Keep the highest memory of the part that is ending."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peaks[self._part] = max(self.peaks.get(self._part, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    def _begin(self, part: str) -> None:
        self.note_peak()
        print(f"{time.strftime('%X')}  {part}", flush=True)
        self._part = part


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word per id, so that every id can be decoded."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0")


def prompts(queries: int, length: int, vocabulary: int) -> Task:
    """Random prompts of equal length."""
    ids = torch.randint(3, vocabulary, (queries, length), generator=torch.Generator().manual_seed(0))
    rows = {"prompt": [" ".join(f"w{i}" for i in row) for row in ids.tolist()], "answer": ["0"] * queries}
    data = datasets.Dataset.from_dict(rows)
    return Task("random", data, data, GSM8K_ANSWER)


def policy(config: LlamaConfig, device: torch.device, *, adapters: bool) -> LlamaForCausalLM:
    """Random weights: bf16 and frozen below adapters, else float32."""
    half = device.type == "cuda"
    config._attn_implementation = attention_of(ModelConfig(""), half=half)
    torch.manual_seed(0)
    with device:
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16) if adapters and half else model  # type: ignore[no-any-return]


def run(
    config: LlamaConfig,
    device: torch.device,
    *,
    queries: int = 8,
    prompt: int = 150,
    completion: int = 200,
    mask_steps: int = 200,
    lora: int = 0,
) -> dict[str, Any]:
    """One update; seconds and peak bytes by part, and what was run."""
    vocabulary = config.vocab_size
    with tempfile.TemporaryDirectory() as directory:
        args = AtManGRPOConfig(
            output_dir=directory,
            num_generations=8,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4 * queries,
            max_steps=2,
            max_completion_length=completion,
            generation_kwargs={"min_new_tokens": completion},
            mask=MaskConfig(steps=mask_steps),
            gradient_checkpointing=True,
            bf16=device.type == "cuda",
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Update(
            policy(config, device, adapters=bool(lora)),
            args,
            prompts(queries, prompt, vocabulary),
            tokenizer_of(vocabulary),
            peft_config=lora_config(LoraSettings(rank=lora) if lora else None),
        )
        trainer.train()
        trainer.note_peak()
        logged = trainer.state.log_history[0]
    return {
        "lora": lora,
        "rollouts": 8 * queries,
        "tokens": {"prompt": prompt, "completion": completion, "answer": ANSWER},
        "mask_steps": mask_steps,
        "passes": args.num_iterations,
        "seconds": dict(trainer.seconds),
        "peak_gb": {part: round(peak / 1e9, 2) for part, peak in trainer.peaks.items()},
        "mask_loss": [logged["mask/loss_initial"], logged["mask/loss_final"]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-3b", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--queries", type=int, default=8, help="of 8 rollouts each")
    parser.add_argument("--prompt", type=int, default=150, help="tokens")
    parser.add_argument("--completion", type=int, default=200, help="tokens")
    parser.add_argument("--mask-steps", type=int, default=200)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="0: all weights are trained")
    add_results_argument(parser)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("benchmarks.update needs a CUDA GPU; its times stay not yet measured", file=sys.stderr)
            return 1
        # A larger GPU must not make room for what 80 GB do not hold.
        torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY / torch.cuda.mem_get_info()[1]))
    facts = (
        Device().provenance()
        if device.type == "cuda"
        else {"device": platform.processor() or "cpu", "commit": commit()}
    )
    sizes = {name: getattr(arguments, name) for name in ("queries", "prompt", "completion", "mask_steps", "lora")}
    measured = {**facts, "shape": arguments.shape, **run(SHAPES[arguments.shape], device, **sizes)}
    for name in ("seconds", "peak_gb"):
        print(f"{name}: " + ", ".join(f"{part} {value:.2f}" for part, value in measured[name].items()))
    if device.type == "cuda":
        kind = f"update-lora{arguments.lora}" if arguments.lora else "update"
        save(results_file(kind, facts, arguments.results), measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
