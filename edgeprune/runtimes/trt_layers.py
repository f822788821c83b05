"""fp32 islands where TensorRT does not keep the types of the ONNX: 8.6, and `typing = "weak"` on 10."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def keep_islands(trt: Any, network: Any, config: Any, computed: Mapping[str, str | None]) -> int:
    """Fix the layers of nodes that compute in fp32 to fp32, and have the builder obey; returns how many layers.

    A weakly typed builder with the FP16 flag picks the type of every layer by speed; a cast in the ONNX is a layer
    like others and forces nothing before or after it (NVIDIA/TensorRT#1196, #4050). So each layer gets a precision
    and output types. `computed` is `value_types.computed_in` of the ONNX. Layers are matched by the names of their
    outputs, which are those of the ONNX; layers without such a name were added for the next node that has one
    (source: onnx-tensorrt, ImporterContext::registerTensor; seen with the real 8.6.0 parser). Which layers may be
    given a type is as in trtexec (source: NVIDIA/TensorRT, samples/common/sampleEngines.cpp, setLayerPrecisions).
    """
    if not hasattr(trt.BuilderFlag, "OBEY_PRECISION_CONSTRAINTS"):  # 11, which keeps types always
        return 0
    if "fp32" not in computed.values():
        return 0
    floats = (trt.DataType.FLOAT, trt.DataType.HALF)
    fixed = (trt.LayerType.CONSTANT, trt.LayerType.CAST, trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE)
    waiting: list[Any] = []
    count = 0
    for index in range(network.num_layers):
        waiting.append(network.get_layer(index))
        names = _outputs(waiting[-1])
        known = [computed[name] for name in names if name in computed]
        if not known:
            continue
        for layer in waiting if "fp32" in known else ():
            ends = [layer.get_input(i) for i in range(layer.num_inputs)]
            ends += [layer.get_output(i) for i in range(layer.num_outputs)]
            if layer.type in fixed or not any(end is not None and end.dtype in floats for end in ends):
                continue
            layer.precision = trt.DataType.FLOAT
            for i in range(layer.num_outputs):
                if layer.get_output(i).dtype in floats:
                    layer.set_output_type(i, trt.DataType.FLOAT)
            count += 1
        waiting.clear()
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    return count


def _outputs(layer: Any) -> list[str]:
    return [str(layer.get_output(i).name) for i in range(layer.num_outputs)]
