// AtomDepthwise2d for TensorRT: a shell around the CUDA kernel.
#include "tensorrt.h"

extern "C" int edgedyn_atom_depthwise2d(const edgedyn::Call* call);

namespace edgedyn::plugins {

// (B, M * C, h, w): alpha has M * K channels for K bases
static nvinfer1::DimsExprs output(const nvinfer1::DimsExprs* inputs, Dimensions& dimensions) {
  const auto &x = inputs[0], &alpha = inputs[1], &bases = inputs[2];
  const auto channels = dimensions.quotient(dimensions.product(x.d[1], alpha.d[1]), bases.d[0]);
  return {4, {x.d[0], channels, alpha.d[2], alpha.d[3]}};
}

static Creator creator({"AtomDepthwise2d",
                        {"x", "alpha", "bases"},
                        {"kernel_size", "stride"},
                        output,
                        edgedyn_atom_depthwise2d});

}  // namespace edgedyn::plugins
