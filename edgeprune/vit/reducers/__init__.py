"""The interface of reducers, the ways of removing tokens: plain functions of tensors."""

from __future__ import annotations

import importlib

from edgeprune.defaults import METHODS
from edgeprune.errors import InputError
from edgeprune.vit.tokens import Reducer


def check_method(method: str) -> None:
    """Raise InputError for an unknown method; imports none."""
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")


def reducer_named(method: str) -> Reducer | None:
    """The reducer of a method: the function of its name in the module of its name; None for `none`.

    Raises InputError.
    """
    check_method(method)
    if method == "none":
        return None
    reducer: Reducer = getattr(importlib.import_module(f"edgeprune.vit.reducers.{method}"), method)
    return reducer
