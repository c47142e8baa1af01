"""How many random cases a property is tried on: a few, the same ones every time, in the tests; many, others every time,
in `make fuzz`."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("ATMAN_FUZZ", "1"))

# Loaded by conftest.py, so that it holds for properties without settings of their own as well.
PROFILE = settings(
    derandomize=TIMES == 1,
    print_blob=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def random_cases(n: int) -> settings:
    """n cases, TIMES as many in `make fuzz`, which prints how to repeat a failure."""
    return settings(PROFILE, max_examples=n * TIMES)
