"""Second-order methods: published compositions of parts, by name.

The package can be called: ``fxcurv.methods()`` is a dictionary of every :class:`Published` by name, beside
``fxcurv.methods.kfac`` for one of them.
"""

import sys
from types import ModuleType

from fxcurv.methods.adahessian import adahessian
from fxcurv.methods.adam import adam
from fxcurv.methods.diag import diag
from fxcurv.methods.ekfac import ekfac
from fxcurv.methods.foof import foof
from fxcurv.methods.gnn_ng import gnn_ng
from fxcurv.methods.hessian_free import hessian_free
from fxcurv.methods.kfac import kfac
from fxcurv.methods.kfac_rnn import kfac_rnn
from fxcurv.methods.method import Method
from fxcurv.methods.registry import PUBLISHED, Published, get_method, published
from fxcurv.methods.sgd import sgd
from fxcurv.methods.shampoo import shampoo

__all__ = [
    "PUBLISHED",
    "Method",
    "Published",
    "adahessian",
    "adam",
    "diag",
    "ekfac",
    "foof",
    "get_method",
    "gnn_ng",
    "hessian_free",
    "kfac",
    "kfac_rnn",
    "published",
    "sgd",
    "shampoo",
]


class _CallableModule(ModuleType):
    """A module that lists the methods when called."""

    def __call__(self) -> dict[str, Published]:
        return dict(sorted(PUBLISHED.items()))


sys.modules[__name__].__class__ = _CallableModule
