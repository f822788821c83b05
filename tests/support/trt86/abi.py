"""C++ objects made of Python ones, by the public headers of TensorRT 8.6 (Itanium ABI, x86-64)."""

from __future__ import annotations

import ctypes as C

MAX = 8
DTYPES = ("FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8")  # nvinfer1::DataType
FLOAT, HALF, INT8, INT32, BOOL = range(5)
REAL = (FLOAT, HALF)


class Dims(C.Structure):
    _fields_ = [("n", C.c_int32), ("d", C.c_int32 * MAX)]


class Weights(C.Structure):
    _fields_ = [("type", C.c_int32), ("values", C.c_void_p), ("count", C.c_int64)]


# The virtual functions of each class in order, after its two destructors, as "name:RETURN ARGUMENTS" with
# v void, b bool, i int32, u uint32, f float, d double, s text, p an object or address, D Dims and W Weights by value.
NETWORK = """
addInput:psiD markOutput:vp addConvolution:ppiDWW addFullyConnected:ppiWW addActivation:ppi addPooling:ppiD
addLRN:ppifff addScale:ppiWWW addSoftMax:pp addConcatenation:ppi addDeconvolution:ppiDWW addElementWise:pppi
addUnary:ppi addPadding:ppDD addShuffle:pp getNbLayers:i getLayer:pi getNbInputs:i getInput:pi getNbOutputs:i
getOutput:pi addReduce:ppiub addTopK:ppiiu addGather:pppi addRaggedSoftMax:ppp addMatrixMultiply:ppipi
addConstant:pDW addRNNv2:ppiiii addIdentity:pp removeTensor:vp unmarkOutput:vp addPluginV2:ppip addSlice:ppDDD
setName:vs getName:s addShape:pp hasImplicitBatchDimension:b markOutputForShapes:bp unmarkOutputForShapes:bp
addParametricReLU:ppp addConvolutionNd:ppiDWW addPoolingNd:ppiD addDeconvolutionNd:ppiDWW addScaleNd:ppiWWWi
addResize:pp hasExplicitPrecision:b addLoop:p addSelect:pppp addFill:pDi addPaddingNd:ppDD setWeightsName:bWs
setErrorRecorder:vp getErrorRecorder:p addDequantize:ppp addQuantize:ppp addGatherV2:pppi addIfConditional:p
addScatter:ppppi addEinsum:ppis addAssertion:pps addOneHot:ppppi addNonZero:pp addGridSample:ppp addNMS:pppp
addReverseSequence:ppp addNormalization:ppppu addCast:ppi getBuilder:p
"""
TENSOR = """
setName:vs getName:s setDimensions:vD getDimensions:D setType:vi getType:i setDynamicRange:bff isNetworkInput:b
isNetworkOutput:b setBroadcastAcrossBatch:vb getBroadcastAcrossBatch:b getLocation:i setLocation:vi
dynamicRangeIsSet:b resetDynamicRange:v getDynamicRangeMin:f getDynamicRangeMax:f setAllowedFormats:vu
getAllowedFormats:u isShapeTensor:b isExecutionTensor:b setDimensionName:vis getDimensionName:si
"""
LAYER = """
getType:i setName:vs getName:s getNbInputs:i getInput:pi getNbOutputs:i getOutput:pi setInput:vip setPrecision:vi
getPrecision:i precisionIsSet:b resetPrecision:v setOutputType:vii getOutputType:ii outputTypeIsSet:bi
resetOutputType:vi setMetadata:vs getMetadata:s
"""


def pairs(text: str) -> str:
    """A setter and a getter for every Name:type."""
    return " ".join(f"set{n}:v{t} get{n}:{t}" for n, t in (word.split(":") for word in text.split()))


def mirrored(text: str) -> str:
    """A getter and a setter for every Name:type: some classes declare them the other way round."""
    return " ".join(f"get{n}:{t} set{n}:v{t}" for n, t in (word.split(":") for word in text.split()))


# kind: number in nvinfer1::LayerType, virtual functions of its own class
LAYERS = {
    "Convolution": (0, pairs("""
        KernelSize:D NbOutputMaps:i Stride:D Padding:D NbGroups:i KernelWeights:W BiasWeights:W Dilation:D
        PrePadding:D PostPadding:D PaddingMode:i KernelSizeNd:D StrideNd:D PaddingNd:D DilationNd:D
    """)),
    "Activation": (2, "setActivationType:vi getActivationType:i setAlpha:vf setBeta:vf getAlpha:f getBeta:f"),
    "Scale": (5, pairs("Mode:i Shift:W Scale:W Power:W") + " getChannelAxis:i setChannelAxis:vi"),
    "SoftMax": (6, pairs("Axes:u")),
    "Concatenation": (8, pairs("Axis:i")),
    "ElementWise": (9, pairs("Operation:i")),
    "Unary": (11, pairs("Operation:i")),
    "Shuffle": (13, """
        setFirstTranspose:vp getFirstTranspose:p setReshapeDimensions:vD getReshapeDimensions:D setSecondTranspose:vp
        getSecondTranspose:p setZeroIsPlaceholder:vb getZeroIsPlaceholder:b
    """),
    "Reduce": (14, pairs("Operation:i ReduceAxes:u KeepDimensions:b")),
    "TopK": (15, pairs("Operation:i K:i ReduceAxes:u")),
    "Gather": (16, pairs("GatherAxis:i NbElementWiseDims:i Mode:i")),
    "MatrixMultiply": (17, "setOperation:vii getOperation:ii"),
    "Constant": (19, pairs("Weights:W Dimensions:D")),
    "Identity": (21, ""),
    "Slice": (23, pairs("Start:D Size:D Stride:D Mode:i")),
    "Shape": (24, ""),
    "Select": (31, ""),
    "Quantize": (33, mirrored("Axis:i")),
    "Dequantize": (34, mirrored("Axis:i")),
    "Assertion": (40, pairs("Message:s")),
    "OneHot": (41, mirrored("Axis:i")),
    "Normalization": (46, pairs("Epsilon:f Axes:u NbGroups:i ComputePrecision:i")),
    "Cast": (47, pairs("ToType:i")),
}  # fmt: skip
# Operations by their number.
ELEMENTWISE = (
    "SUM", "PROD", "MAX", "MIN", "SUB", "DIV", "POW", "FLOOR_DIV", "AND", "OR", "XOR", "EQUAL", "GREATER", "LESS",
)  # fmt: skip
UNARY = (
    "EXP", "LOG", "SQRT", "RECIP", "ABS", "NEG", "SIN", "COS", "TAN", "SINH", "COSH", "ASIN", "ACOS", "ATAN", "ASINH",
    "ACOSH", "ATANH", "CEIL", "FLOOR", "ERF", "NOT", "SIGN", "ROUND", "ISINF",
)  # fmt: skip
REDUCE = ("SUM", "PROD", "MAX", "MIN", "AVG")
KINDS = {"v": None, "b": C.c_bool, "i": C.c_int32, "u": C.c_uint32, "f": C.c_float, "d": C.c_double, "s": C.c_char_p,
         "p": C.c_void_p, "D": Dims, "W": Weights}  # fmt: skip
KEPT: list[object] = []  # whatever C++ points at lives as long as the process


class StandInError(Exception):
    """The stand-in for the network is asked for something it does not know: no verdict."""


NOTHING = C.CFUNCTYPE(C.c_void_p)(lambda: None)


def vtable(methods: str, call) -> int:
    """Address of a table of virtual functions; each calls call(this, name, arguments)."""
    entries = [C.CFUNCTYPE(None, C.c_void_p)(lambda this: None)] * 2  # the two destructors of the Itanium ABI
    for method in methods.split():
        name, kinds = method.split(":")
        entries.append(_function(name, kinds[0], kinds[1:], call))
    table = (C.c_void_p * (len(entries) + 2))(None, None, *(C.cast(e, C.c_void_p) for e in entries))
    KEPT.append((entries, table))
    return C.addressof(table) + 16  # offset to top and type information come first


def _function(name: str, returned: str, given: str, call):
    large = returned in "DW"  # a struct of this size comes back through an address that is passed first
    kind = C.c_void_p if large or returned == "s" else KINDS[returned]
    head = [C.c_void_p, C.c_void_p] if large else [C.c_void_p]

    def entry(*args):
        result = call(args[1] if large else args[0], name, args[len(head) :])
        if large:
            C.memmove(args[0], C.byref(result), C.sizeof(result))
            return args[0]
        if returned == "s":
            return _text(result)
        return None if returned == "v" else 0 if result is None and returned != "p" else result

    return C.CFUNCTYPE(kind, *head, *(KINDS[k] for k in given))(entry)


_texts: dict[bytes, C.Array] = {}


def _text(value: bytes | None) -> int:
    value = value or b""
    if value not in _texts:
        _texts[value] = C.create_string_buffer(value)
    return C.addressof(_texts[value])


def cpp_object(*words: int) -> int:
    memory = (C.c_void_p * max(len(words), 4))(*words)
    KEPT.append(memory)
    return C.addressof(memory)


def copied(value):
    """Structs in arguments live as long as the call."""
    return type(value).from_buffer_copy(value) if isinstance(value, C.Structure) else value


def as_dims(values) -> Dims:
    return Dims(len(values), (C.c_int32 * MAX)(*values))


def as_tuple(dims: Dims) -> tuple[int, ...]:
    return tuple(dims.d[: max(dims.n, 0)])
