"""Several processes that train one model: their statistics become those of one process on the global batch.

The model's gradients are averaged over ranks by ``DistributedDataParallel``, or by any other means before
``precondition_``; here the statistics follow, before the program runs, so that every decision after it (refresh,
repair, fallback) is taken on equal numbers and falls out equal. Additive statistics are summed in one flat buffer for
each dtype and device, rows that are kept are gathered in the order of the ranks, products with curvature are averaged.

Scale. The global batch is the concatenation of the ranks' batches, with N = sum of n_r loss terms. Columns of a sampled
or exact source belong to the summed loss: their statistics add up. Empirical gradients are those of the rank's own
mean, 1/n_r for every term, where one process would have 1/N: a statistic of degree k in them takes (n_r / N)^k. So
statistics are exact for batches of any sizes; gradients are what was averaged, with DistributedDataParallel an average
of equal weights, which is the global mean when the batches are equal.

Draws are a function of the global row, so each rank asks how many rows come before its own, once a backward call.
Everything a step exchanges besides goes through one short table, equal in length everywhere and marked with its
occasion: ranks that no longer do the same thing get an error instead of waiting for each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import Node

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.statistic import Call, RowsOf, StateOf, Whole, parse_statistic
from fxcurv.runtime.oracles import GGNOracle, HessianOracle
from fxcurv.runtime.statistics import OutputTap, Statistics

WORLD = "world"  # the setting that stands for torch's default group, where there is one
BUCKET = 1 << 27  # most bytes of one flat buffer
ROWS, STEP, VALUE = 1.0, 2.0, 3.0  # occasions of an exchange
COLUMNS = 8
FINE, WRONG, ABSENT = 0.0, 1.0, 2.0
AGREE = 1e-4  # relative difference that norms of the same gradients may have


@dataclass(frozen=True)
class Ranks:
    """The processes that train a model together; without a group it is one alone, and nothing is exchanged."""

    group: Any = None

    @staticmethod
    def of(setting: Any) -> Ranks:
        """The ranks of a ``process_group`` setting: a group, ``WORLD`` or ``None``."""
        if setting is None or not (dist.is_available() and dist.is_initialized()):
            return Ranks()
        group = dist.group.WORLD if setting == WORLD else setting
        return Ranks(group) if dist.get_world_size(group) > 1 else Ranks()

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Number of this process among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def exchange(self, occasion: float, numbers: Sequence[float], device: torch.device) -> list[list[float]]:
        """Every rank's ``numbers``, fewer than ``COLUMNS``, by rank.

        Raises :class:`FxcurvError` on all ranks when they are here on different occasions.
        """
        table = self._gather(torch.tensor([occasion, *numbers, *[0.0] * (COLUMNS - 1 - len(numbers))]).double(), device)
        found: list[list[float]] = table.tolist()
        if any(row[0] != occasion for row in found):
            raise FxcurvError(
                "the ranks do different things: each must call model.backward equally often before a step, with an "
                "empty batch where it has no data, and evaluate a closure as often as the others."
            )
        return [row[1 : 1 + len(numbers)] for row in found]

    def agree(
        self, check: Callable[[], float | None], state: Sequence[float], norm: float, device: torch.device
    ) -> list[float] | None:
        """The loss terms of every rank, 0 where nothing arrived; ``None`` when nothing arrived anywhere.

        check: the terms of this rank, or ``None``. state: what must be equal on all ranks. norm: that of the gradients.

        Raises :class:`FxcurvError` on all ranks when ``check`` does on one, or the ranks differ.
        """
        status, terms, problem = FINE, 0.0, None
        try:
            found = check()
            status, terms = (ABSENT, 0.0) if found is None else (FINE, found)
        except FxcurvError as error:
            status, problem = WRONG, error
        table = self.exchange(STEP, [status, terms, norm, *state], device)
        if problem is not None:
            raise problem
        for rank, (theirs, _, theirs_norm, *theirs_state) in enumerate(table):
            if theirs == WRONG:
                raise FxcurvError(f"rank {rank} cannot take this step and says why; no rank has changed anything.")
            if theirs_state != table[0][3:]:
                raise FxcurvError(
                    f"rank {rank} is in another state than rank 0 (step, seed or what is due): load the same state "
                    "dict and call model.due alike on all ranks."
                )
            if abs(theirs_norm - table[0][2]) > AGREE * abs(table[0][2]):
                raise FxcurvError(
                    f"the gradients of rank {rank} are not those of rank 0: train "
                    "DistributedDataParallel(model), average p.grad over the ranks before the step, or set "
                    "model.process_group = None to train every rank by itself."
                )
        if all(row[0] == ABSENT for row in table):
            return None
        return [row[1] for row in table]

    def first_row(self, rows: int, device: torch.device) -> int:
        """Number of rows that the earlier ranks have in this backward call."""
        if self.size == 1:
            return 0
        return int(sum(count for (count,) in self.exchange(ROWS, [float(rows)], device)[: self.rank]))

    def mean(self, value: float, device: torch.device) -> float:
        """The average of a number over the ranks."""
        if self.size == 1:
            return value
        return sum(number for (number,) in self.exchange(VALUE, [value], device)) / self.size

    def total(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums over ranks of tensors that every rank has under the same keys, in the same order."""
        found: dict[str, Tensor] = {}
        for keys in buckets(tensors):
            flat = torch.cat([tensors[key].reshape(-1) for key in keys])
            dist.all_reduce(flat, group=self.group)
            pieces = flat.split([tensors[key].numel() for key in keys])
            found |= {key: piece.view(tensors[key].shape) for key, piece in zip(keys, pieces, strict=True)}
        return found

    def concatenation(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Rows (b, s, ...) of all ranks below each other, in the order of the ranks; b may differ.

        Raises :class:`FxcurvError` on all ranks when rows under one key have different numbers of positions s.
        """
        if not tensors:
            return {}
        sizes = torch.tensor([list(rows.shape[:2]) for rows in tensors.values()], dtype=torch.int64)
        by_rank: list[list[list[int]]] = self._gather(sizes, device).tolist()
        found: dict[str, Tensor] = {}
        for index, (key, rows) in enumerate(tensors.items()):
            counts = [table[index][0] for table in by_rank]
            positions = sorted({s for b, s in (table[index] for table in by_rank) if b})
            if len(positions) > 1:
                raise FxcurvError(
                    f"the rows '{key}' have {' and '.join(map(str, positions))} positions on different ranks, so they "
                    "cannot be kept side by side; leave the pass 'sink' on, or pad the batches alike."
                )
            shape = (max(counts), *positions, *rows.shape[2:]) if positions else tuple(rows.shape)
            padded = rows.new_zeros(shape)
            if rows.shape[0]:
                padded[: rows.shape[0]] = rows
            parts = self._gather(padded, rows.device)
            found[key] = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return found

    def _gather(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Tensors of one shape from every rank, stacked."""
        mine = tensor.to(device).contiguous()
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, self.group)
        return torch.stack(found)


def buckets(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Keys whose tensors share a buffer: of one dtype and device, and of at most ``BUCKET`` bytes together."""
    kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for key, tensor in tensors.items():
        kinds.setdefault((tensor.dtype, tensor.device), []).append(key)
    for keys in kinds.values():
        part: list[str] = []
        size = 0
        for key in keys:
            nbytes = tensors[key].numel() * tensors[key].element_size()
            if part and size + nbytes > BUCKET:
                yield part
                part, size = [], 0
            part.append(key)
            size += nbytes
        yield part


def reduced(ranks: Ranks, statistics: Statistics, terms: Sequence[float], own_means: bool, device: Any) -> Statistics:
    """The statistics of all ranks together; what each of them has is left as it is.

    terms: loss terms by rank. own_means: the gradients behind them are those of each rank's own mean. device: function
    from a statistic's key to its device. Raises :class:`FxcurvError` when kept rows do not fit.
    """
    whole = Statistics(statistics.types)
    whole.terms, whole.collected = math.fsum(terms), True
    share = terms[ranks.rank] / whole.terms if own_means and whole.terms else 1.0
    sums: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for key in statistics.types:
        expression = parse_statistic(key)
        value = statistics.value(key, device(key))
        if share != 1.0:
            value = value * share ** degree(expression)
        (rows if isinstance(expression, RowsOf) else sums)[key] = value
    whole.sums = ranks.total(sums)
    whole.rows = {key: [value] for key, value in ranks.concatenation(rows, device("")).items()}
    return whole


def degree(expression: Call | RowsOf | StateOf | Whole | None) -> int:
    """The power with which a statistic grows with the output gradients: 2 for a Gram of them, 0 for a count."""
    if isinstance(expression, RowsOf):
        return int(expression.side[0] == "g")
    if isinstance(expression, Call):
        degrees = [degree(x) for x in expression.operands]
        return sum(d * power(expression.op, i) for i, d in enumerate(degrees) if d)
    return 0


@cache
def power(name: str, operand: int) -> int:
    """p with f(.., 2 x, ..) = 2^p f(.., x, ..) for an op f in one operand, found on the op's own samples.

    Raises :class:`FxcurvError` for an op without such a p.
    """
    op, found = OPS[name], set()
    for sample in op.samples():
        twice = [2 * x if i == operand else x for i, x in enumerate(sample)]
        plain, scaled = op.reference(*sample), op.reference(*twice)
        fits = [p for p in range(5) if torch.allclose(scaled, 2**p * plain)]
        found |= {tuple(fits)} if plain.any() else set()
    common = set.intersection(*map(set, found)) if found else set()
    if len(common) != 1:
        raise FxcurvError(
            f"'{name}' is no homogeneous function of its operand {operand}, so empirical statistics of several ranks "
            "cannot be brought to one scale; use fisher='mc' or 'ggn'."
        )
    return common.pop()


@dataclass(frozen=True)
class RanksOracle:
    """Products with the curvature of all ranks together: the local products, weighted by ``share`` and summed."""

    ranks: Ranks
    local: HessianOracle | GGNOracle
    share: float

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters whose curvature it is."""
        return self.local.parameters

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The product for vectors shaped like the parameters, equal on all ranks."""
        parts = {str(i): part * self.share for i, part in enumerate(self.local.product(vectors))}
        return list(self.ranks.total(parts).values())

    def forms(self, vectors: Sequence[Sequence[Tensor]]) -> Tensor:
        """The quadratic forms of vectors that all ranks have alike, equal on all of them; of the GGN alone."""
        assert isinstance(self.local, GGNOracle)
        return self.ranks.total({"forms": self.local.forms(vectors) * self.share})["forms"]


def refuse_static_graph(outputs: Tensor) -> None:
    """Raises :class:`FxcurvError` when the outputs come from a wrapper that takes the first backward pass, here that of
    the curvature, for the one with the gradients."""
    stack: list[Node | None] = [outputs.grad_fn]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen or isinstance(node, OutputTap._backward_cls):  # type: ignore[attr-defined]
            continue
        seen.add(node)
        wrapper = getattr(node, "ddp_weakref", None)
        if wrapper is not None and wrapper().static_graph:
            raise FxcurvError(
                "DistributedDataParallel(static_graph=True) counts the curvature's backward pass as the first one: "
                "leave static_graph out, or use fisher='empirical'."
            )
        stack += [next_node for next_node, _ in node.next_functions]
