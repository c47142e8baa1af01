"""Which of a GPU's kernels failed a smoke test with the installed versions: they are passed over, with a warning.

``atmanrl doctor`` keeps the outcome in the user's cache directory, under the device, the versions of torch and Triton
and the kernels' own sources; any other combination starts untested, which is trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

# The paths, and what computes in place of one that failed.
ATTENTION, FUSED, STATISTICS = "attention", "fused backward", "statistics"
FALLBACKS = {ATTENTION: "the reference", FUSED: "the deterministic backward", STATISTICS: "the reference"}


def keep(failures: Mapping[str, str], device: torch.device) -> Path:
    """Keep which paths failed on a device, and why; the file.

    Raises:
        OSError: if the cache directory cannot be written.
    """
    path = _file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(dict(failures), indent=1))
    partial.replace(path)
    failed.cache_clear()
    return path


@cache
def failed(path: str, device: torch.device) -> bool:
    """Whether a path failed its smoke test on this device; the first question warns, naming path and fallback."""
    try:
        reason = json.loads(_file(device).read_text()).get(path)
    except (OSError, ValueError):
        return False
    if reason is None:
        return False
    warnings.warn(
        f"atman_kernels: the Triton kernels' {path} failed its smoke test on this device ({reason});"
        f" {FALLBACKS[path]} computes instead. `atmanrl doctor` tests again",
        RuntimeWarning,
        stacklevel=2,
    )
    return True


def _file(device: torch.device) -> Path:
    from atman_kernels._triton.launch import block_sizes_in_use, kernels_label

    parts = [torch.cuda.get_device_name(device), torch.__version__, version("triton")]
    key = hashlib.sha256(json.dumps([*parts, kernels_label(block_sizes_in_use())]).encode()).hexdigest()[:16]
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return directory / "atman_kernels" / f"{key}.json"
