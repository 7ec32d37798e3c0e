// MaskedConv2d for TensorRT: a shell around the CUDA kernel.
#include "tensorrt.h"

extern "C" int edgedyn_masked_conv2d(const edgedyn::Call* call);

namespace edgedyn::plugins {

// (B, O, h, w): the pixels are those of the mask, which stands before the optional bias
static nvinfer1::DimsExprs output(const nvinfer1::DimsExprs* inputs, Dimensions&) {
  return {4, {inputs[0].d[0], inputs[1].d[0], inputs[2].d[2], inputs[2].d[3]}};
}

static Creator creator({"MaskedConv2d",
                        {"x", "weight", "bias?", "mask"},
                        {"stride", "padding", "dilation", "groups", "activation"},
                        output,
                        edgedyn_masked_conv2d});

}  // namespace edgedyn::plugins
