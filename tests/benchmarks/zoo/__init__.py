"""Zoos: lists of models from public libraries and of hand-written ones, random and small, each with an example call.

A zoo is a module here with ``LIBRARY`` (what must be importable, "" for torch alone), ``names()`` (its list) and
``sample(name)`` (the model of a name, which may be any that the library knows, listed or not). They are imported only
where they are used, so that a missing library costs its own zoo alone.
"""

from __future__ import annotations

ZOOS: dict[str, str] = {
    "torchvision": "torchvision_models",
    "timm": "timm_models",
    "transformers": "transformers_models",
    "graph": "graph_models",
    "recurrent": "recurrent_models",
}
"""Module of each zoo."""
