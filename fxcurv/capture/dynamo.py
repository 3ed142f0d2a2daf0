"""The ``dynamo`` front-end: ``torch.compile``'s tracer, which reads the user's bytecode and runs what it cannot trace.

A forward that fits into one graph becomes an ordinary capture. One that does not (a branch on data, ``.item()``, code
outside of torch, an attribute that it changes) is captured in pieces, see :mod:`fxcurv.capture.dynamo_stitched`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxcurv.capture.call import Call
from fxcurv.capture.captured import Captured
from fxcurv.capture.dynamo_graph import Piece, add_constant, named_tensors, paths_of
from fxcurv.capture.dynamo_stitched import Stitched
from fxcurv.capture.explain import explain
from fxcurv.capture.quiet import quiet
from fxcurv.capture.runner import Runner
from fxcurv.capture.sizes import fresh_leaves, open_sizes
from fxcurv.capture.state import Snapshot, preserved, reseed
from fxcurv.capture.structure import flatten_output
from fxcurv.errors import FxcurvError

_RUNS = 6  # of a forward in pieces: the later ones for branches that depend on chance, such as a layer that is dropped
_OPEN = (0, 1)  # dimensions of the inputs that stay open if they can: batch and sequence


def capture_dynamo(model: nn.Module, call: Call) -> Captured:
    """Capture ``model`` for calls with the signature ``call``, as one graph or in pieces.

    Raises FxcurvError when the call has no real tensors, or when Dynamo finds no graph in the forward.
    """
    if not call.real:
        raise FxcurvError("the dynamo front-end needs example inputs; pass example_inputs=(x, ...).")
    with quiet():
        try:
            found = _whole(model, call)
            return _pieces(model, call) if found is None else found
        except FxcurvError:
            raise
        except Exception as error:
            raise explain(error, "dynamo") from error


class _Split(Exception):
    """The forward is more than its one graph."""


def _whole(model: nn.Module, call: Call) -> Captured | None:
    """The forward as one graph; ``None`` when it is none."""
    stitched = Stitched(call, whole=True)
    results: list[Any] = []

    def run(captured: Captured, inputs: Sequence[Any]) -> Any:
        results.append(Runner(captured)(model, *inputs))
        return results[-1]

    leaves = _open(call.leaves)
    with preserved(model) as snapshot:
        tensors, buffers = named_tensors(model), dict(model.named_buffers())
        try:
            output = stitched(run, model, leaves)
            if len(stitched.pieces) != 1 or len(results) != 1:
                return None
            return _single(model, call, stitched.pieces[0], leaves, results[0], output, (tensors, buffers, snapshot))
        except Exception:  # Dynamo's own, and whatever the forward meets only while it is traced: try it in pieces
            return None


def _single(
    model: nn.Module,
    call: Call,
    piece: Piece,
    leaves: Sequence[torch.Tensor],
    results: Sequence[Any],
    output: Any,
    state: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Snapshot],
) -> Captured:
    """An ordinary capture from the only piece: the call's leaves as placeholders, the user's structure around."""
    tensors, buffers, snapshot = state
    paths = paths_of(tensors)
    if snapshot.changes():
        raise _Split
    source, graph, constants = piece.captured.graph, fx.Graph(), dict(piece.captured.constants)
    inputs = [graph.placeholder(name) for name in call.names]
    values: dict[fx.Node, Any] = {}
    fakes = dict(zip(map(id, piece.sources), piece.fakes, strict=True))
    taken = {name for name, _ in model.named_children()} | set(vars(model))
    places = [node for node in source.nodes if node.op == "placeholder"]
    for node, given, fake in zip(places, piece.sources, piece.fakes, strict=True):
        leaf = next((k for k, known in enumerate(leaves) if known is given), None)
        if leaf is not None:
            values[node] = inputs[leaf]
            inputs[leaf].meta.update(node.meta)
        elif isinstance(given, torch.Tensor):
            values[node] = graph.get_attr(add_constant(constants, given, taken))
        else:
            values[node] = _size(graph, fake, leaves, fakes, inputs)
    returned = graph.graph_copy(source, values)
    nodes: dict[int, Any] = {id(value): node for value, node in zip(results, returned, strict=True)}  # type: ignore[arg-type]
    nodes.update({id(leaf): node for leaf, node in zip(leaves, inputs, strict=True)})
    now = dict(model.named_buffers())
    for name, old in buffers.items():
        if now.get(name, old) is not old:  # the forward has bound the buffer to a new tensor
            if now[name].shape != old.shape:
                raise _Split  # only the forward itself can do that again
            kept = graph.call_method("detach", (_node(graph, nodes, paths, now[name]),))
            graph.call_method("copy_", (graph.get_attr(name), kept))
    flat, structure = flatten_output(output, lambda value: isinstance(value, torch.Tensor))
    graph.output([_node(graph, nodes, paths, value) for value in flat])
    sizes, guard = open_sizes([fakes.get(id(leaf)) for leaf in leaves], [leaf.dim() for leaf in leaves])
    return Captured(graph, "dynamo", constants, structure, piece.captured.notes, sizes, guard)


def _node(graph: fx.Graph, nodes: dict[int, Any], paths: dict[int, str], value: torch.Tensor) -> fx.Node:
    node = nodes.get(id(value))
    if node is None and id(value) in paths:
        node = nodes[id(value)] = graph.get_attr(paths[id(value)])
    if not isinstance(node, fx.Node):
        raise _Split
    return node


def _size(
    graph: fx.Graph, fake: Any, leaves: Sequence[torch.Tensor], fakes: dict[int, Any], inputs: list[fx.Node]
) -> fx.Node:
    """The node for a size of an input, which Dynamo passes as an argument of its own."""
    if isinstance(fake, torch.SymInt):
        for leaf, node in zip(leaves, inputs, strict=True):
            for dim, size in enumerate(fakes[id(leaf)].shape if id(leaf) in fakes else ()):
                if isinstance(size, torch.SymInt) and size.node.expr == fake.node.expr:
                    return graph.call_method("size", (node, dim))
    raise _Split


def _pieces(model: nn.Module, call: Call) -> Captured:
    stitched = Stitched(call)
    pieces: dict[int, Captured] = {}

    def run(part: Captured, inputs: Sequence[Any]) -> Any:
        pieces[id(part)] = part
        return Runner(part)(model, *inputs)

    for k in range(_RUNS):
        with preserved(model):
            if k > 1:
                reseed(k)
            stitched(run, model, fresh_leaves(call.leaves) if k else _open(call.leaves))
        if k == 0:
            pieces.clear()  # some graphs are traced anew on a second call, and those of the first are not run again
        elif _read(pieces.values()) >= {name for name, p in model.named_parameters() if p.requires_grad}:
            break
    if not pieces:
        raise FxcurvError(
            f"the dynamo front-end finds no graph in the forward of {type(model).__name__}: all of it runs as plain "
            "Python; move conversions to NumPy, locks and the like out of the forward."
        )
    found = [piece for piece in stitched.pieces if id(piece.captured) in pieces]
    notes = [f"graph break at {piece.reason}" for piece in found if piece.reason]
    notes += [note for piece in found for note in piece.captured.notes]
    parts = tuple(piece.captured for piece in found)
    return Captured(parts[0].graph, "dynamo", notes=tuple(dict.fromkeys(notes)), pieces=parts, stitched=stitched)


def _read(pieces: Iterable[Captured]) -> set[str]:
    """What the graphs read of the model."""
    return {str(node.target) for piece in pieces for node in piece.graph.nodes if node.op == "get_attr"}


def _open(leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fresh leaves with open batch and sequence dimensions."""
    fresh = fresh_leaves(leaves)
    for leaf in fresh:
        for dim in _OPEN:
            if dim < leaf.dim() and leaf.layout is torch.strided:
                torch._dynamo.maybe_mark_dynamic(leaf, dim)
    return fresh
