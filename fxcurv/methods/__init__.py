"""Second-order methods: published compositions of parts, by name.

The package can be called: ``fxcurv.methods()`` is a dictionary of every :class:`Published` by name, beside
``fxcurv.methods.kfac`` for one of them.
"""

import sys
from types import ModuleType

from fxcurv.methods.acktr import acktr
from fxcurv.methods.adahessian import adahessian
from fxcurv.methods.adam import adam
from fxcurv.methods.deflation import deflation
from fxcurv.methods.diag import diag
from fxcurv.methods.ekfac import ekfac
from fxcurv.methods.eva import eva, eva_f
from fxcurv.methods.eva_s import eva_s
from fxcurv.methods.foof import foof
from fxcurv.methods.gnn_ng import gnn_ng
from fxcurv.methods.hessian_free import hessian_free
from fxcurv.methods.hylo import hylo
from fxcurv.methods.kfac import kfac
from fxcurv.methods.kfac_corrected import kfac_corrected
from fxcurv.methods.kfac_rnn import kfac_rnn
from fxcurv.methods.kflr import kflr
from fxcurv.methods.kfra import kfra
from fxcurv.methods.kpsvd import kpsvd
from fxcurv.methods.lanczos import lanczos
from fxcurv.methods.locoprop_m import locoprop_m
from fxcurv.methods.locoprop_s import locoprop_s
from fxcurv.methods.method import Method
from fxcurv.methods.mkor import mkor, mkor_h
from fxcurv.methods.registry import PUBLISHED, Published, get_method, published
from fxcurv.methods.sgd import sgd
from fxcurv.methods.shampoo import shampoo
from fxcurv.methods.skfac import skfac
from fxcurv.methods.tekfac import tekfac
from fxcurv.methods.thor import thor
from fxcurv.methods.tkfac import tkfac

__all__ = [
    "PUBLISHED",
    "Method",
    "Published",
    "acktr",
    "adahessian",
    "adam",
    "deflation",
    "diag",
    "ekfac",
    "eva",
    "eva_f",
    "eva_s",
    "foof",
    "get_method",
    "gnn_ng",
    "hessian_free",
    "hylo",
    "kfac",
    "kfac_corrected",
    "kfac_rnn",
    "kflr",
    "kfra",
    "kpsvd",
    "lanczos",
    "locoprop_m",
    "locoprop_s",
    "mkor",
    "mkor_h",
    "published",
    "sgd",
    "shampoo",
    "skfac",
    "tekfac",
    "thor",
    "tkfac",
]


class _CallableModule(ModuleType):
    """A module that lists the methods when called."""

    def __call__(self) -> dict[str, Published]:
        return dict(sorted(PUBLISHED.items()))


sys.modules[__name__].__class__ = _CallableModule
