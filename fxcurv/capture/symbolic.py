"""The ``symbolic`` front-end: ``torch.fx`` tracing in which torch.nn modules stay modules.

It runs the user's Python once with placeholders, so that the graph works for any shape for which the Python takes
the same path. Tracing differs from ``torch.fx.symbolic_trace`` in what :mod:`fxcurv.capture.patches` lists, in
recording ``no_grad`` and ``autocast`` regions, and in never touching the user's model.
"""

from __future__ import annotations

import importlib
import linecache
import sys
from collections.abc import Callable
from typing import Any, final

import torch
from torch import fx, nn

from fxcurv.capture.call import Call
from fxcurv.capture.captured import Captured
from fxcurv.capture.examples import Examples
from fxcurv.capture.explain import explain
from fxcurv.capture.graphs import GraphPatches
from fxcurv.capture.kept import is_kept
from fxcurv.capture.library import from_library, is_emptiness_test, is_refusal, leftovers, stays_whole
from fxcurv.capture.packed import PackedSequence
from fxcurv.capture.patches import CHECKPOINT_NOTE, Patches, dynamo_kept_out
from fxcurv.capture.proxies import RecordingProxy, StateProxy
from fxcurv.capture.state import preserved
from fxcurv.capture.structure import flatten_output, is_plain
from fxcurv.capture.where import user_stack
from fxcurv.errors import FxcurvError

# torch.nn modules that only arrange others: their sub-modules are the layers.
_CONTAINERS = (
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
    nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
)  # fmt: skip
_AUTOCAST_DEVICES = ("cpu", "cuda")


def capture_symbolic(model: nn.Module, call: Call) -> Captured:
    """Trace ``model`` for calls with the signature ``call``.

    Raises FxcurvError naming the construct and the user's line when the forward cannot be traced.
    """
    try:
        with dynamo_kept_out():
            return _trace(model, call)
    except FxcurvError:
        raise
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("torch._dynamo"):
            raise explain(error, "symbolic") from error
    except Exception as error:
        raise explain(error, "symbolic") from error
    importlib.import_module("torch._dynamo")  # the forward needs it: once more, with the real one
    return capture_symbolic(model, call)


def _trace(model: nn.Module, call: Call) -> Captured:
    tracer = _Tracer(model)
    with preserved(model) as snapshot, torch.enable_grad():
        graph, unflatten = tracer.run(call)
        changed = snapshot.changes() + leftovers(model)
    if changed:
        raise FxcurvError(
            f"the forward changes the attribute '{changed[0]}', which a captured graph would not repeat; keep such a "
            "value in a buffer and update it in place, or pass it as an argument."
        )
    notes = (CHECKPOINT_NOTE,) if tracer.checkpointed else ()
    sizes = tuple((None,) * leaf.dim() for leaf in call.leaves) if tracer.examples.ranks else ()
    return Captured(graph, "symbolic", tracer.constants, unflatten, notes, sizes)


@final
class _Tracer(fx.Tracer):
    """One trace of one model."""

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.constants: dict[str, torch.Tensor] = {}
        self.checkpointed = False
        self._model = model
        self._state = {id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())}
        self._state_proxies: dict[str, StateProxy] = {}
        self._constant_names: dict[int, str] = {}
        self._grad_enabled = True
        self._ambient_grad: fx.Node | None = None
        self._autocast: dict[str, tuple[Any, Any, fx.Node | None]] = {
            device: (_autocast_state(device), _autocast_state(device), None) for device in _AUTOCAST_DEVICES
        }

    def run(self, call: Call) -> tuple[fx.Graph, Callable[[Any], Any]]:
        """The graph of ``call`` and what rebuilds the output from what the graph returns."""
        self._call = call
        self._unflatten: Callable[[Any], Any] = _identity
        self.examples = Examples(self._model, call, self.constants)
        with Patches(self, self._state, self._on_checkpoint, self.examples) as self._patches:
            self._graphs = GraphPatches(self, self.examples, self._patches)
            graph = self.trace(self._model)
        return graph, self._unflatten

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """What fx runs in place of the root's forward: a call of the model itself, so that its hooks run too."""
        leaves = [self.create_proxy("placeholder", name, (), {}) for name in self._call.names]

        def forward():  # type: ignore[no-untyped-def]  # fx would print an annotation
            args, kwargs = self._call.rebuild(leaves)
            output = self._model(*args, **kwargs)
            if is_plain(output, _is_value):
                return output
            values, self._unflatten = flatten_output(output, _is_value)
            return values

        return forward, []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules of torch.nn that compute something, parametrised ones included, and those kept by their class."""
        if m is self._model or isinstance(m, _CONTAINERS):
            return False
        if is_kept(m) or stays_whole(m):
            return True
        # torch derives a class for a parametrised or a sharded module; what counts is the class it derives from.
        derived = ("torch.nn.utils.parametrize", "torch.distributed")
        origin = next(cls.__module__ for cls in type(m).__mro__ if not cls.__module__.startswith(derived))
        return origin.startswith(("torch.nn.", "torch.ao.nn."))

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module made inside the forward (``nn.ReLU()(x)``) is traced into: it has no path on the user's model."""
        if self.examples.active:
            return forward(*args, **kwargs)
        self._patches.globals_of(m.forward)
        self._graphs.prepare(m)
        if self.submodule_paths is None or m not in self.submodule_paths:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Parameters and buffers read as attributes are values of the trace."""
        name = self._state.get(id(attr_val))
        return attr_val if name is None or self.examples.active else self._state_proxy(name, attr_val)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The proxy class of this trace."""
        return RecordingProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The condition of an ``assert`` is taken to hold: the plain model, which runs as well, checks it."""
        frame = sys._getframe(2)  # the caller of Proxy.__bool__
        if linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("assert "):
            return True
        if from_library(frame) and (is_emptiness_test(obj.node) or is_refusal(frame)):
            return False
        if frame.f_code is nn.Transformer.forward.__code__:  # it compares sizes, only to refuse what does not fit
            return False
        return super().to_bool(obj)

    def rank(self, node: fx.Node) -> int | None:
        """Number of axes, for code of a library that asks; ``None`` where it has to be recorded."""
        return self.examples.rank(node) if from_library(sys._getframe(2)) else None

    def create_arg(self, a: Any) -> Any:
        """A tensor becomes a ``get_attr`` of its path, or of a constant's name: the user's model is not touched."""
        if isinstance(a, PackedSequence):
            return self.create_node("call_function", PackedSequence, tuple(map(self.create_arg, a)), {})
        return self._tensor(a) if isinstance(a, torch.Tensor) else super().create_arg(a)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        """A node with the user's source lines, after nodes for a change of the gradient or autocast mode."""
        if kind not in ("placeholder", "get_attr"):
            self._follow_grad_mode()
            self._follow_autocast()
        return self._node(kind, target, args, kwargs, name, type_expr)

    def _node(self, kind: str, target: Any, args: Any = (), kwargs: Any = None, *rest: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs or {}, *rest)
        node.stack_trace = user_stack(sys._getframe(1), _Tracer.run.__code__)
        return node

    def _state_proxy(self, name: str, tensor: torch.Tensor) -> StateProxy:
        if name not in self._state_proxies:
            self._state_proxies[name] = StateProxy(self.create_node("get_attr", name, (), {}), self, tensor)
        return self._state_proxies[name]

    def _tensor(self, tensor: torch.Tensor) -> fx.Node:
        name = self._state.get(id(tensor))
        if name is not None:
            return self._state_proxy(name, tensor).node
        name = self.tensor_attrs.get(tensor)
        if name is not None:
            return self.create_node("get_attr", name, (), {})
        if tensor.requires_grad:
            raise FxcurvError(
                f"the forward uses a trainable tensor of shape {tuple(tensor.shape)} that is no parameter of the "
                "model, so a captured graph would not see its updates; register it as an nn.Parameter of a module."
            )
        name = self._constant_names.get(id(tensor))
        if name is None:
            name = self._constant_names[id(tensor)] = self._fresh_constant()
            self.constants[name] = tensor
        return self.create_node("get_attr", name, (), {})

    def _fresh_constant(self) -> str:
        index = len(self.constants)
        while f"_tensor_constant{index}" in vars(self._model):
            index += 1
        return f"_tensor_constant{index}"

    def _follow_grad_mode(self) -> None:
        """``with torch.no_grad():`` leaves no operation behind, only a different mode at the next one."""
        enabled = torch.is_grad_enabled()
        if enabled == self._grad_enabled:
            return
        self._grad_enabled = enabled
        if enabled:
            self._node("call_function", torch._C._set_grad_enabled, (self._ambient_grad,))
        else:
            self._ambient_grad = self._node("call_function", torch.is_grad_enabled)
            self._node("call_function", torch._C._set_grad_enabled, (False,))

    def _follow_autocast(self) -> None:
        for device, (ambient, current, entered) in self._autocast.items():
            state = _autocast_state(device)
            if state == current:
                continue
            if entered is not None:
                self._node("call_function", torch.amp.autocast_mode._exit_autocast, (entered,))
                entered = None
            if state != ambient:
                enabled, dtype, cache = state
                entered = self._node(
                    "call_function", torch.amp.autocast_mode._enter_autocast, (device, dtype, enabled, cache)
                )
            self._autocast[device] = (ambient, state, entered)

    def _on_checkpoint(self) -> None:
        self.checkpointed = True


def _autocast_state(device: str) -> tuple[bool, torch.dtype, bool]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()


def _is_value(value: Any) -> bool:
    return isinstance(value, (fx.Proxy, torch.Tensor))


def _identity(output: Any) -> Any:
    return output
