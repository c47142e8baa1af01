"""Where the C++ kernel does not compute: float64, and a source tree without the extension."""

from __future__ import annotations

import warnings

import pytest
import torch

from atman_kernels import _cpu, attention, attention_statistics, backend, ops


def test_float64_on_the_cpu_is_computed_by_the_reference() -> None:
    q = torch.randn(1, 5, 1, 4, dtype=torch.float64)
    with backend("reference"):
        expected = attention(q, q, q)
    assert torch.equal(attention(q, q, q), expected)


def test_the_reference_computes_in_the_dtype_of_its_operands_under_autocast() -> None:
    q, k, v = (torch.randn(1, 9, 2, 16, requires_grad=True) for _ in range(3))
    results = []
    for enabled in (False, True):
        with backend("reference"), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o, lse = attention(q, k, v, return_lse=True)
            found = attention_statistics(q[0], k[0], lse[0], cu_seqlens_q=torch.tensor([0, 9]))
            results.append([o, lse, *torch.autograd.grad(o.sum(), (q, k, v)), *found])
    assert all(torch.equal(plain, cast) for plain, cast in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["attention_forward", "attention_backward", "attention_statistics"])
def test_devices_without_a_kernel_have_the_reference(name: str) -> None:
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"atman_kernels::{name}", "XPU")
    assert ops.kernels_for("", torch.empty(0, device="meta")) is None


def test_forced_backend_refuses_float64_by_name() -> None:
    q = torch.randn(1, 5, 1, 4, dtype=torch.float64)
    with backend("cpu"), pytest.raises(ValueError, match=r"float32, float16 or bfloat16, got torch\.float64 on cpu"):
        attention(q, q, q)


def test_missing_extension_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "_C", None)
    _cpu._warn_once.cache_clear()
    q = torch.randn(1, 5, 1, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = attention(q, q, q), attention(q, q, q)
    assert ["not built" in str(w.message) for w in caught] == [True]
    assert torch.equal(first, second)


def test_missing_extension_is_an_error_when_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "_C", None)
    q = torch.randn(1, 5, 1, 4)
    with backend("cpu"), pytest.raises(RuntimeError, match="not built; install the package"):
        attention(q, q, q)


@pytest.mark.skipif(not _cpu.isas(), reason="the C++ extension is not built")
def test_unknown_instruction_set_is_refused_with_the_available_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "_isa", "avx1024")
    q = torch.randn(1, 5, 1, 4)
    with backend("cpu"), pytest.raises(ValueError, match=r"no kernels for 'avx1024' here; available: .*portable"):
        attention(q, q, q)
