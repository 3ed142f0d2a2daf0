"""Estimates: what one batch says about the curvature of a layer (sheet kronecker-1, conventions and weight sharing)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcurv.ir.program import Builder
from fxcurv.methods.dense import full, kron
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Estimate, curvature_weight, flag


def shared_rows(b: Builder, facts: Facts, target: Target, side: str, alone: bool = True) -> fx.Node:
    """Rows of a side in the chosen flavour of weight sharing.

    "expand" lets every position act as an example. "reduce" takes the mean input and the summed output gradient over
    the positions of an example (Eschenhagen et al., 2023). alone: see :meth:`Target.rows`.
    """
    rows = target.rows(b, side, alone)
    if facts.sharing == "expand" or target.diagonal_input:
        return rows
    return b.mean_positions(rows) if side[0] == "a" else b.sum_positions(rows)


def moment(b: Builder, facts: Facts, rows: fx.Node, size: int, diagonal: bool = False) -> fx.Node:
    """Sum of outer products of rows; only its diagonal where asked for, or where the factor would be too wide."""
    return b.diag_gram(rows) if diagonal or size > facts.max_factor_dim else b.gram(rows)


def input_factor(b: Builder, facts: Facts, target: Target, rows: fx.Node | None = None) -> fx.Node:
    """A = mean over ``rows``, all by default, of a a^T, Psd[groups; d_in] (or its diagonal)."""
    rows = shared_rows(b, facts, target, "a") if rows is None else rows
    total = moment(b, facts, rows, target.d_in, target.diagonal_input)
    return b.mean(total, b.count(rows))


def output_factor(b: Builder, facts: Facts, target: Target) -> fx.Node:
    """G = curvature-weighted sum over rows of g g^T, Psd[groups; d_out] (or its diagonal)."""
    rows = shared_rows(b, facts, target, "g")
    return b.scale(moment(b, facts, rows, target.d_out), curvature_weight(b, facts))


@dataclass(frozen=True)
class Kron(Estimate):
    """K-FAC: kron(G, A) for every layer (Martens & Grosse 2015; convolutions Grosse & Martens 2016).

    A weight that is both an embedding and an output projection has two Kronecker terms, kron(G, A) of the projection
    and kron(H, C) of the embedding, H the token frequencies and C the Gram of the embedding's output gradients. They
    are merged with a matched trace: kron(G, A + (tr H / tr G) C).
    """

    def rows_a(self, b: Builder, facts: Facts, target: Target) -> fx.Node:
        """The rows that A is the mean over."""
        return shared_rows(b, facts, target, "a")

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        inputs = input_factor(b, facts, target, self.rows_a(b, facts, target))
        outputs = output_factor(b, facts, target)
        if target.swapped:
            tokens = target.rows(b, "a2")
            frequency = b.mean(b.diag_gram(tokens), b.count(tokens))
            gram = moment(b, facts, target.rows(b, "g2"), target.d_in)
            if target.homogeneous:  # the embedding has no constant coordinate
                gram = b.border(gram)
            term = b.scale(gram, curvature_weight(b, facts))
            ratio = b.safe_ratio(b.mean_diagonal(frequency, True), b.mean_diagonal(outputs, *flag(outputs)))
            inputs = b.add(inputs, b.scale(term, ratio))
        return {"A": inputs, "G": outputs}

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        return kron(*(full(parts[side], parts[side].shape[-1]) for side in ("G", "A")))


@dataclass(frozen=True)
class InputGram(Estimate):
    """FOOF: the input factor alone (Benzing 2022)."""

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        return {"A": input_factor(b, facts, target)}

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        factor, (_, d_out, d_in, _) = full(parts["A"], parts["A"].shape[-1]), parts["shape"].tolist()
        identity = torch.eye(d_out, dtype=factor.dtype, device=factor.device)
        return kron(identity.expand(*factor.shape[:-2], d_out, d_out), factor.reshape(*factor.shape[:-2], d_in, d_in))


@dataclass(frozen=True)
class Diagonal(Estimate):
    """The diagonal of the Fisher: mean over examples of the squared gradient of each example, Mat[groups; d_out, d_in].

    Positions of one use are summed before the square; several uses of a weight count as several examples.
    """

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        squares = b.grad_square(target.rows(b, "a"), target.rows(b, "g"))
        return {"D": b.scale(squares, curvature_weight(b, facts))}

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        return torch.diag_embed(parts["D"].flatten(-2))
