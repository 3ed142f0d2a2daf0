"""The ``export`` front-end: ``torch.export``, whose graph is ATen operations and shows through every module.

It captures what symbolic tracing cannot (functional code, transformer libraries), but bakes more: dropout and
BatchNorm modes, and every size of the example except those that export could keep open (``Captured.sizes``).
The exported program owns copies of names, not of tensors: here each becomes a path on the user's module again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, TensorArgument

from fxcurv.capture import packed
from fxcurv.capture.call import Call
from fxcurv.capture.captured import Captured, resolve
from fxcurv.capture.explain import explain
from fxcurv.capture.patches import CHECKPOINT_NOTE, inlined_checkpoint, replaced
from fxcurv.capture.quiet import quiet
from fxcurv.capture.sizes import concrete, fresh_leaves, open_sizes
from fxcurv.capture.state import Snapshot, preserved
from fxcurv.capture.structure import Structure, flatten_output
from fxcurv.errors import FxcurvError

_PREFIX = "model."
# Checks on shapes and metadata that were true of the example; ``Captured.sizes`` takes their place.
_OPEN: tuple[tuple[int, ...], ...] = ((0, 1), (0,), ())  # batch and sequence, or batch alone, or every size fixed
_ASSERTIONS = ("_assert", "sym_constrain", "_guards_fn", "is_nonzero_assert")


def capture_export(model: nn.Module, call: Call) -> Captured:
    """Export ``model`` for calls with the signature ``call``; dimensions 0 and 1 of each tensor stay open if they
    can, for batch and sequence.

    Raises FxcurvError when the call has no real tensors, or naming the construct that export refuses.
    """
    if not call.real:
        raise FxcurvError("the export front-end needs example inputs; pass example_inputs=(x, ...).")
    checkpointed: list[str] = []
    with (
        preserved(model),
        quiet(prints=True),
        torch.enable_grad(),
        inlined_checkpoint(lambda: checkpointed.append(CHECKPOINT_NOTE)),
        replaced(nn.modules.rnn, PackedSequence=packed.Refused),
        replaced(torch.autograd.Function, apply=_refuse_functions(torch.autograd.Function.__dict__["apply"])),
    ):
        host = _Host(model, call)
        program = _program(host, call)
    return _Converter(model, call, host.seen, program).captured(tuple(checkpointed[:1]))


def _program(host: _Host, call: Call) -> torch.export.ExportedProgram:
    """The exported program with as many open dimensions as it allows; raises FxcurvError naming what it refuses."""
    for dims in _OPEN:
        shapes = tuple({d: torch.export.Dim.AUTO for d in dims if d < leaf.dim()} or None for leaf in call.leaves)
        leaves = tuple(fresh_leaves(call.leaves))
        try:
            return _exporter()(host, leaves, dynamic_shapes={"leaves": shapes}, strict=False)
        except FxcurvError:
            raise
        except Exception as error:
            failure = explain(error, "export")
            if not dims or not failure.on_sizes:
                raise failure from error
    raise AssertionError("the last attempt returns or raises")


def _exporter() -> Callable[..., torch.export.ExportedProgram]:
    # Until torch 2.6 plain ``export`` decomposed BatchNorm and dropout into inference operations.
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return getattr(torch.export, "export_for_training" if (major, minor) < (2, 7) else "export")


def _refuse_functions(original: Any) -> classmethod[Any, Any, Any]:
    """Export traces the forward of an autograd function and forgets its backward: gradients would be wrong."""

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            raise FxcurvError(
                f"the export front-end cannot capture the autograd function {cls.__qualname__}, whose backward it "
                "would lose; use the symbolic front-end, or write the function with differentiable operations."
            )
        return original.__get__(None, cls)(*args, **kwargs)

    return classmethod(apply)


@dataclass
class _Seen:
    """What the forward did: the structure of its output, and the names of the buffers that it bound to new tensors.

    An object of its own, because export restores the attributes of the module that it runs.
    """

    structure: Structure | None = None
    reassigned: tuple[str, ...] = ()


@final
class _Host(nn.Module):
    """The model with a flat signature: tensor leaves in; values of the output, then reassigned buffers, out."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self.seen = _Seen()
        self._call = call

    def forward(self, *leaves: torch.Tensor) -> list[Any]:
        snapshot = Snapshot(self.model)
        buffers = dict(self.model.named_buffers())
        args, kwargs = self._call.rebuild(leaves)
        output = self.model(*args, **kwargs)
        values, structure = flatten_output(output, lambda value: isinstance(value, torch.Tensor))
        now = dict(self.model.named_buffers())
        reassigned = tuple(name for name, old in buffers.items() if now.get(name, old) is not old)
        self.seen.structure, self.seen.reassigned = structure, reassigned
        changed = snapshot.changes()
        if changed:
            raise FxcurvError(
                f"the forward changes the attribute '{changed[0]}', which a captured graph would not repeat; keep such "
                "a value in a buffer, or pass it as an argument."
            )
        return values + [now[name] for name in reassigned]


@final
class _Converter:
    """Rewrites one exported program into a graph over the user's module."""

    def __init__(self, model: nn.Module, call: Call, seen: _Seen, program: torch.export.ExportedProgram) -> None:
        self._model, self._call, self._seen, self._program = model, call, seen, program
        self._graph = fx.Graph()
        self._values: dict[fx.Node, Any] = {}
        self._constants: dict[str, torch.Tensor] = {}
        self._fakes: list[Any] = []

    def captured(self, notes: tuple[str, ...]) -> Captured:
        """The converted graph."""
        source = self._program.graph
        self._inputs(source)
        results = self._body(source, self._program.graph_module, self._values)
        results = self._buffer_updates(results)
        self._graph.output(results)
        assert self._seen.structure is not None  # the forward ran
        sizes, guard = open_sizes(self._fakes, [fake.dim() for fake in self._fakes])
        return Captured(self._graph, "export", self._constants, self._seen.structure, notes, sizes, guard)

    def _inputs(self, source: fx.Graph) -> None:
        specs = {spec.arg.name: spec for spec in self._program.graph_signature.input_specs}
        placeholders = [node for node in source.nodes if node.op == "placeholder"]
        users = [n for n in placeholders if specs[n.name].kind is InputKind.USER_INPUT]
        users = [n for n in users if isinstance(specs[n.name].arg, TensorArgument)]
        for node, name in zip(users, self._call.names, strict=True):
            self._values[node] = self._graph.placeholder(name)
            self._fakes.append(node.meta["val"])
        for node in placeholders:
            if node not in self._values:
                self._values[node] = self._state(specs[node.name])

    def _state(self, spec: Any) -> fx.Node:
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise FxcurvError(
                f"the export front-end met an input of kind {spec.kind.name} ('{spec.target}'), which a graph over the "
                "model cannot read; keep the state of the model in parameters and buffers."
            )
        name = spec.target.removeprefix(_PREFIX)
        if spec.kind is InputKind.CONSTANT_TENSOR and not _has_tensor(self._model, name):
            constant = self._program.constants[spec.target]
            name = f"_tensor_constant{len(self._constants)}"
            while _has_tensor(self._model, name):
                name += "_"
            self._constants[name] = constant
        return self._graph.create_node("get_attr", name)

    def _body(self, source: fx.Graph, owner: nn.Module, values: dict[fx.Node, Any]) -> list[Any]:
        """Copy the nodes of a graph (or of a region's sub-graph) and return its results."""
        for node in source.nodes:
            if node.op == "output":
                return list(fx.map_arg(node.args[0], values.__getitem__))
            if node.op in ("placeholder", "get_attr"):  # a get_attr is the sub-graph of a region, handled there
                continue
            target = getattr(node.target, "__name__", str(node.target))
            if target.startswith(_ASSERTIONS) and not node.users:
                continue
            region = _REGIONS.get(target)
            if region is not None:
                values[node] = region(self, node, owner, values)
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                raise FxcurvError(
                    f"the export front-end recorded the control flow operator '{target}', which curvature cannot look "
                    "into; use torch.where or the symbolic front-end."
                )
            elif target == "getitem" and isinstance(values.get(node.args[0]), list):
                values[node] = values[node.args[0]][node.args[1]]
            else:
                values[node] = self._copy(node, values)
        raise AssertionError("a graph ends with its output node")

    def _copy(self, node: fx.Node, values: dict[fx.Node, Any]) -> fx.Node:
        copy = self._graph.node_copy(node, values.__getitem__)
        # The rest (fake tensors) can be neither copied nor pickled.
        copy.meta = {key: value for key, value in node.meta.items() if key in ("stack_trace", "nn_module_stack")}
        return copy

    def _call_function(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        return self._graph.call_function(target, args)

    def _grad_region(self, node: fx.Node, owner: nn.Module, values: dict[fx.Node, Any]) -> list[Any]:
        """``wrap_with_set_grad_enabled(flag, graph, *inputs)``: a ``no_grad`` region."""
        flag, region, *inputs = node.args
        ambient = self._call_function(torch.is_grad_enabled)
        self._call_function(torch._C._set_grad_enabled, flag)
        results = self._region(region, inputs, owner, values)
        self._call_function(torch._C._set_grad_enabled, ambient)
        return results

    def _autocast_region(self, node: fx.Node, owner: nn.Module, values: dict[fx.Node, Any]) -> list[Any]:
        """``wrap_with_autocast(device, dtype, enabled, cache, graph, *inputs)``."""
        device, dtype, enabled, cache, region, *inputs = node.args
        mode = self._call_function(torch.amp.autocast_mode._enter_autocast, device, dtype, enabled, cache)
        results = self._region(region, inputs, owner, values)
        self._call_function(torch.amp.autocast_mode._exit_autocast, mode)
        return results

    def _region(self, region: Any, inputs: list[Any], owner: nn.Module, values: dict[fx.Node, Any]) -> list[Any]:
        module = resolve(owner, region.target)
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        inner = {p: fx.map_arg(value, values.__getitem__) for p, value in zip(placeholders, inputs, strict=True)}
        return self._body(module.graph, module, inner)

    def _buffer_updates(self, results: list[Any]) -> list[Any]:
        """Write buffers that the forward rebinds into the buffers that the module has."""
        specs = self._program.graph_signature.output_specs
        targets = {spec.arg.name: spec.target for spec in specs if spec.target is not None}
        outputs = [getattr(arg, "name", None) for arg in next(iter(reversed(self._program.graph.nodes))).args[0]]
        own = len(results) - len(self._seen.reassigned)
        written = [(targets[name].removeprefix(_PREFIX), value)
                   for name, value in zip(outputs, results, strict=True) if name in targets]  # fmt: skip
        written += list(zip(self._seen.reassigned, results[own:], strict=True))
        for name, value in written:
            if self._is_cache(name, value):
                continue
            buffer = self._graph.create_node("get_attr", name)
            detached = self._call_function(torch.ops.aten.detach.default, value)
            self._call_function(torch.ops.aten.copy_.default, buffer, detached)
        kept = [v for name, v in zip(outputs, results, strict=True) if name not in targets]
        return kept[: len(kept) - len(self._seen.reassigned)]

    def _is_cache(self, name: str, value: Any) -> bool:
        """Whether a buffer is bound to a tensor of another shape: that is right only for what no input changes.

        Such a tensor (indices of positions, made when the number of positions is first known) can be computed anew by
        every call, so the module keeps what it has.
        """
        source = next((old for old, new in self._values.items() if new is value), None)
        if source is None or concrete(source.meta["val"]) == tuple(resolve(self._model, name).shape):
            return False
        left, seen = [value], set()
        while left:
            node = left.pop()
            if node.target is torch.ops.aten.sym_size.int:  # a size of the input, not what is in it
                continue
            if node.op == "placeholder":
                raise FxcurvError(
                    f"the forward binds the buffer '{name}' to a tensor of another shape, computed from its input, "
                    "which a captured graph would not repeat; keep its shape, or return the tensor."
                )
            left += [other for other in node.all_input_nodes if other not in seen]
            seen.update(left)
        return True


_REGIONS: dict[str, Callable[..., list[Any]]] = {
    "wrap_with_set_grad_enabled": _Converter._grad_region,
    "wrap_with_autocast": _Converter._autocast_region,
}


def _has_tensor(model: nn.Module, target: str) -> bool:
    try:
        return isinstance(resolve(model, target), torch.Tensor)
    except AttributeError:
        return False
