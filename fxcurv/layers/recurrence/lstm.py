"""The LSTM over time: the loop, its reverse, and the adjoint node between them.

Gates are stacked i, f, g, o as in torch: c' = f c + i g, m = o tanh(c'), h' = m, or W_hr m with a projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcurv.layers.layer import SUMMANDS
from fxcurv.layers.recurrence.operators import by_step, live_rows, operator
from fxcurv.layers.recurrence.products import once, thread
from fxcurv.layers.recurrence.sequence import shown

aten = torch.ops.aten


def _fake_loop(
    zx: Tensor, h0: Tensor, c0: Tensor, w_hh: Tensor, b_hh: Any, w_hr: Any, sizes: Any
) -> tuple[Tensor, ...]:
    steps, batch, width = zx.shape
    made = zx.new_empty
    m = (steps, batch, width // 4) if w_hr is not None else (0,)
    return (
        made(zx.shape), made(steps + 1, batch, h0.shape[1]), made(steps + 1, batch, width // 4), made(zx.shape),
        made(steps, batch, width // 4), made(m),
    )  # fmt: skip


@operator(
    "(Tensor zx, Tensor h0, Tensor c0, Tensor w_hh, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_loop,
)
def lstm_loop(
    zx: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """From input products (T, B, 4H) and initial states (B, R), (B, H), R being H without a projection:

    hidden products (T, B, 4H), h (T + 1, B, R) and c (T + 1, B, H) with the initial ones first, gates (T, B, 4H),
    tanh(c) (T, B, H), and with a projection m (T, B, H), else nothing. Steps that do not exist are zero; h and c keep
    there the last value that exists.
    """
    steps, batch, width = zx.shape
    size = width // 4
    made = zx.new_empty if batch_sizes is None else zx.new_zeros
    products, gates, tanh_c = made(zx.shape), made(zx.shape), made(steps, batch, size)
    hs, cs = zx.new_empty(steps + 1, batch, h0.shape[1]), zx.new_empty(steps + 1, batch, size)
    ms = made(steps, batch, size) if w_hr is not None else zx.new_empty(0)
    hs[0], cs[0] = h0, c0
    live = live_rows(batch_sizes, steps, batch)
    weight = w_hh.t().contiguous()  # read T times by a product that is faster on this layout
    down = None if w_hr is None else w_hr.t().contiguous()
    x, product, gate = by_step(zx, live), by_step(products, live), by_step(gates, live)
    sigmoids, (i, f, g, o) = by_step(gates[..., : 2 * size], live), (by_step(part, live) for part in gates.chunk(4, -1))
    tanh, m = by_step(tanh_c, live), by_step(hs[1:] if w_hr is None else ms, live)
    for t, n in enumerate(live):
        h, c, new = hs[t, :n], cs[t, :n], cs[t + 1, :n]
        if b_hh is None:
            torch.mm(h, weight, out=product[t])
        else:
            torch.addmm(b_hh, h, weight, out=product[t])
        torch.add(x[t], product[t], out=gate[t])
        sigmoids[t].sigmoid_()
        g[t].tanh_()
        o[t].sigmoid_()
        torch.mul(f[t], c, out=new).addcmul_(i[t], g[t])
        torch.tanh(new, out=tanh[t])
        torch.mul(o[t], tanh[t], out=m[t])
        if down is not None:
            torch.mm(m[t], down, out=hs[t + 1, :n])
        if n < batch:
            hs[t + 1, n:], cs[t + 1, n:] = hs[t, n:], cs[t, n:]
    return products, hs, cs, gates, tanh_c, ms


def _fake_reverse(
    d_out: Tensor, d_hn: Tensor, d_cn: Tensor, w_hh: Tensor, w_hr: Any, gates: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    projected = d_out.shape if w_hr is not None else (0,)
    return gates.new_empty(gates.shape), gates.new_empty(projected), torch.empty_like(d_hn), torch.empty_like(d_cn)


@operator(
    "(Tensor d_out, Tensor d_hn, Tensor d_cn, Tensor w_hh, Tensor? w_hr, Tensor gates, Tensor cs, Tensor tanh_c,"
    " Tensor? batch_sizes) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_reverse,
)
def lstm_reverse(
    d_out: Tensor,
    d_hn: Tensor,
    d_cn: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    gates: Tensor,
    cs: Tensor,
    tanh_c: Tensor,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of the gates' pre-activations (T, B, 4H), of the projected product (T, B, R) or nothing, of h0 and c0.

    The buffer of the first is filled with the local derivatives of all steps at once; the loop multiplies them in
    place.
    """
    steps, batch, size = tanh_c.shape
    i, f, g, o = gates.chunk(4, -1)
    dz = torch.empty_like(gates)
    di, df, dg, do = dz.chunk(4, -1)
    aten.sigmoid_backward.grad_input(g, i, grad_input=di)
    aten.sigmoid_backward.grad_input(cs[:-1], f, grad_input=df)
    aten.tanh_backward.grad_input(i, g, grad_input=dg)
    aten.sigmoid_backward.grad_input(tanh_c, o, grad_input=do)
    to_c = aten.tanh_backward(o, tanh_c)
    projected = gates.new_zeros(d_out.shape) if w_hr is not None else gates.new_empty(0)
    live = live_rows(batch_sizes, steps, batch)
    dh, dc = d_hn.to(gates.dtype, copy=True), d_cn.to(gates.dtype, copy=True)
    z, cell, out = by_step(dz, live), by_step(dz.unflatten(-1, (4, size))[:, :, :3], live), by_step(do, live)
    through, keep, incoming = by_step(to_c, live), by_step(f, live), by_step(d_out, live)
    for t in reversed(range(steps)):
        n = live[t]
        h, c = (dh, dc) if n == batch else (dh[:n], dc[:n])
        h.add_(incoming[t])
        m = h
        if w_hr is not None:
            projected[t, :n] = h
            m = h @ w_hr
        c.addcmul_(m, through[t])
        out[t].mul_(m)
        cell[t].mul_(c.unsqueeze(1))
        c.mul_(keep[t])
        torch.mm(z[t], w_hh, out=h)
    return dz, projected, dh, dc


class _Adjoint(torch.autograd.Function):
    """What the loop found, as a function of the products and the initial states; the backward runs it in reverse."""

    @staticmethod
    def forward(
        ctx: Any, line: Tensor, zx: Tensor, zh: Tensor, zr: Tensor | None, h0: Tensor, c0: Tensor, *known: Tensor | None
    ) -> tuple[Tensor, ...]:
        w_hh, w_hr, hs, cs, gates, tanh_c, batch_sizes = known
        assert hs is not None and cs is not None
        ctx.save_for_backward(line, w_hh, w_hr, gates, cs, tanh_c, batch_sizes)
        return shown(hs), hs[-1].clone(), cs[-1].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        line, *known = ctx.saved_tensors
        found = lstm_reverse(*gradients, *known)
        dz, dr, dh, dc = once(line, tuple(found))
        return None, dz, dz, None if known[1] is None else dr, dh, dc, *(None,) * 7


def lstm_adjoint(zx: Tensor, zh: Tensor, zr: Tensor | None, h0: Tensor, c0: Tensor, *known: Any) -> tuple[Tensor, ...]:
    """Outputs (T, B, R), last h and last c; gradients reach the products zx, zh and (projected) zr and h0, c0.

    known: w_hh and w_hr detached, then hs, cs, gates, tanh_c of :func:`lstm_loop` and the batch sizes or ``None``.
    """
    result: tuple[Tensor, ...] = _Adjoint.apply(thread(zx, zh, zr, h0, c0), zx, zh, zr, h0, c0, *known)
    return result


SUMMANDS[lstm_adjoint] = (0, 1)
