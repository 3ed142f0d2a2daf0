"""The abstract loss: one scheme for every loss whose Hessian is block diagonal over its terms.

A loss is a sum of *terms*; a term reads K outputs (the C logits of one position; one number of an
elementwise loss) and its Hessian is ``weight * unit``: ``unit`` depends on the outputs alone, ``weight``
on targets, masks and options. Each loss brings its outputs to the shape (N, P, K), N = dimension 0 and
P = terms in one row of it, and says what weight and unit are; samples, exact columns, signed columns and
products then follow here, once.

Conventions: Hessians, samples and columns are those of the SUM over terms (divide by ``count`` for the
mean). Results have the shape and dtype of ``outputs``, are computed in float32 or wider, and carry no
autograd graph. A term of weight 0 gives exact zeros, even where its outputs are not finite; elsewhere a
NaN output gives NaN in its own term, never an exception: the caller's finite check judges.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxcurv import sampling
from fxcurv.errors import FxcurvError

REDUCTIONS = ("mean", "sum", "batchmean")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which outputs of ``dtype`` are computed with: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def weight_tensor(owner: str, name: str, value: Tensor | Sequence[float] | float | None) -> Tensor | None:
    """``value`` as a private tensor; raises :class:`FxcurvError` on a negative entry (the curvature would be, too)."""
    if value is None:
        return None
    dtype = value.dtype if isinstance(value, Tensor) and value.is_floating_point() else torch.float64
    tensor = torch.as_tensor(value, dtype=dtype).detach().clone()
    if not bool((tensor >= 0).all()):
        raise FxcurvError(f"{owner}({name}=...) has a negative or NaN entry; curvature needs weights of 0 or more.")
    return tensor


def expand_mask(mask: Tensor | None, shape: Sequence[int], outputs: Tensor) -> Tensor:
    """``mask`` broadcast to the loss terms' ``shape``, all true for ``None``; raises :class:`FxcurvError`."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=outputs.device)
    if mask.dtype != torch.bool:
        raise FxcurvError(f"mask= is {mask.dtype}; pass a boolean tensor that is True on the loss terms that count.")
    try:
        return mask.to(outputs.device).expand(tuple(shape))
    except RuntimeError:
        raise FxcurvError(
            f"mask= has shape {tuple(mask.shape)}, which does not broadcast to the loss terms' {tuple(shape)}; "
            "pass one boolean per term."
        ) from None


@dataclasses.dataclass(frozen=True, eq=False)
class Loss(ABC):
    """Abstract: a scalar loss with known curvature in the outputs.

    reduction: how terms become the user's scalar. "sum"; "mean", the sum divided by the number of terms;
        "batchmean", the sum divided by the size of dimension 0 of the outputs (nats per image, say).
    """

    reduction: str = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise FxcurvError(
                f"{type(self).__name__}(reduction={self.reduction!r}) has no scalar with a known count; "
                f"use one of {', '.join(REDUCTIONS)}."
            )

    # Weights are tensors, which have no usable == and hash; compare their values.
    def _identity(self) -> tuple[object, ...]:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return (type(self), *(str(v.double().tolist()) if isinstance(v, Tensor) else v for v in values))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Loss) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    # What a loss says about itself.
    @property
    def link(self) -> str:
        """Name of the function f of the outputs with gradient f(outputs) - targets in each term, up to its weight."""
        return "identity"

    @property
    @abstractmethod
    def needs_targets(self) -> bool:
        """Whether terms are weighted or dropped by their target, so that curvature needs ``targets`` (or ``mask``)."""

    @abstractmethod
    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The user's scalar, differentiable, equal to torch's functional loss with these options.

        Half-precision outputs are widened first, as autocast does; the scalar stays float32 then.
        """

    @abstractmethod
    def _count(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        """The divisor of reduction "mean", 0-dim."""

    @abstractmethod
    def _sizes(self, outputs: Tensor) -> tuple[int, int, int]:
        """(N, P, K) of ``outputs``; raises :class:`FxcurvError` on a layout the loss does not have."""

    @abstractmethod
    def _split(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like the outputs as (N, P, K)."""

    @abstractmethod
    def _join(self, terms: Tensor, outputs: Tensor) -> Tensor:
        """Inverse of ``_split``, in the shape and dtype of ``outputs``."""

    @abstractmethod
    def _weights(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        """Weight of every term, (N, P, 1), in the wide dtype; raises :class:`FxcurvError` without needed targets."""

    @abstractmethod
    def _moments(self, terms: Tensor) -> Tensor:
        """What units are made of, (N, P, K): the probabilities, or the second derivative."""

    @abstractmethod
    def _product(self, moments: Tensor, vector: Tensor) -> Tensor:
        """Unit Hessian times ``vector``, (N, P, K)."""

    @abstractmethod
    def _column(self, moments: Tensor, index: int) -> Tensor:
        """Column ``index`` < K of a square root of the unit Hessian, shaped like ``moments``."""

    @abstractmethod
    def _draw(self, terms: Tensor, key: Sequence[int], first_row: int) -> Tensor:
        """A random (N, P, K), independent over terms, of mean 0 and second moment the unit Hessian."""

    # What follows from it.
    def count(self, outputs: Tensor, targets: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """N with ``value == (sum over terms) / N`` for "mean" and "batchmean"; for "sum" that of "mean".

        A 0-dim float64 tensor on the outputs' device; nothing waits for the device. Raises
        :class:`FxcurvError` when targets are needed and not given.
        """
        terms = self._count(outputs, targets, mask).double()
        return torch.full_like(terms, self._sizes(outputs)[0]) if self.reduction == "batchmean" else terms

    def count_behind(self, gradient: Tensor) -> Tensor:
        """``count`` of a model's outputs from the loss's gradient there, without targets or mask: the model may lay its
        outputs out in another way than the loss is given them."""
        return self.count(gradient)

    def sample(
        self,
        outputs: Tensor,
        key: Sequence[int],
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        first_row: int = 0,
    ) -> Tensor:
        """One Monte-Carlo factor b of the output Hessian: E[b b^T] = H, independent over terms.

        b is the gradient of the sum of -log p(y~ | outputs) with y~ drawn from the model, times the square
        root of the term's weight (Martens & Grosse 2015, section 5). The draw of a term depends on ``key``,
        on its row (dimension 0, counted from ``first_row``) and its place in the row only.
        """
        weights = self._weights(outputs, targets, mask)
        return self._join(_scale(self._draw(self._terms(outputs), key, first_row), weights.sqrt()), outputs)

    def column_count(self, outputs: Tensor, examples: int | None = None) -> int:
        """Number of tensors that :meth:`columns` yields: outputs per example."""
        rows, places, features = self._sizes(outputs)
        return self._rows_per_example(rows, examples) * places * features

    def columns(
        self,
        outputs: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        examples: int | None = None,
    ) -> Iterator[Tensor]:
        """Exact factor: the sum of b b^T over the yielded b is the output Hessian of every example.

        One b holds one column of one term *in each example*; two terms of an example never share a b, or
        their cross products would enter wherever the network mixes positions (attention).
        examples: number of examples when dimension 0 is examples * positions, batch-major, as after
            ``logits.view(B * T, V)``; default: every row is an example. Raises :class:`FxcurvError` when it
            does not divide dimension 0.
        """
        rows, places, features = self._sizes(outputs)
        per_example = self._rows_per_example(rows, examples)
        roots = self._weights(outputs, targets, mask).sqrt()
        moments = self._moments(self._terms(outputs))

        def emit() -> Iterator[Tensor]:
            for start in range(per_example):
                for place in range(places):
                    at = (slice(start, None, per_example), slice(place, place + 1))
                    for index in range(features):
                        column = torch.zeros_like(moments)
                        column[at] = _scale(self._column(moments[at], index), roots[at])
                        yield self._join(column, outputs)

        return emit()

    def sign_columns(
        self,
        outputs: Tensor,
        key: Sequence[int],
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        first_row: int = 0,
    ) -> Iterator[Tensor]:
        """Unbiased factor: K tensors b with E[sum of b b^T] = H.

        The columns of all terms at once, each term times its own independent random sign, so that cross
        products vanish on average. An elementwise loss has K = 1: one tensor with a sign per element.
        Rows and ``key`` as in :meth:`sample`.
        """
        rows, places, features = self._sizes(outputs)
        roots = self._weights(outputs, targets, mask).sqrt()
        moments = self._moments(self._terms(outputs))
        signs = sampling.signs(
            key, rows, places, first_row=first_row, device=moments.device, dtype=moments.dtype
        ).unsqueeze(-1)

        def emit() -> Iterator[Tensor]:
            for index in range(features):
                yield self._join(_scale(self._column(moments, index), roots) * signs, outputs)

        return emit()

    def hessian_product(
        self, outputs: Tensor, u: Tensor, targets: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Output Hessian of the sum over terms, times ``u``; raises :class:`FxcurvError` unless shaped alike."""
        if u.shape != outputs.shape:
            raise FxcurvError(
                f"u has shape {tuple(u.shape)} but the outputs have {tuple(outputs.shape)}; give both the same shape."
            )
        weights = self._weights(outputs, targets, mask)
        moments = self._moments(self._terms(outputs))
        vector = self._split(u.detach()).to(moments.dtype)
        return self._join(_scale(self._product(moments, vector), weights), outputs)

    def _terms(self, outputs: Tensor) -> Tensor:
        return self._split(outputs.detach()).to(wide(outputs.dtype))

    def _rows_per_example(self, rows: int, examples: int | None) -> int:
        if examples is None or examples == rows:
            return 1
        if examples < 1 or rows % examples:
            raise FxcurvError(
                f"dimension 0 of the outputs has {rows} rows, which are not examples={examples} times a number of "
                "positions; pass the number of examples that were flattened into it."
            )
        return rows // examples


def _scale(terms: Tensor, weights: Tensor) -> Tensor:
    """``terms * weights`` with exact zeros where the weight is 0, whatever the outputs are there."""
    return torch.where(weights == 0, torch.zeros_like(terms), terms * weights)
