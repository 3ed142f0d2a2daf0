"""Second-order methods: published compositions of parts, by name."""

from fxcurv.methods.adahessian import adahessian
from fxcurv.methods.adam import adam
from fxcurv.methods.diag import diag
from fxcurv.methods.ekfac import ekfac
from fxcurv.methods.foof import foof
from fxcurv.methods.hessian_free import hessian_free
from fxcurv.methods.kfac import kfac
from fxcurv.methods.method import Method
from fxcurv.methods.registry import PUBLISHED, get_method, published
from fxcurv.methods.sgd import sgd
from fxcurv.methods.shampoo import shampoo

__all__ = [
    "PUBLISHED",
    "Method",
    "adahessian",
    "adam",
    "diag",
    "ekfac",
    "foof",
    "get_method",
    "hessian_free",
    "kfac",
    "published",
    "sgd",
    "shampoo",
]
