"""NVIDIA's own ONNX parser of TensorRT 8.6.0 (JetPack 6.0's line) without a GPU: what does it say about a file?

libnvonnxparser.so.8 runs unmodified. It asks nothing of CUDA: it reads ONNX and calls the C++ interface of a network
(nvinfer1::INetworkDefinition). TensorRT hands it a network of libnvinfer, which wants a GPU driver; here it gets a
network written in Python, after the public headers of TensorRT 8.6.

Real: everything that the parser says and decides, that is which nodes it takes, its errors, how it casts INT64, what
it does with INT8 weights, and which layers it asks for with which settings. Stand-in: the network. Shapes and types
of tensors are inferred here by TensorRT's documented rules; `complaints` are breaches of those rules. What libnvinfer
would refuse when it builds, this cannot know.
"""
