"""The interface of reducers, the ways of removing tokens: plain functions of tensors."""

from __future__ import annotations

import importlib

from edgeprune.errors import InputError
from edgeprune.vit.tokens import Reducer

REDUCERS = {
    "topk": "edgeprune.vit.reducers.topk:topk",
    "evit": "edgeprune.vit.reducers.evit:evit",
    "pomt": "edgeprune.vit.reducers.pomt:pomt",
    "tome": "edgeprune.vit.reducers.tome:tome",
    "fold": "edgeprune.vit.reducers.fold:fold",
}


def methods() -> tuple[str, ...]:
    """All values of --method."""
    return (*REDUCERS, "none")


def check_method(method: str) -> None:
    """Raise InputError for an unknown method; imports none."""
    if method not in methods():
        raise InputError(f"unknown method {method!r}: choose from {', '.join(methods())}")


def reducer_named(method: str) -> Reducer | None:
    """The reducer of a method; None for `none`, which removes no tokens. Raises InputError."""
    check_method(method)
    if method == "none":
        return None
    module, _, name = REDUCERS[method].partition(":")
    reducer: Reducer = getattr(importlib.import_module(module), name)
    return reducer
