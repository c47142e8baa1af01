"""The end of a run of several processes."""

from __future__ import annotations

import gc

# Imported later, for instance by a model's first backward, it would keep the group in the defaults of its functions.
import torch.distributed.nn.functional  # noqa: F401
from accelerate import PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


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
