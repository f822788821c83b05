"""The interface of reducers, the ways of removing tokens: plain functions of tensors."""

from __future__ import annotations

import importlib

from edgeprune.defaults import METHODS
from edgeprune.errors import InputError
from edgeprune.onnx_graph.graph import MOST_SORTED
from edgeprune.records import Vit, text_of
from edgeprune.vit.tokens import Reducer


def check_method(method: str) -> None:
    """Raise InputError for an unknown method; imports none."""
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")


def sorted_tokens(method: str, vit: Vit) -> int:
    """The most tokens that the first cut by a method sorts, however many it keeps: TopK's size in the ONNX."""
    body = vit.tokens - vit.prefix
    return {"fold": vit.tokens, "evit": body, "tome": body // 2}.get(method, 0)


def check_sorted(method: str, vit: Vit) -> None:
    """Raise InputError where a first cut by a method sorts more tokens than TensorRT can (sorts_or_raise)."""
    count = sorted_tokens(method, vit)
    if count > MOST_SORTED:
        raise InputError(
            f"{method} sorts {count} tokens of {vit.name} at {text_of(vit.image_px)} px, TensorRT at most "
            f"{MOST_SORTED}: use --method topk or pomt, or a smaller --image-size"
        )


def reducer_named(method: str) -> Reducer | None:
    """The reducer of a method: the function of its name in the module of its name; None for `none`.

    Raises InputError.
    """
    check_method(method)
    if method == "none":
        return None
    reducer: Reducer = getattr(importlib.import_module(f"edgeprune.vit.reducers.{method}"), method)
    return reducer
