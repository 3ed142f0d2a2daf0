"""Every kernel family compiled ahead of time for every target: no spills, memory within limits, tensor cores used.

By default the variants that are marked quick, with -m slow all of them. Also what the compiler is given: the launches
that ``record`` notes must be those that would run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fxcurv.errors import FxcurvError
from fxcurv.kernels import aot, traffic
from fxcurv.kernels.aot import TARGETS, compile_variant, jobs, record, signature
from fxcurv.kernels.generator import Source, load
from fxcurv.kernels.triton import FAMILIES


def cases() -> Iterator[Any]:
    quick = set(jobs(quick=True))
    for job in jobs():
        yield pytest.param(*job, id="-".join(job), marks=[] if job in quick else pytest.mark.slow)


@pytest.mark.parametrize(("family", "variant", "arch"), list(cases()))
def test_compiles_within_limits(family: str, variant: str, arch: str) -> None:
    needs_dot = next(v.dot for v in FAMILIES[family].variants() if v.name == variant)
    binaries = compile_variant(family, variant, arch)
    assert [b for b in binaries if b.spills] == []
    assert [b for b in binaries if b.shared > TARGETS[arch].shared] == []
    assert not needs_dot or any(b.tensor_cores for b in binaries)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_has_a_quick_variant(family: str) -> None:
    assert any(v.quick and v.compile for v in FAMILIES[family].variants())


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_traffic_is_near_the_floor_where_memory_is_the_limit(family: str, arch: str) -> None:
    """With the block sizes of each target, on the launches that would run."""
    for found in traffic.table(jobs([family], [arch])):
        assert found.ratio <= traffic.MOST or not found.limited_by_memory, found


KERNEL = """
import torch
import triton
import triton.language as tl


@triton.jit
def one_kernel(x_ptr, out_ptr, n, one, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n) * factor * one, mask=at < n)


def launch(x):
    out = torch.empty_like(x)
    one_kernel[(triton.cdiv(x.numel(), 64),)](x[1:], out, x.numel(), 1, 0.5, BLOCK=64, num_warps=2)
    return out
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FXCURV_CACHE", str(tmp_path))
    return load(Source("one", KERNEL, "0" * 64))


def test_a_launch_is_recorded_as_it_would_run(module: Any) -> None:
    kernel = module.one_kernel
    launches, result = record(module, (torch.zeros(160),))
    assert module.one_kernel is kernel and result.shape == (160,)
    (launch,) = launches
    assert launch.grid == (3,) and launch.options == {"num_warps": 2} and launch.kernel is kernel
    types, constants, attributes = signature(launch)
    assert types == {
        "x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32", "one": "constexpr", "factor": "fp32", "BLOCK": "constexpr",
    }  # fmt: skip
    assert constants == {"one": 1, "BLOCK": 64}
    assert list(attributes) == [(1,), (2,)]  # x[1:] is not aligned, 160 is a multiple of 16


def test_numbers_come_from_the_compiler_once(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (launch,), _ = record(module, (torch.zeros(160),))
    numbers = aot._cached("k", lambda: aot._compile(launch, "sm_80"))
    assert numbers["registers"] > 0 and numbers["spills"] == 0 == numbers["tensor_cores"] and numbers["warps"] == 2
    assert aot._cached("k", lambda: pytest.fail("compiled twice")) == numbers
    assert [path.name for path in (tmp_path / "aot").iterdir()] == ["k.json"]


def test_refusals(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FxcurvError, match="there is no kernel family 'nope'"):
        jobs(["nope"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(FxcurvError, match="cannot be compiled"):
        compile_variant("triangle_pack", "fp32-38-1", "sm_80")
