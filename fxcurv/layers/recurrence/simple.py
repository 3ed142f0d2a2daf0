"""The plain recurrent network, h' = tanh(x + W h) or relu, over time: the loop, its reverse, and the adjoint node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcurv.layers.layer import SUMMANDS
from fxcurv.layers.recurrence.operators import by_step, live_rows, mask_of, operator
from fxcurv.layers.recurrence.products import once, thread
from fxcurv.layers.recurrence.sequence import shown

aten = torch.ops.aten


def _fake_loop(zx: Tensor, h0: Tensor, w_hh: Tensor, b_hh: Any, relu: bool, sizes: Any) -> tuple[Tensor, ...]:
    steps, batch, size = zx.shape
    return zx.new_empty(zx.shape), zx.new_empty(steps + 1, batch, size)


@operator(
    "(Tensor zx, Tensor h0, Tensor w_hh, Tensor? b_hh, bool relu, Tensor? batch_sizes) -> (Tensor, Tensor)", _fake_loop
)
def rnn_loop(
    zx: Tensor, h0: Tensor, w_hh: Tensor, b_hh: Tensor | None, relu: bool, batch_sizes: Tensor | None
) -> tuple[Tensor, ...]:
    """From input products (T, B, H) and h0 (B, H): hidden products (T, B, H) and h (T + 1, B, H).

    Steps that do not exist are zero; h keeps there the last value that exists.
    """
    steps, batch, size = zx.shape
    products = zx.new_empty(zx.shape) if batch_sizes is None else zx.new_zeros(zx.shape)
    hs = zx.new_empty(steps + 1, batch, size)
    hs[0] = h0
    live = live_rows(batch_sizes, steps, batch)
    weight = w_hh.t().contiguous()  # read T times by a product that is faster on this layout
    x, product = by_step(zx, live), by_step(products, live)
    activate = torch.relu_ if relu else torch.tanh_
    for t, n in enumerate(live):
        h, new = hs[t, :n], hs[t + 1, :n]
        if b_hh is None:
            torch.mm(h, weight, out=product[t])
        else:
            torch.addmm(b_hh, h, weight, out=product[t])
        activate(torch.add(x[t], product[t], out=new))
        if n < batch:
            hs[t + 1, n:] = hs[t, n:]
    return products, hs


def _fake_reverse(d_out: Tensor, d_hn: Tensor, w_hh: Tensor, hs: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return hs.new_empty(d_out.shape), torch.empty_like(d_hn)


@operator(
    "(Tensor d_out, Tensor d_hn, Tensor w_hh, Tensor hs, bool relu, Tensor? batch_sizes) -> (Tensor, Tensor)",
    _fake_reverse,
)
def rnn_reverse(
    d_out: Tensor, d_hn: Tensor, w_hh: Tensor, hs: Tensor, relu: bool, batch_sizes: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of the pre-activations (T, B, H) and of h0; the loop multiplies local derivatives in place."""
    h_after = hs[1:]
    steps, batch, _ = h_after.shape
    dz = (h_after > 0).to(hs.dtype) if relu else 1 - h_after.square()
    if batch_sizes is not None:
        dz.mul_(mask_of(batch_sizes, batch, hs.device).unsqueeze(-1))
    live = live_rows(batch_sizes, steps, batch)
    dh = d_hn.to(hs.dtype, copy=True)
    z, incoming = by_step(dz, live), by_step(d_out, live)
    for t in reversed(range(steps)):
        h = dh if live[t] == batch else dh[: live[t]]
        torch.mm(z[t].mul_(h.add_(incoming[t])), w_hh, out=h)
    return dz, dh


class _Adjoint(torch.autograd.Function):
    """What the loop found, as a function of the products and the initial state; the backward runs it in reverse."""

    @staticmethod
    def forward(
        ctx: Any,
        line: Tensor,
        zx: Tensor,
        zh: Tensor,
        h0: Tensor,
        w_hh: Tensor,
        hs: Tensor,
        relu: bool,
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(line, w_hh, hs, batch_sizes)
        ctx.relu = relu
        return shown(hs), hs[-1].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        line, w_hh, hs, batch_sizes = ctx.saved_tensors
        found = rnn_reverse(*gradients, w_hh, hs, ctx.relu, batch_sizes)
        dz, dh = once(line, tuple(found))
        return None, dz, dz, dh, *(None,) * 4


def rnn_adjoint(zx: Tensor, zh: Tensor, h0: Tensor, *known: Any) -> tuple[Tensor, ...]:
    """Outputs (T, B, H) and last h; gradients reach the products zx and zh and h0.

    known: w_hh detached, hs of :func:`rnn_loop`, whether the activation is relu, and the batch sizes or ``None``.
    """
    result: tuple[Tensor, ...] = _Adjoint.apply(thread(zx, zh, h0), zx, zh, h0, *known)
    return result


SUMMANDS[rnn_adjoint] = (0, 1)
