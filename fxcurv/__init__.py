"""fxcurv: curvature for PyTorch by rewriting graphs.

model = fxcurv.transform(net, method="ekfac", example_inputs=(x,), loss="cross_entropy")
...
model.backward(loss, out)
model.precondition_()
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# From a checkout the passes, kernels and cli packages lie beside this folder, not inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").exists() and (_root / "passes").is_dir():
    __path__.append(str(_root))

# Public names load on first use: the command line's help must not wait for torch.
_LAZY = {
    "transform": "fxcurv.runtime",
    "optimizer": "fxcurv.runtime",
    "CurvatureModule": "fxcurv.runtime",
    "StepInfo": "fxcurv.runtime",
    "load": "fxcurv.runtime.artifact",
    "save": "fxcurv.runtime.artifact",
    "Method": "fxcurv.methods",
    "papers": "fxcurv.methods.papers",
    "FxcurvError": "fxcurv.errors",
    "FxcurvWarning": "fxcurv.errors",
}


def __getattr__(name: str) -> Any:
    if name == "methods":  # a package that can be called: fxcurv.methods() lists, fxcurv.methods.kfac is one
        return import_module("fxcurv.methods")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fxcurv' has no attribute '{name}'")
