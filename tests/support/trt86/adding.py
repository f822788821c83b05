"""The functions with which the parser adds layers to the network."""

from __future__ import annotations

from support.trt86.abi import as_dims


class Adding:
    """Functions of INetworkDefinition, by name."""

    def _markOutput(self, tensor):
        self.outputs.append(self._t(tensor))

    def _unmarkOutput(self, tensor):
        self.outputs.remove(self._t(tensor))

    def _getNbLayers(self):
        return len(self.layers)

    def _getLayer(self, i):
        return self.layers[i].address

    def _getNbInputs(self):
        return len(self.inputs)

    def _getInput(self, i):
        return self.inputs[i].address

    def _getNbOutputs(self):
        return len(self.outputs)

    def _getOutput(self, i):
        return self.outputs[i].address

    def _getName(self):
        return b""

    def _hasImplicitBatchDimension(self):
        return False

    def _setWeightsName(self, weights, name):
        return True

    def _getBuilder(self):
        return self._made_builder

    def _addConvolutionNd(self, x, maps, kernel, weights, bias):
        one = as_dims((1,) * kernel.n)
        none = as_dims((0,) * kernel.n)
        return self._add(
            "Convolution", [self._t(x)], NbOutputMaps=maps, KernelSizeNd=kernel, KernelWeights=weights,
            BiasWeights=bias, StrideNd=one, DilationNd=one, PaddingNd=none, NbGroups=1,
        )  # fmt: skip

    def _addActivation(self, x, kind):
        return self._add("Activation", [self._t(x)], ActivationType=kind)

    def _addScaleNd(self, x, mode, shift, scale, power, axis):
        return self._add("Scale", [self._t(x)], Mode=mode, Shift=shift, Scale=scale, Power=power, ChannelAxis=axis)

    def _addSoftMax(self, x):
        return self._add("SoftMax", [self._t(x)])

    def _addConcatenation(self, things, count):
        return self._add("Concatenation", self._several(things, count))

    def _addElementWise(self, a, b, op):
        return self._add("ElementWise", [self._t(a), self._t(b)], Operation=op)

    def _addUnary(self, x, op):
        return self._add("Unary", [self._t(x)], Operation=op)

    def _addShuffle(self, x):
        return self._add("Shuffle", [self._t(x)])

    def _addReduce(self, x, op, axes, keep):
        return self._add("Reduce", [self._t(x)], Operation=op, ReduceAxes=axes, KeepDimensions=keep)

    def _addTopK(self, x, op, k, axes):
        return self._add("TopK", [self._t(x)], 2, Operation=op, K=k, ReduceAxes=axes)

    def _addGather(self, data, indices, axis):
        return self._add("Gather", [self._t(data), self._t(indices)], GatherAxis=axis, Mode=0, NbElementWiseDims=0)

    def _addGatherV2(self, data, indices, mode):
        return self._add("Gather", [self._t(data), self._t(indices)], GatherAxis=0, Mode=mode, NbElementWiseDims=0)

    def _addMatrixMultiply(self, a, op0, b, op1):
        return self._add("MatrixMultiply", [self._t(a), self._t(b)], Operation0=op0, Operation1=op1)

    def _addConstant(self, dims, weights):
        return self._add("Constant", [], Dimensions=dims, Weights=weights)

    def _addIdentity(self, x):
        return self._add("Identity", [self._t(x)])

    def _addCast(self, x, dtype):
        return self._add("Cast", [self._t(x)], ToType=dtype)

    def _addSlice(self, x, start, size, stride):
        return self._add("Slice", [self._t(x)], Start=start, Size=size, Stride=stride, Mode=0)

    def _addShape(self, x):
        return self._add("Shape", [self._t(x)])

    def _addSelect(self, condition, a, b):
        return self._add("Select", [self._t(condition), self._t(a), self._t(b)])

    def _addQuantize(self, x, scale):
        return self._add("Quantize", [self._t(x), self._t(scale)])

    def _addDequantize(self, x, scale):
        return self._add("Dequantize", [self._t(x), self._t(scale)])

    def _addAssertion(self, condition, message):
        return self._add("Assertion", [self._t(condition)], 0, Message=message)

    def _addOneHot(self, indices, values, depth, axis):
        return self._add("OneHot", [self._t(indices), self._t(values), self._t(depth)], Axis=axis)

    def _addNormalization(self, x, scale, bias, axes):
        return self._add("Normalization", [self._t(x), self._t(scale), self._t(bias)], Axes=axes, NbGroups=1)
