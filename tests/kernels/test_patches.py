"""Every form of a convolution's patch Gram equals the Gram of its rows, in float64, for any geometry."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxcurv
import fxcurv.layers.reductions  # noqa: F401  (registers them)
from fxcurv.kernels.aten import patches, plane, shifts, spectrum
from fxcurv.kernels.aten.choice import cheapest, correlation
from fxcurv.kernels.aten.geometry import Axis, axes_of
from fxcurv.kernels.aten.operation import patch_gram
from fxcurv.kernels.aten.patches import FORMS, conv_gram, patches_gram, positions_gram, skipped
from fxcurv.kernels.aten.triangle import add_product
from fxcurv.layers.conv import ConvForm
from fxcurv.layers.tap import REDUCTIONS

Pads = tuple[tuple[int, int], ...]
PLANE = {"shifts": shifts.correlate, "spectrum": spectrum.correlate}


def form(channels: int, kernel: tuple[int, ...], pads: Pads, groups: int = 1, bias: bool = False, **fields: Any) -> Any:
    ones = (1,) * len(kernel)
    return ConvForm(
        groups=groups,
        d_out=2,
        d_in=channels // groups * math.prod(kernel) + bias,
        bias=bias,
        permutation=(0, 1),
        weight_shape=(2, 1),
        kernel=kernel,
        pads=pads,
        **{"stride": ones, "dilation": ones} | fields,
    )


def gram_of_rows(x: torch.Tensor, f: ConvForm) -> torch.Tensor:
    rows = f.rows_a(x)
    gram = torch.einsum("bsgi,bsgj->gij", rows, rows)
    return gram[0] if f.groups == 1 else gram


def assert_equal(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    scale = wanted.diagonal(dim1=-2, dim2=-1).abs().max() if wanted.numel() else 0.0
    assert float((found - wanted).abs().max() if wanted.numel() else 0.0) <= tolerance * float(scale)


@st.composite
def geometries(draw: Any, strided: bool = True) -> tuple[torch.Tensor, ConvForm]:
    """An image of 1 to 3 axes and a convolution of it that has at least one output."""
    dims = draw(st.integers(1, 3))
    sizes: list[int] = []
    fields: dict[str, list[Any]] = {"kernel": [], "pads": [], "stride": [], "dilation": []}
    for _ in range(dims):
        kernel, dilation = draw(st.integers(1, 5 if dims < 3 else 3)), draw(st.integers(1, 3))
        low, high = draw(st.integers(0, 6)), draw(st.integers(0, 6))
        sizes.append(max(1, dilation * (kernel - 1) + 1 - low - high) + draw(st.integers(0, 5)))
        values = (kernel, (low, high), draw(st.integers(1, 3)) if strided else 1, dilation)
        for name, value in zip(fields, values, strict=True):
            fields[name].append(value)
    channels, n = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(n, channels, *sizes, dtype=torch.float64, generator=generator)
    options = {name: tuple(values) for name, values in fields.items()}
    return x, form(channels, options.pop("kernel"), options.pop("pads"), **options)


@given(geometries(strided=False))
@settings(max_examples=80, deadline=None)
def test_plane_of_any_geometry(case: tuple[torch.Tensor, ConvForm]):
    x, f = case
    wanted, axes = gram_of_rows(x, f), axes_of(f, tuple(x.shape[2:]))
    for correlate in PLANE.values():
        for by_patches in (False, True):
            found = plane.plane_gram(x, axes, correlate, lambda *_, answer=by_patches: answer)
            assert_equal(found, wanted)
    assert_equal(patches_gram(x, axes), wanted)


@given(geometries(), st.booleans(), st.sampled_from([1.0, 0.5]))
@settings(max_examples=80, deadline=None)
def test_any_geometry(case: tuple[torch.Tensor, ConvForm], bias: bool, scale: float):
    x, f = case
    f = replace(f, bias=bias, d_in=f.inputs + bias, scale=scale)
    assert_equal(conv_gram(x, f), gram_of_rows(x, f))


@pytest.mark.parametrize("name", ["shifts", "spectrum", "patches"])
@pytest.mark.parametrize(("kernel", "pads"), [((3, 3), ((1, 1), (1, 1))), ((5, 2), ((2, 2), (0, 1)))])
def test_each_form_of_usual_geometries(name: str, kernel: tuple[int, ...], pads: Pads):
    x, f = torch.randn(4, 5, 9, 8, dtype=torch.float64), form(5, kernel, pads)
    assert_equal(FORMS[name](x, axes_of(f, (9, 8))), gram_of_rows(x, f))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("stride", [1, 2])
def test_borders_that_are_not_zeros(mode: str, stride: int):
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    f = form(4, (3, 4), ((1, 1), (1, 2)), bias=True, mode=mode, stride=(stride, stride))
    assert_equal(conv_gram(x, f), gram_of_rows(x, f))


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("kernel", [(3, 2), (1, 1), (3,)])
@pytest.mark.parametrize("bias", [False, True])
def test_groups(groups: int, kernel: tuple[int, ...], bias: bool):
    sizes = (6, 5)[: len(kernel)]
    x = torch.randn(3, 4, *sizes, dtype=torch.float64)
    f = form(4, kernel, ((1, 1),) * len(kernel), groups, bias, stride=(2,) * len(kernel))
    assert_equal(conv_gram(x, f), gram_of_rows(x, f))


@pytest.mark.parametrize("sizes", [(20, 3), (3, 20)])
@pytest.mark.parametrize("stride", [1, 3])
def test_one_tap(sizes: tuple[int, int], stride: int):
    x = torch.randn(2, 6, *sizes, dtype=torch.float64)
    f = form(6, (1, 1), ((0, 0), (2, 1)), bias=True, stride=(stride, stride))
    assert_equal(conv_gram(x, f), gram_of_rows(x, f))
    assert_equal(positions_gram(x), torch.einsum("nchw,ndhw->cd", x, x))


def test_only_what_is_read_is_kept_of_an_axis_with_one_tap():
    x = torch.arange(10.0).view(1, 1, 10)
    seen, axes = skipped(x, (Axis(10, 1, 3, 1, 2, 0),))
    assert seen.flatten().tolist() == [1.0, 4.0, 7.0] and axes == (Axis(3, 1, 1, 1, 0, 0),)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "every other", "without batch"])
@pytest.mark.parametrize("stride", [1, 2])
def test_layouts(layout: str, stride: int):
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.mT
    elif layout == "every other":
        x = x[::2, :, ::2]
    else:
        x = x[0]
    f = form(6, (3, 3), ((1, 1), (1, 1)), bias=True, stride=(stride, stride))
    assert_equal(conv_gram(x, f), gram_of_rows(x, f))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["shifts", "spectrum", "patches"])
def test_accumulates_in_float32(dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patches, "cheapest", lambda *_: name)
    x, f = torch.randn(16, 5, 9, 9).to(dtype), form(5, (3, 3), ((1, 1), (1, 1)))
    found = conv_gram(x, f)
    assert found.dtype == torch.float32
    assert_equal(found.double(), gram_of_rows(x.double(), f), 2e-6)


def test_empty_batch():
    f = form(3, (3, 3), ((1, 1), (1, 1)), bias=True)
    assert torch.equal(conv_gram(torch.ones(0, 3, 4, 4), f), torch.zeros(28, 28))


@pytest.mark.parametrize("name", ["spectrum", "patches"])
def test_a_part_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patches if name == "patches" else spectrum, "CACHED", 1)
    x, f = torch.randn(7, 3, 6, 9, dtype=torch.float64), form(3, (3, 2), ((1, 1), (1, 0)))
    assert_equal(FORMS[name](x, axes_of(f, (6, 9))), gram_of_rows(x, f))


@pytest.mark.parametrize("shape", [(300, 290), (300, 5), (10, 300)])
def test_triangle(shape: tuple[int, int]):
    x = torch.randn(shape, dtype=torch.float64)
    once = add_product(x, None)
    assert torch.allclose(once, x @ x.t(), rtol=1e-12) and torch.equal(once, once.t())
    assert torch.allclose(add_product(2 * x, once.clone()), 5 * once, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "wanted"),
    [
        ((64, 16, 32, 32), 3, 1, "spectrum"),
        ((32, 256, 8, 8), 3, 1, "spectrum"),
        ((8, 16, 56, 56), 2, 1, "shifts"),
        ((64, 16, 32, 32), 3, 2, "patches"),
        ((64, 16, 32, 32), 1, 2, "positions"),
        ((2, 2, 4, 4), 3, 1, "patches"),
    ],
)
def test_choice(shape: tuple[int, ...], kernel: int, stride: int, wanted: str):
    n, channels, *sizes = shape
    pads = ((kernel // 2,) * 2,) * 2
    f = form(channels, (kernel, kernel), pads, stride=(stride, stride))
    _, axes = skipped(torch.empty(shape, device="meta"), axes_of(f, tuple(sizes)))
    assert cheapest(n, channels, axes) == wanted
    if wanted in PLANE:
        assert correlation(n, channels, axes) == wanted


def test_one_operation_for_compilers_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    f = form(3, (3, 3), ((1, 1), (1, 1)), bias=True)
    x = torch.randn(16, 3, 21, 13, dtype=torch.float64)
    with FakeTensorMode() as mode:
        fake = patch_gram(mode.from_tensor(x), f)
        assert fake.shape == (28, 28) and fake.dtype == torch.float64
    wanted = gram_of_rows(x, f)
    assert_equal(patch_gram(x, f), wanted)  # no table of a fake tensor was kept
    compiled = torch.compile(lambda x: patch_gram(x, f) * 2, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(x) / 2, wanted)


class _Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, 2, padding=1, groups=2),
            nn.Tanh(),
            nn.Conv2d(4, 4, 1, 2),
            nn.Flatten(),
            nn.Linear(16, 3),
        )


def states(backend: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net, x = _Net().double(), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    model = fxcurv.transform(
        net, "kfac", example_inputs=(x,), loss="cross_entropy", fisher="empirical", backend=backend
    )
    nn.functional.cross_entropy(model(x), torch.arange(5) % 3).backward()
    model.precondition_()
    found = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_reference_backend_builds_rows_and_agrees(monkeypatch: pytest.MonkeyPatch):
    fast = states("aten")

    def refuse(*_: Any) -> None:
        raise AssertionError("a kernel was used")

    for pattern in ("gram(a)", "gram(g)"):
        monkeypatch.setitem(REDUCTIONS, pattern, [(backend, refuse) for backend, _ in REDUCTIONS[pattern]])
    with pytest.raises(AssertionError, match="a kernel was used"):
        states("aten")
    slow = states("reference")
    assert fast.keys() == slow.keys()
    for name, value in fast.items():
        assert torch.allclose(value, slow[name], rtol=1e-9, atol=1e-11), name
