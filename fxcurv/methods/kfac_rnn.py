"""K-FAC for recurrent networks: correlations over time in closed form."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.errors import FxcurvError
from fxcurv.methods.kfac import FAMILY
from fxcurv.methods.method import Estimate, Method, Solve, Source
from fxcurv.methods.parts.chain import Lagged, Stationary, Symmetric
from fxcurv.methods.parts.estimate import Kron
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.schemes import FACTORED, SCHEMES, scheme
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.track import EMA
from fxcurv.methods.registry import published

TEMPORAL: dict[str, tuple[Estimate, Solve | None]] = {
    "independent": (Kron(), None),
    "symmetric": (Lagged(lengths=True), Symmetric()),
    "stationary": (Lagged(), Stationary()),
}
"""What is assumed about a gradient at different times; options 0, 1, 2 of the paper. ``None``: the scheme's solve."""


@published(
    "kfac_rnn",
    papers=(4,),
    temporal="stationary",
    **FAMILY,
    solve_every=5,
)
def kfac_rnn(o: SimpleNamespace) -> Method:
    """K-FAC for recurrent networks: the steps of a sequence are a stationary chain, whose summed Fisher is inverted.

    The gradient of a weight that is used at every time step is a sum of correlated terms w_t = vec(g_t a_t^T), so its
    Fisher is a double sum over time. With inputs independent of output gradients, both stationary, and
    w_t = Psi w_{t-1} + noise, four factors say it all: A = E[a_t a_t^T], A1 = E[a_{t+1} a_t^T], and G, G1 of the output
    gradients; E[w_{t+d} w_t^T] = Psi^d kron(G, A) with Psi = kron(G1 G^-1, A1 A^-1). temporal:

    - "independent" (option 0): no correlation, U = G^-1 V A^-1, that is K-FAC;
    - "symmetric" (option 1): A1 and G1 replaced by their symmetric parts; the exact inverse for sequences of T steps;
    - "stationary" (option 2): any A1 and G1, T -> infinity:
      Z = V - P_G V P_A^T; Z <- K_G [(K_G^T Z K_A) / (1 - mu_G mu_A^T)] K_A^T; U = Z - P_G^T Z P_A,
      P = C1^T C^-1, K = C^-1/2 E, C^-1/2 C1 C^-1/2 = . diag(sqrt mu) E^T for C = A, G.

    C is A + pi sqrt(damping) I or G + sqrt(damping)/pi I with the trace-norm pi, or as damping_scheme "sqrt" or
    "replicated" has it ("independent" takes kfac's others as well: a chain needs C itself); C1 is not damped. The
    examples of a layer's rows are sequences and its positions their steps in order: nn.RNN, nn.LSTM and nn.GRU in any
    layout, and linear layers on (batch, time, features). With one position all three are K-FAC. They are, too, for
    convolutions, norms and embeddings, for a weight applied anew at each step of a Python loop, and beyond
    max_factor_dim. Padding counts as time in the normaliser and in T (mask the loss); for batches of several T
    "symmetric" takes the two whole numbers around their mean.

    Cost: twice K-FAC's factors and statistics, two eigendecompositions a factor at each refresh, and 4 ("symmetric") or
    8 products a step in place of 2. Choose it over kfac for recurrent layers on long, strongly correlated sequences.

    Source: Martens, Ba & Johnson 2018, sections 3-4; option 2, the moving average of 0.95 and the refresh every 5 steps
    as in its reference implementation.
    """
    if o.temporal not in TEMPORAL:
        raise FxcurvError(f"temporal='{o.temporal}' is unknown; choose one of {', '.join(TEMPORAL)}.")
    if o.sharing != "expand" and o.temporal != "independent":
        raise FxcurvError(
            f"temporal='{o.temporal}' follows positions through time, which sharing='{o.sharing}' sums over; leave "
            "sharing='expand', or choose temporal='independent'."
        )
    damp, inverse = scheme(o.damping_scheme, SCHEMES if o.temporal == "independent" else FACTORED)
    estimate, solve = TEMPORAL[o.temporal]
    return Method(
        name="kfac_rnn",
        source=Source(o.fisher, o.fisher_samples),
        scope=Layers(),
        estimate=estimate,
        track=EMA(),
        damp=damp,
        solve=solve or inverse,
        rescale=rescaling(o),
    )
