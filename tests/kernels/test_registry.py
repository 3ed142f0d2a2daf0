"""The choice of a kernel: claims, order, backends and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from fxcurv.errors import FxcurvError
from fxcurv.ir.types import Diag, Mat, Psd, Rows, Scalar
from fxcurv.kernels import registry
from fxcurv.kernels.registry import KERNELS, Kernel, register, select


@pytest.fixture
def scratch() -> Iterator[None]:
    """Forget the kernels that a test registers."""
    registry.load("aten")
    before = list(KERNELS)
    yield
    KERNELS[:] = before


def kernel(op: str, name: str, backend: str = "aten", claims: bool = True) -> Kernel:
    return Kernel(op, name, backend, lambda *types: claims, lambda *operands: None, "")


def test_claims_by_type() -> None:
    psd, diag = Psd((5, 5)), Diag((5,))
    chosen = select("inverse", psd, [psd, 0.1])
    assert chosen is not None and chosen.name == "potri"
    assert select("inverse", diag, [diag, 0.1]) is None
    assert select("inverse", Psd((5, 5), torch.bfloat16), [Psd((5, 5), torch.bfloat16), 0.1]) is None
    assert select("gram", Psd((3, 4, 4)), [Rows((None, None, 3, 4))]) is None
    assert select("ema", Psd((2, 4, 4)), [Psd((2, 4, 4)), Psd((2, 4, 4)), Scalar((2,))]) is None
    assert select("neg", Mat((3, 4)), [Mat((3, 4))]) is None


def test_reference_backend_selects_nothing() -> None:
    psd = Psd((5, 5))
    assert select("inverse", psd, [psd, 0.1], "aten") is not None
    assert select("inverse", psd, [psd, 0.1], "reference") is None


def test_first_that_claims_runs(scratch: None) -> None:
    register(kernel("neg", "never", claims=False))
    first, _ = register(kernel("neg", "first")), register(kernel("neg", "second"))
    assert select("neg", Mat((3, 4)), [Mat((3, 4))]) is first


def test_triton_is_preferred_on_a_gpu(scratch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = register(kernel("neg", "slow", "aten")), register(kernel("neg", "fast", "triton"))
    monkeypatch.setattr(registry, "load", lambda backend: True)
    operands: tuple[Any, ...] = (Mat((3, 4)), [Mat((3, 4))])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select("neg", *operands) is slow
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select("neg", *operands) is fast
    assert select("neg", *operands, "aten") is slow
    assert select("neg", *operands, "triton") is fast


def test_a_backend_without_kernels_is_left_out_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BACKENDS, "triton", "fxcurv.kernels.no_such_package")
    registry.load.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(registry, "find_spec", lambda name: None if "no_such" in name else find_spec(name))
    psd = Psd((5, 5))
    chosen = select("inverse", psd, [psd, 0.1])
    assert chosen is not None and chosen.backend == "aten"
    with pytest.raises(FxcurvError, match="no triton kernels"):
        select("inverse", psd, [psd, 0.1], "triton")
    registry.load.cache_clear()


def test_refusals(scratch: None) -> None:
    with pytest.raises(FxcurvError, match="no backend 'cuda'"):
        select("neg", Mat((3, 4)), [Mat((3, 4))], "cuda")
    with pytest.raises(FxcurvError, match="does not exist"):
        kernel("no_such_op", "x")
    with pytest.raises(FxcurvError, match="known are aten, triton"):
        kernel("neg", "x", "cuda")
    register(kernel("neg", "twice"))
    with pytest.raises(FxcurvError, match="another name"):
        register(kernel("neg", "twice"))


def test_triton_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.load.cache_clear()
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    psd = Psd((5, 5))
    with pytest.raises(FxcurvError, match="'triton' cannot be used here: install the package triton, or use 'auto'"):
        select("inverse", psd, [psd, 0.1], "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = select("inverse", psd, [psd, 0.1], "auto")
    assert chosen is not None and chosen.backend == "aten"
    registry.load.cache_clear()
