"""Natural gradient for graph networks: K-FAC over the nodes of one graph, with pseudo-labels in the Fisher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

from torch import fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.program import Builder
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.kfac import kfac
from fxcurv.methods.method import Method, curvature_weight, loss_terms
from fxcurv.methods.parts.estimate import Kron, moment
from fxcurv.methods.parts.schemes import SPECTRAL, scheme
from fxcurv.methods.registry import published


@dataclass(frozen=True)
class Nodes(Kron):
    """A = sum over all nodes of a a^T / N and G = sum of g g^T / N, with N the number of loss terms.

    K-FAC would divide A by the number of nodes; the two agree when every node has a loss of weight 1.
    """

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        inputs = moment(b, facts, target.rows(b, "a"), target.d_in, target.diagonal_input)
        outputs = moment(b, facts, target.rows(b, "g"), target.d_out)
        return {"A": b.mean(inputs, loss_terms(b, facts)), "G": b.scale(outputs, curvature_weight(b, facts))}


@published(
    "gnn_ng",
    papers=(7,),
    fisher="empirical",
    fisher_samples=1,
    damping=0.01,
    damping_scheme="sqrt",
    trace_floor=1e-3,
    ema=0.0,
    factor_every=50,
    solve_every=50,
    kl_clip=None,
    rescale="kl",
    lr=0.01,
)
def gnn_ng(o: SimpleNamespace) -> Method:
    """Natural gradient for graph networks: K-FAC whose examples are the nodes of one graph, labelled or not.

    A graph convolution is H' = act((S H) W + b) with a normalised adjacency S. Its block is kron(G, A) with
    A = (1/N) sum_i a_i a_i^T of the *aggregated* inputs a_i = (S H)_i (and 1 for the bias) and
    G = (1/N) sum_i g_i g_i^T of the gradients g_i of the total loss at the layer's output, over all nodes; unlabelled
    ones enter with predicted labels, N = labelled + strength * unlabelled. U = (G + sqrt(damping) I)^-1 V
    (A + sqrt(damping) I)^-1. fisher: "empirical" as in the paper, on true and predicted labels; "mc" and "ggn" take
    the labels from the model. damping_scheme: "sqrt" (pi = 1, as in the paper's experiments), "pi", "eigenvalue",
    "floor", "relative" or "mask", see kfac.

    The loss is :class:`fxcurv.losses.SemiSupervised`, with :func:`fxcurv.losses.strength` for the growth of the weight;
    any loss whose terms are nodes will do (cross-entropy, gaussian). A layer that aggregates after its product,
    ``S @ (H @ W)`` with S dense or sparse and no function of parameters, or torch_geometric's GCNConv, is measured as
    ``(S @ H) @ W``. In other layers that gather and scatter after the product, A is that of H and G that of S^T g,
    another approximation. A bias added after the aggregation is then a shift, with a block of its own for every unit.
    The nodes of a graph are coupled, so that "ggn", one column for all nodes at once, is exact for a last layer only;
    "mc" is unbiased. Directions are for SGD with momentum; Adam would normalise them anew.

    Cost: the inverses; with the default they are 50 steps old at most, and so are the factors. Choose it for
    node classification on one graph; for whole graphs as examples choose kfac with sharing="reduce".

    Source: Izadi et al. 2020; damping, period and learning rate of its experiments. Its code multiplies g by the
    layer's width instead of N, so that its damping means another strength.
    """
    if o.sharing != "expand":
        raise FxcurvError("'gnn_ng' takes nodes as examples; for whole graphs use method 'kfac' with sharing='reduce'.")
    scheme(o.damping_scheme, ("pi", "sqrt", *SPECTRAL))  # A is no average over rows, so none is to be undone
    method = kfac.compose(SimpleNamespace(**{**kfac.defaults, **vars(o)}))
    return replace(method, name="gnn_ng", estimate=Nodes(), aggregated=True)
