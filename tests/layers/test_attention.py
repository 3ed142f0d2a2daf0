"""Attention in all its spellings: values and gradients of the original, every element covered, dense factors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from fxcurv.capture import Call, Runner, capture
from fxcurv.layers.detect import detect
from tests.layers.check import FRONTENDS, assert_exact, find, reasons

pytestmark = pytest.mark.usefixtures("float64")
B, T, S, E = 3, 5, 4, 8
INF = math.inf


class Attention(nn.Module):
    """An attention module with its other arguments; ``inputs`` says which of the call's tensors are q, k, v."""

    def __init__(self, inputs=(0, 0, 0), arguments=None, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(E, 2, **options)
        self.inputs, self.arguments = inputs, arguments or {}
        for parameter in self.attn.parameters():  # torch starts biases at zero
            nn.init.normal_(parameter, std=0.4)

    def forward(self, *xs):
        q, k, v = (xs[i] for i in self.inputs)
        out, weights = self.attn(q, k, v, **self.arguments)
        return (out, weights) if self.arguments.get("need_weights", True) else out


def _causal(t, s):
    return torch.triu(torch.full((t, s), -INF, dtype=torch.float64), diagonal=1)


def _random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


PADDING = torch.tensor([[False] * S, [False, False, True, True], [False, True, False, True]])
ALL_PADDED = torch.tensor([[False] * S, [True] * S, [False] * S])
# name: (which inputs, arguments of the call, options of the module, sizes of the inputs' features)
MODULES = {
    "self": ((0, 0, 0), {}, {}),
    "self first": ((0, 0, 0), {}, {"batch_first": True}),
    "no bias": ((0, 0, 0), {}, {"bias": False}),
    "key is value": ((0, 1, 1), {}, {}),
    "key is value first": ((0, 1, 1), {}, {"batch_first": True}),
    "key is value, no bias": ((0, 1, 1), {}, {"bias": False}),
    "three": ((0, 1, 2), {}, {"batch_first": True}),
    "query is key": ((1, 1, 2), {}, {}),
    "sizes": ((0, 3, 4), {}, {"kdim": 3, "vdim": 6}),
    "sizes first": ((0, 3, 4), {}, {"kdim": 3, "vdim": 6, "batch_first": True, "bias": False}),
    "no weights": ((0, 1, 1), {"need_weights": False}, {"batch_first": True}),
    "weights by head": ((0, 1, 1), {"average_attn_weights": False}, {}),
    "added keys": ((0, 1, 1), {}, {"add_bias_kv": True}),
    "added keys first": ((0, 0, 0), {"need_weights": False}, {"add_bias_kv": True, "batch_first": True}),
    "zero": ((0, 1, 2), {}, {"add_zero_attn": True}),
    "all added": (
        (0, 1, 1), {"attn_mask": _random(T, S), "key_padding_mask": PADDING},
        {"add_zero_attn": True, "add_bias_kv": True, "batch_first": True},
    ),
    "boolean mask": ((0, 1, 1), {"attn_mask": _causal(T, S) < 0}, {}),
    "float mask": ((0, 1, 1), {"attn_mask": _random(T, S), "need_weights": False}, {"batch_first": True}),
    "mask by head": ((0, 1, 1), {"attn_mask": _random(2 * B, T, S)}, {"batch_first": True}),
    "mask by head, no weights": ((0, 1, 1), {"attn_mask": _random(2 * B, T, S), "need_weights": False}, {}),
    "padding": ((0, 1, 1), {"key_padding_mask": PADDING}, {}),
    "padding, no weights": ((0, 1, 2), {"key_padding_mask": PADDING, "need_weights": False}, {"batch_first": True}),
    "padding and mask": (
        (0, 1, 1), {"key_padding_mask": PADDING, "attn_mask": _random(T, S) < -1, "need_weights": False}, {},
    ),
    "causal": (
        (1, 1, 1), {"attn_mask": _causal(S, S), "is_causal": True, "need_weights": False}, {"batch_first": True},
    ),
    "causal with padding": (
        (1, 1, 1), {"attn_mask": _causal(S, S), "is_causal": True, "key_padding_mask": PADDING}, {"batch_first": True},
    ),
    "causal with padding, no weights": (
        (1, 1, 1),
        {"attn_mask": _random(S, S), "is_causal": True, "key_padding_mask": PADDING, "need_weights": False},
        {},
    ),
    "causal with weights": ((1, 1, 1), {"attn_mask": _causal(S, S), "is_causal": True}, {}),
    "dropout": ((0, 1, 1), {}, {"dropout": 0.4}),
    "dropout, no weights": ((0, 0, 0), {"need_weights": False}, {"dropout": 0.4, "batch_first": True}),
}  # fmt: skip


def _module(name, batched=True):
    which, arguments, options = MODULES[name]
    first = options.get("batch_first", False)
    sizes = [(T, E), (S, E), (S, E), (S, options.get("kdim", E)), (S, options.get("vdim", E))]
    shapes = [((B, t, e) if first else (t, B, e)) if batched else (t, e) for t, e in sizes]
    used = sorted(set(which))
    model = Attention([used.index(i) for i in which], arguments, **options)
    return model, [torch.randn(shapes[i]) for i in used]


def _tensors(output):
    return list(output) if isinstance(output, tuple) else [output]


def _run(function, model, xs):
    """Outputs and all gradients of a random projection of them."""
    xs = [x.clone().requires_grad_() for x in xs]
    torch.manual_seed(3)
    outputs = _tensors(function(*xs))
    torch.manual_seed(4)
    loss = sum((out * torch.randn_like(out)).sum() for out in outputs)
    found = torch.autograd.grad(loss, [*xs, *model.parameters()], allow_unused=True)
    return [out.detach() for out in outputs], list(found)


def _assert_same_function(model, xs, frontend):
    """The graph with its products exposed computes what the model does, in memory layout too."""
    captured = capture(model, Call.of(model, xs), frontend)
    detection = detect(captured, model)
    runner = Runner(captured)
    mine, theirs = _run(lambda *xs: runner(model, *xs), model, xs), _run(model, model, xs)
    for found, expected in zip((*mine[0], *mine[1]), (*theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert [out.stride() for out in mine[0]] == [out.stride() for out in theirs[0]]
    return detection


DECOMPOSED = ("self", "key is value first", "three", "sizes", "added keys first", "padding and mask", "all added")
BY_FRONTEND = [(name, "symbolic") for name in MODULES] + [(name, "export") for name in DECOMPOSED]


@pytest.mark.parametrize("name, frontend", BY_FRONTEND)
def test_multihead_attention(name, frontend):
    model, xs = _module(name)
    detection = _assert_same_function(model, xs, frontend)
    assert not detection.uncovered
    if "dropout" not in name:
        assert_exact(model, *xs, frontend=frontend)
    wide = {(0, 0, 0): [3 * E], (1, 1, 1): [3 * E], (0, 1, 1): [E, 2 * E]}.get(MODULES[name][0], [E, E, E])
    shapes = [layer.shape[1] for layer in detection.layers if "proj" in layer.name]
    assert shapes == [*wide, E]


@pytest.mark.parametrize("name", ["self", "key is value", "three", "added keys", "zero", "causal", "dropout", "sizes"])
def test_multihead_attention_without_batch(name):
    model, xs = _module(name, batched=False)
    detection = _assert_same_function(model, xs, "symbolic")
    assert not detection.uncovered
    if name != "dropout":
        assert_exact(model, *xs)


def test_rows_of_padding_for_every_head():
    """A row that may look nowhere is not a number in both."""
    model, xs = _module("padding")
    model.arguments = {"key_padding_mask": ALL_PADDED}
    captured = capture(model, Call.of(model, xs), "symbolic")
    assert not detect(captured, model).uncovered
    (mine, weights), (theirs, wanted) = Runner(captured)(model, *xs), model(*xs)
    assert mine[:, 1].isnan().all() and weights[1].isnan().all()
    torch.testing.assert_close(mine, theirs, equal_nan=True)
    torch.testing.assert_close(weights, wanted, equal_nan=True)


def test_masks_as_inputs():
    class Masked(Attention):
        def forward(self, x, padding):
            return self.attn(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    model, x = Masked(batch_first=True), torch.randn(B, S, E)
    captured = capture(model, Call.of(model, (x, PADDING)), "symbolic")
    assert not detect(captured, model).uncovered
    for padding in (PADDING, ~PADDING.flip(1) & PADDING):
        torch.testing.assert_close(Runner(captured)(model, x, padding), model(x, padding))


def test_another_batch_and_length():
    model, xs = _module("key is value first")
    captured = capture(model, Call.of(model, xs), "symbolic")
    detect(captured, model)
    others = [torch.randn(7, 2, E), torch.randn(7, 9, E)]
    torch.testing.assert_close(Runner(captured)(model, *others), model(*others))


@pytest.mark.parametrize("sizes, words", [((T, T + 1), "attn_mask has shape"), ((T, 1), "attn_mask has shape")])
def test_a_mask_that_does_not_fit(sizes, words):
    model, xs = _module("self")
    model.arguments = {"attn_mask": torch.zeros(sizes)}
    captured = capture(model, Call.of(model, xs), "symbolic")
    detect(captured, model)
    with pytest.raises(fxcurv.FxcurvError, match=words):
        Runner(captured)(model, *xs)
    model.arguments = {"attn_mask": torch.zeros(T, T, dtype=torch.int64)}
    captured = capture(model, Call.of(model, xs), "symbolic")
    detect(captured, model)
    with pytest.raises(fxcurv.FxcurvError, match="int64"):
        Runner(captured)(model, *xs)


def test_hooks_and_parametrised_projections_stay_whole():
    model, xs = _module("self")
    model.attn.out_proj.register_forward_hook(lambda *a: None)
    found = reasons(find(model, *xs)[1])
    assert len(found) == 4 and all("hooks" in reason for reason in found.values())
    model, xs = _module("self")
    nn.utils.parametrizations.weight_norm(model.attn.out_proj)
    detection = find(model, *xs)[1]
    assert not detection.layers and len(detection.uncovered) == 5
    assert all("parametris" in reason for reason in reasons(detection).values())


class Pool(nn.Module):
    """Attention through the functional form, with separate layers whose biases are joined for the call."""

    def __init__(self, joined: bool = True):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(E, E) for _ in range(4))
        self.w, self.b, self.joined = nn.Parameter(torch.randn(3 * E, E) / 3), nn.Parameter(torch.randn(3 * E)), joined
        if joined:
            del self.w, self.b

    def forward(self, x):
        separate = {"q_proj_weight": self.q.weight, "k_proj_weight": self.k.weight, "v_proj_weight": self.v.weight}
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias]) if self.joined else self.b
        return F.multi_head_attention_forward(
            x[:1], x, x, x.shape[-1], 2, None if self.joined else self.w, bias, None, None, False, 0.0, self.o.weight,
            self.o.bias, use_separate_proj_weight=self.joined, training=self.training, need_weights=False,
            **(separate if self.joined else {}),
        )[0]  # fmt: skip


@pytest.mark.parametrize("joined", [True, False])
def test_functional_form(joined):
    model, x = Pool(joined), torch.randn(T, B, E)
    detection = assert_exact(model, x)
    names = ["q", "k", "v", "o"] if joined else ["w[0:8]", "w[8:16]", "w[16:24]", "o"]
    assert [layer.name for layer in detection.layers] == names
    assert [layer.shape for layer in detection.layers] == [(1, E, E + 1)] * 4
    captured = capture(model, Call.of(model, (x,)), "symbolic")
    detect(captured, model)
    torch.testing.assert_close(Runner(captured)(model, x), model(x))


def test_functional_form_with_static_keys_is_refused():
    class Static(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.o = nn.Parameter(torch.randn(3 * E, E)), nn.Parameter(torch.randn(E, E))

        def forward(self, x, k):
            return F.multi_head_attention_forward(
                x, x, x, E, 2, self.w, None, None, None, False, 0.0, self.o, None, static_k=k
            )[0]

    detection = find(Static(), torch.randn(T, B, E), torch.randn(2 * B, T, E // 2))[1]
    assert all("static" in reason for reason in reasons(detection).values()) and len(detection.uncovered) == 2


# Transformer layers of torch ------------------------------------------------------------------------------------------


def _layers(first):
    return {
        "encoder": (nn.TransformerEncoderLayer(E, 2, 12, dropout=0.0, batch_first=first), 1),
        "encoder norm first": (
            nn.TransformerEncoderLayer(E, 2, 12, dropout=0.3, batch_first=first, norm_first=True, activation="gelu"), 1,
        ),
        "decoder": (nn.TransformerDecoderLayer(E, 2, 12, dropout=0.0, batch_first=first), 2),
        "encoder stack": (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(E, 2, 12, dropout=0.0, batch_first=first), 2, enable_nested_tensor=False
            ), 1,
        ),
        "decoder stack": (
            nn.TransformerDecoder(nn.TransformerDecoderLayer(E, 2, 12, dropout=0.0, batch_first=first), 2), 2,
        ),
        "transformer": (nn.Transformer(E, 2, 1, 1, 12, dropout=0.0, batch_first=first), 2),
    }  # fmt: skip


class Around(nn.Module):
    """A classifier on top; the layout is that of the layer."""

    def __init__(self, layer, first):
        super().__init__()
        self.layer, self.first, self.head = layer, first, nn.Linear(E, 3)

    def forward(self, *xs):
        xs = xs if self.first else [x.transpose(0, 1) for x in xs]
        out = self.layer(*xs)
        return self.head(out.mean(1 if self.first else 0))


NAMES = ("encoder", "encoder norm first", "decoder", "encoder stack", "decoder stack", "transformer")
LAYERS = [(name, first, "symbolic") for name in NAMES for first in (True, False)]
LAYERS += [("encoder norm first", True, "export"), ("decoder", False, "export")]  # the slower front-end


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name, first, frontend", LAYERS)
def test_transformer_layers(name, first, frontend):
    layer, count = _layers(first)[name]
    model, xs = Around(layer, first), [torch.randn(B, t, E) for t in (T, S)[:count]]
    if "first" not in name:
        detection = assert_exact(model, *xs, frontend=frontend)
        assert not detection.uncovered
    module = fxcurv.transform(model, "kfac", example_inputs=xs, loss="cross_entropy", frontend=frontend)
    assert module.uncovered == () and module.report().frontend == frontend
    y = torch.tensor([0, 1, 2])
    out = module(*xs)
    module.backward(F.cross_entropy(out, y), out)
    info = module.precondition_()
    assert info.statistics and not info.fallback
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", ["kfac", "ekfac", "diag"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_layout_makes_no_difference(frontend, sharing, method):
    """Examples are examples and positions are positions in both layouts and both front-ends."""
    found, reference = [], None
    x, y = torch.randn(B, T, E), torch.tensor([0, 1, 2])
    for first, front in ((True, "symbolic"), (True, frontend), (False, frontend)):
        torch.manual_seed(1)
        model = Around(Attention(batch_first=first, arguments={"need_weights": False}), first)
        options = {} if method == "diag" else {"sharing": sharing}
        module = fxcurv.transform(
            model, method, example_inputs=(x,), loss="cross_entropy", frontend=front, fisher="empirical", solve_every=1,
            **options,
        )  # fmt: skip
        module.due(statistics=True, refresh=True)
        out = module(x)
        module.backward(F.cross_entropy(out, y), out)
        module.precondition_()
        found = {layer.name: module.factors(layer.name) for layer in module.layers}
        reference = reference or found
        assert set(found) == {"layer.attn.in_proj_weight", "layer.attn.out_proj", "head"}
        for name, parts in found.items():
            for part in parts:
                value, wanted = parts[part], reference[name][part]
                if part in ("QA", "QG"):
                    continue  # a basis is known up to signs and rotations within equal eigenvalues
                if part == "S" and parts["S"].shape == wanted.shape:
                    value, wanted = value.sum(), wanted.sum()  # whatever the basis
                torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-10)
