"""The GRU over time: the loop, its reverse, and the adjoint node between them.

Gates are stacked r, z, n as in torch: n = tanh(x_n + r h_n), h' = n + z (h - n), with r outside the hidden product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcurv.layers.recurrence.operators import by_step, live_rows, mask_of, operator
from fxcurv.layers.recurrence.products import once, thread
from fxcurv.layers.recurrence.sequence import shown

aten = torch.ops.aten


def _fake_loop(zx: Tensor, h0: Tensor, w_hh: Tensor, b_hh: Any, sizes: Any) -> tuple[Tensor, ...]:
    steps, batch, width = zx.shape
    return zx.new_empty(zx.shape), zx.new_empty(steps + 1, batch, width // 3), zx.new_empty(zx.shape)


@operator(
    "(Tensor zx, Tensor h0, Tensor w_hh, Tensor? b_hh, Tensor? batch_sizes) -> (Tensor, Tensor, Tensor)", _fake_loop
)
def gru_loop(
    zx: Tensor, h0: Tensor, w_hh: Tensor, b_hh: Tensor | None, batch_sizes: Tensor | None
) -> tuple[Tensor, ...]:
    """From input products (T, B, 3H) and h0 (B, H): hidden products (T, B, 3H), h (T + 1, B, H), gates (T, B, 3H).

    Steps that do not exist are zero; h keeps there the last value that exists.
    """
    steps, batch, width = zx.shape
    size = width // 3
    made = zx.new_empty if batch_sizes is None else zx.new_zeros
    products, gates, hs = made(zx.shape), made(zx.shape), zx.new_empty(steps + 1, batch, size)
    hs[0] = h0
    live = live_rows(batch_sizes, steps, batch)
    weight = w_hh.t().contiguous()  # read T times by a product that is faster on this layout
    product = by_step(products, live)
    (xs, xn), (ps, pn), (sigmoids, n_gate) = (
        [by_step(part, live) for part in tensor.split((2 * size, size), -1)] for tensor in (zx, products, gates)
    )
    r, z = (by_step(part, live) for part in gates.chunk(3, -1)[:2])
    for t, n in enumerate(live):
        h = hs[t, :n]
        if b_hh is None:
            torch.mm(h, weight, out=product[t])
        else:
            torch.addmm(b_hh, h, weight, out=product[t])
        torch.add(xs[t], ps[t], out=sigmoids[t]).sigmoid_()
        torch.addcmul(xn[t], r[t], pn[t], out=n_gate[t]).tanh_()
        torch.lerp(n_gate[t], h, z[t], out=hs[t + 1, :n])
        if n < batch:
            hs[t + 1, n:] = hs[t, n:]
    return products, hs, gates


def _fake_reverse(d_out: Tensor, d_hn: Tensor, w_hh: Tensor, gates: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return gates.new_empty(gates.shape), gates.new_empty(gates.shape), torch.empty_like(d_hn)


@operator(
    "(Tensor d_out, Tensor d_hn, Tensor w_hh, Tensor gates, Tensor hs, Tensor products, Tensor? batch_sizes)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_reverse,
)
def gru_reverse(
    d_out: Tensor,
    d_hn: Tensor,
    w_hh: Tensor,
    gates: Tensor,
    hs: Tensor,
    products: Tensor,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of the input products and of the hidden products, both (T, B, 3H), and of h0.

    They differ in the n gate alone. The buffers are filled with the local derivatives of all steps at once; the loop
    multiplies them in place by the gradient of h.
    """
    steps, batch, width = gates.shape
    size = width // 3
    r, z, n_gate = gates.chunk(3, -1)
    d_zx, d_zh = torch.empty_like(gates), torch.empty_like(gates)
    (dr, dz, dn), new = d_zh.chunk(3, -1), d_zx[..., 2 * size :]
    aten.tanh_backward.grad_input(1 - z, n_gate, grad_input=new)
    if batch_sizes is not None:
        new.mul_(mask_of(batch_sizes, batch, gates.device).unsqueeze(-1))
    aten.sigmoid_backward.grad_input(new * products[..., 2 * size :], r, grad_input=dr)
    aten.sigmoid_backward.grad_input(hs[:-1] - n_gate, z, grad_input=dz)
    torch.mul(new, r, out=dn)
    live = live_rows(batch_sizes, steps, batch)
    dh = d_hn.to(gates.dtype, copy=True)
    hidden, by_gate = by_step(d_zh, live), by_step(d_zh.unflatten(-1, (3, size)), live)
    candidate, keep, incoming = by_step(new, live), by_step(z, live), by_step(d_out, live)
    for t in reversed(range(steps)):
        h = dh if live[t] == batch else dh[: live[t]]
        h.add_(incoming[t])
        by_gate[t].mul_(h.unsqueeze(1))
        candidate[t].mul_(h)
        h.mul_(keep[t]).addmm_(hidden[t], w_hh)
    d_zx[..., : 2 * size] = d_zh[..., : 2 * size]
    return d_zx, d_zh, dh


class _Adjoint(torch.autograd.Function):
    """What the loop found, as a function of the products and the initial state; the backward runs it in reverse."""

    @staticmethod
    def forward(
        ctx: Any, line: Tensor, zx: Tensor, zh: Tensor, h0: Tensor, *known: Tensor | None
    ) -> tuple[Tensor, ...]:
        w_hh, hs, gates, products, batch_sizes = known
        assert hs is not None
        ctx.save_for_backward(line, w_hh, gates, hs, products, batch_sizes)
        return shown(hs), hs[-1].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        line, *known = ctx.saved_tensors
        return (None, *once(line, tuple(gru_reverse(*gradients, *known))), *(None,) * 5)


def gru_adjoint(zx: Tensor, zh: Tensor, h0: Tensor, *known: Any) -> tuple[Tensor, ...]:
    """Outputs (T, B, H) and last h; gradients reach the products zx and zh and h0.

    known: w_hh detached, then hs, gates and hidden products of :func:`gru_loop` and the batch sizes or ``None``.
    """
    result: tuple[Tensor, ...] = _Adjoint.apply(thread(zx, zh, h0), zx, zh, h0, *known)
    return result
