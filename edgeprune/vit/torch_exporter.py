"""torch's ONNX exporter without the work that these models do not need: the same graph in half of the time.

It replaces functions inside torch. A version of torch that has them elsewhere exports as usual, only slower.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any
from unittest import mock

LOGGERS = {"torch.onnx": logging.ERROR, "onnxscript": logging.ERROR, "onnx_ir": logging.ERROR}


@contextmanager
def quiet_and_fast() -> Iterator[None]:
    """Silence the exporter, which logs its opset conversion on every call, and make it fast; failures raise."""
    with ExitStack() as stack:
        for name, level in LOGGERS.items():
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(level)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_operators_read_once())
        stack.enter_context(_decomposed_where_needed())
        yield


@contextmanager
def _operators_read_once() -> Iterator[None]:
    """Keep the table of operators from one export to the next; torch and onnxscript read it for each."""
    from torch.onnx._internal.exporter import _registration

    table: Any = getattr(_registration, "ONNXRegistry", None)
    read = getattr(table, "from_torchlib", None)
    if read is None:
        yield
        return
    with mock.patch.object(table, "from_torchlib", partial(_operators, read)):
        yield


@cache
def _operators(read: Any, **options: int) -> Any:
    return read(**options)


@contextmanager
def _decomposed_where_needed() -> Iterator[None]:
    """Let torch take operators apart only where one of a program has no ONNX form; it traces the program again."""
    from torch.onnx._internal.exporter import _fx_passes

    decompose: Any = getattr(_fx_passes, "decompose_with_registry", None)
    if decompose is None:
        yield
        return

    def decomposed(program: Any, registry: Any) -> Any:
        return program if translatable(program.graph, registry.functions) else decompose(program, registry)

    with mock.patch.object(_fx_passes, "decompose_with_registry", decomposed):
        yield


def translatable(graph: Any, known: Any) -> bool:
    """Has every operator of a torch.fx graph a translation in `known`, by name, as it stands?

    The two operators that reducers add and that have none are written, in place, as others: a detached constant is
    the constant, a conversion is a copy. An operator that changes its input is taken apart by torch.
    """
    import torch

    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (aten.detach.default, aten.detach_.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.args[1]}
        elif node.target is not aten._assert_tensor_metadata.default:  # the exporter removes assertions
            overload = isinstance(node.target, torch._ops.OpOverload)
            name = node.target.name() if overload else node.target
            if name not in known or (overload and node.target._schema.is_mutable):
                return False
    return True
