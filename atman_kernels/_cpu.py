"""The C++ kernel behind the operators (placeholder until the extension is bound)."""

from torch import Tensor


def supports(q: Tensor, *, forced: bool) -> bool:
    return False
