"""Products over all time steps: their form and their two spellings.

Data is time-major, (T, B, d), since the loop runs over time; the form reads the sequence as example and time as
position, so that ``sharing`` and statistics between neighbouring steps see the axes that they mean. Rows are in time
order (in the order of processing for the backward direction of a bidirectional network). Where sequences have different
lengths an auxiliary mask (T, B) takes the steps that do not exist out of the rows, constant coordinate included; their
output gradients are zero already, because the adjoint never reaches them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.layers.blocks import BlockForm
from fxcurv.layers.form import Form
from fxcurv.layers.linear import LinearForm, linear_form
from fxcurv.layers.spelling import Match, Site, spelling
from fxcurv.layers.tap import reduction


@dataclass(frozen=True)
class SequenceForm(LinearForm):
    """``x @ W.T`` on (T, B, inputs): b is dimension 1 and s, time, dimension 0."""

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.rows_a`; x (T, B, inputs); aux: nothing, or the mask (T, B) of existing steps."""
        rows = self._augment(x.transpose(0, 1).unsqueeze(2))
        return rows * aux[0].t()[..., None, None] if aux else rows

    def rows_g(self, g: Tensor) -> Tensor:
        """See :meth:`Form.rows_g`; g (T, B, d_out)."""
        return g.transpose(0, 1).unsqueeze(2)

    def loose_rows_a(self, x: Tensor, *aux: Tensor) -> Tensor | None:
        """See :meth:`Form.loose_rows_a`: in the order in which they lie in memory."""
        return None if aux or self.scale != 1.0 else x.unsqueeze(2)

    def loose_rows_g(self, g: Tensor) -> Tensor | None:
        """See :meth:`Form.loose_rows_g`; steps that do not exist are zero."""
        return g.unsqueeze(2)

    @property
    def tag(self) -> str:
        """See :attr:`Form.tag`."""
        return "time" + self._constant


def is_sequence(form: Form) -> bool:
    """Whether a form, or the whole of which it is a block of outputs, is a :class:`SequenceForm`."""
    return isinstance(form.inner if isinstance(form, BlockForm) else form, SequenceForm)


def sequence_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The product of every step, (T, B, d_in) to (T, B, d_out); ``mask`` is for the form alone."""
    return F.linear(x, weight, bias)


def known_linear(x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same product where the time loop has found its ``value``.

    Its backward gives the gradients of weight and bias and none to x, whose gradient is the adjoint's business.
    """
    result: Tensor = _Known.apply(x, weight, bias, value)
    return result


class _Known(torch.autograd.Function):
    """The product with a value given in advance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return value.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        rows = g.reshape(-1, g.shape[-1])
        weight = bias = None
        if ctx.needs_input_grad[1]:
            weight = (rows.t() @ x.reshape(-1, x.shape[-1]).to(g.dtype)).to(of_weight)
        if ctx.needs_input_grad[2]:
            bias = rows.sum(0).to(of_bias)
        return None, weight, bias, None


class _Once(torch.autograd.Function):
    """The identity on gradients that cannot be differentiated again: the time loop keeps no graph of itself."""

    @staticmethod
    def forward(ctx: Any, thread: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.detach() for g in gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        raise FxcurvError(
            "the gradient of a recurrent layer was differentiated once more, which its rewritten time loop does not "
            "support; use model.strip() for that computation, or a cell called in a Python loop."
        )


def thread(*inputs: Tensor | None) -> Tensor:
    """An empty tensor that depends on all inputs: saved in their place, it leads a second derivative to them."""
    return torch.cat([x.reshape(-1)[:0].clone() for x in inputs if x is not None])


def once(thread: Tensor, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of an adjoint, guarded where a graph of the backward is being made."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return tuple(_Once.apply(thread, *gradients))
    return gradients


@spelling(sequence_linear)
def _sequence(at: Site, x: Any, weight: Any, bias: Any = None, mask: Any = None) -> Match:
    operand = at.weight(weight)
    plain = linear_form(operand.view, 0, 1)
    form = SequenceForm(**{item.name: getattr(plain, item.name) for item in fields(plain)})
    aux = () if mask is None else (mask,)
    return Match("recurrent", form, at.data(x), at.node, operand, at.bias(bias, form.d_out), aux)


@spelling(known_linear)
def _known(at: Site, x: Any, weight: Any, bias: Any, value: Any, mask: Any = None) -> Match:
    return _sequence(at, x, weight, bias, mask)


@reduction("gram(mean_positions(a))")
def _mean_gram(form: Form, x: Tensor, g: Tensor, aux: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> Tensor | None:
    """Gram of each sequence's mean row, where sequences differ in length: over the steps that exist."""
    if not is_sequence(form) or not aux:
        return None
    lengths = aux[0].sum(0).to(x.dtype).unsqueeze(1)
    means = form.rows_a(x, *aux).sum((1, 2)) / lengths
    return means.mT @ means
