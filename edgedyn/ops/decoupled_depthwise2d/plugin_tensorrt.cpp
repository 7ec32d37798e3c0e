// DecoupledDepthwise2d for TensorRT: a shell around the CUDA kernel.
#include "tensorrt.h"

extern "C" int edgedyn_decoupled_depthwise2d(const edgedyn::Call* call);

namespace edgedyn::plugins {

// (B, C, h, w): the pixels are those of the spatial filter
static nvinfer1::DimsExprs output(const nvinfer1::DimsExprs* inputs, Dimensions&) {
  return {4, {inputs[0].d[0], inputs[0].d[1], inputs[2].d[2], inputs[2].d[3]}};
}

static Creator creator({"DecoupledDepthwise2d",
                        {"x", "channel_filter", "spatial_filter"},
                        {"kernel_size", "stride", "dilation", "heads", "combine"},
                        output,
                        edgedyn_decoupled_depthwise2d});

}  // namespace edgedyn::plugins
