"""The peers of the benchmarks compute the same attention; those that need a GPU or a package are left out."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from atman_kernels import backend
from benchmarks.cases import AttentionCase, attention_cases, make_inputs
from benchmarks.peers import PEERS, UnavailableError

ON_CPU = ("eager", "sdpa_math", "sdpa_flash_extra_column")


@pytest.mark.parametrize("prefix", [0, 5], ids=["no-prefix", "prefix"])
@pytest.mark.parametrize("lengths", [(16, 16), (16, 9, 3)], ids=["equal", "ragged"])
@pytest.mark.parametrize("name", ON_CPU)
def test_peers_agree_with_the_reference(name: str, lengths: tuple[int, ...], prefix: int) -> None:
    assert_agrees(name, AttentionCase("small", lengths, heads=(4, 2), head_dim=8, prefix=prefix), "cpu")


def assert_agrees(name: str, case: AttentionCase, device: str) -> None:
    """The peer's output and gradients are those of the reference."""
    x = make_inputs(case, torch.float32, device)
    with backend("reference"):
        expected = PEERS["atman"](case, x)()
    actual = PEERS[name](case, x)()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for gradient, wanted in zip(
        torch.autograd.grad(actual, x.differentiable, x.do),
        torch.autograd.grad(expected, x.differentiable, x.do),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_flex_attention_agrees_with_the_reference() -> None:
    """Its forward, that is: FlexAttention has no backward on the CPU."""
    case = AttentionCase("small", (16, 9, 3), heads=(4, 2), head_dim=8)
    x = make_inputs(case, torch.float32, "cpu")
    x = x._replace(**{name: getattr(x, name).detach() for name in ("q", "k", "v", "key_bias")})
    with backend("reference"):
        expected = PEERS["atman"](case, x)()
    torch.testing.assert_close(PEERS["flex"](case, x)(), expected, rtol=1e-4, atol=1e-5)


def test_fla_agrees_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decay whose cumulative sum is minus the bias gives the same outputs and gradients."""
    pytest.importorskip("fla")
    from triton.runtime.autotuner import Autotuner

    if not torch.cuda.is_available():
        # In the interpreter there is nothing to time; any of the configurations will do.
        monkeypatch.setattr(Autotuner, "_bench", lambda self, *_, config, **__: [1.0, 1.0, 1.0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_agrees("fla", AttentionCase("small", (16, 9, 3), heads=(4, 2), head_dim=16), device)


def test_a_peer_that_is_not_installed_says_so() -> None:
    if importlib.util.find_spec("fla") is not None:
        pytest.skip("fla is installed")
    case = AttentionCase("small", (4,), heads=(1, 1), head_dim=8)
    with pytest.raises(UnavailableError, match="fla is not installed"):
        PEERS["fla"](case, make_inputs(case, torch.float32, "cpu"))


def test_causal_operations_are_counted_over_visible_pairs() -> None:
    case = AttentionCase("small", (4,), heads=(2, 1), head_dim=8, prefix=3)
    # 4 rows see 3 prefix keys each and 1 + 2 + 3 + 4 own keys.
    assert case.flops("forward") == 4 * 2 * 8 * (12 + 10)
    assert case.flops("forward+backward") == case.flops("forward") + 2 * 2 * 8 * (5 * 10 + 3 * 12)


def test_case_keys_are_unique() -> None:
    keys = [case.key for case in attention_cases()]
    assert len(set(keys)) == len(keys)
