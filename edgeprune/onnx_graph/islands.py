"""Which nodes of an fp32 graph stay in fp32 in fp16: those that decide or sum in a cut, RMSNorm, pooling by sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import onnx

from edgeprune.onnx_graph.graph import linear_layers

Nodes = list[onnx.NodeProto]

REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2"}
# These compute nothing: in fp32 where their input is and a result of theirs is taken in fp32.
SHAPING_OPS = {"Reshape", "Transpose", "Squeeze", "Unsqueeze"}
MOVING_OPS = SHAPING_OPS | {"Slice", "Split", "Gather", "Concat", "Expand", "Identity"}
# Within a cut.
COMPUTING = REDUCTIONS | {"Add", "Sub", "Mul", "Div", "Clip", "Max", "Min", "Softmax", "MatMul", "TopK", "ArgMax"}
COMPUTING |= {"Greater", "Cast"}


def islands(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that stay in fp32, besides norms and reductions, of which every single one does."""
    flow = _Flow(model)
    return flow.cuts() | flow.rms_norms() | flow.pooling()


class _Flow:
    """A graph's nodes, and what is before and after each."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = model.graph.node
        self.made = {output: node for node in self.nodes for output in node.output}
        self.used: dict[str, Nodes] = {}
        for node in self.nodes:
            for name in node.input:
                self.used.setdefault(name, []).append(node)
        self.layers = {node.name for node in linear_layers(model)}
        self.means = [
            (node, self.made[node.input[0]])
            for node in self.nodes
            if node.op_type == "ReduceMean" and node.input[0] in self.made
        ]

    def normalised(self, name: str) -> bool:
        """Are these tokens, or their transpose, divided by their length?"""
        node = self.made.get(name)
        while node is not None and node.op_type in SHAPING_OPS:
            node = self.made.get(node.input[0])
        if node is None or node.op_type != "Div":
            return False
        length = self.made.get(node.input[1])
        return length is not None and length.op_type == "ReduceL2"

    def before(self, node: onnx.NodeProto) -> Nodes:
        """What makes the inputs of a node.

        Left out is what would lead into the residual stream: tokens whose length is computed, tokens that are divided
        by it, and tokens that are compared with such.
        """
        names = list(node.input)
        if node.op_type == "ReduceL2":
            names = []
        elif node.op_type == "Div" and self.normalised(node.output[0]):
            names = names[1:]
        elif node.op_type == "MatMul":
            names = [name for name in names if self.normalised(name)] or names
        return [self.made[name] for name in names if name in self.made]

    def after(self, node: onnx.NodeProto) -> Nodes:
        """What takes the outputs of a node."""
        return [other for name in node.output for other in self.used.get(name, [])]

    def closure(
        self,
        start: Iterable[onnx.NodeProto],
        ops: Collection[str],
        last: str,
        ahead: Callable[[onnx.NodeProto], Nodes],
    ) -> set[str]:
        """Names of nodes reached from `start` through `ops`, up to and including nodes of type `last`."""
        found: set[str] = set()
        todo = list(start)
        while todo:
            node = todo.pop()
            if node.name not in found and node.name not in self.layers and node.op_type in ops:
                found.add(node.name)
                todo += ahead(node) if node.op_type != last else []
        return found

    def cuts(self) -> set[str]:
        """What decides or sums in cuts.

        From the softmax to the scores, from the scores to what they weigh, and from a one-hot matrix or a sum of
        tokens to the tokens that come out.
        """
        nodes, before, after, closure = self.nodes, self.before, self.after, self.closure
        choices = [node for node in nodes if node.op_type in ("TopK", "ArgMax")]
        decided = closure(choices, COMPUTING | SHAPING_OPS, "Softmax", before)
        moved = [n for node in nodes if node.name in decided for n in before(node) if n.op_type in MOVING_OPS]
        # not into the stream
        decided |= closure(moved, MOVING_OPS | REDUCTIONS | {"Div", "Softmax"}, "Softmax", before)
        # EViT weighs tokens by their scores.
        weighing = [
            n for choice in choices for n in self.used[choice.input[0]] if n.op_type not in ("TopK", "ArgMax")
        ]
        weighed = closure(weighing, (COMPUTING | MOVING_OPS) - {"Concat", "MatMul"}, "TopK", after)
        one_hot = [node for node in nodes if node.op_type == "Equal"]
        folded = closure(one_hot, {"Equal", "Cast", "Transpose", "MatMul", "Mul", "Add", "Div"}, "Div", after)
        folded |= {n.name for node in nodes if node.name in folded for n in before(node) if n.op_type == "Mul"}
        sums = [other for node in nodes if node.op_type == "ReduceSum" for other in after(node)]
        found = decided | weighed | folded | closure(sums, {"Sub", "Div"}, "Div", after)
        return {node.name for node in nodes if node.name in found and node.op_type not in MOVING_OPS}

    def rms_norms(self) -> set[str]:
        """RMSNorm, from the squares, which overflow fp16 from 256 on, to the product with the root's reciprocal."""
        squares = [(mean, square) for mean, square in self.means if is_square(square)]
        roots = [node for mean, _ in squares for node in self.after(mean)]
        found = self.closure(roots, {"Add", "Sqrt", "Reciprocal", "Div", "Mul"}, "Mul", self.after)
        return found | {square.name for _, square in squares}

    def pooling(self) -> set[str]:
        """Average pooling of tokens that stand for several patches: their products with that number, and the mean."""
        starts = [node for _, node in self.means if not is_square(node)]
        found = self.closure(starts, {"Slice", "Concat", "Mul"}, "Mul", self.before)
        products = [node for node in self.nodes if node.name in found and node.op_type == "Mul"]
        shares = {n.name for node in products for n in self.before(node) if n.op_type == "Div"}
        return found | shares if products else set()


def is_square(node: onnx.NodeProto) -> bool:
    """Is a value multiplied by itself, or raised to a power?"""
    return node.op_type == "Pow" or (node.op_type == "Mul" and node.input[0] == node.input[1])
