// SlicedDepthwise2d for TensorRT: a shell around the CUDA kernel.
#include "tensorrt.h"

extern "C" int edgedyn_sliced_depthwise2d(const edgedyn::Call* call);

namespace edgedyn::plugins {

static Creator creator({"SlicedDepthwise2d",
                        {"x", "grid", "offset?"},
                        {"kernel_size", "dilation", "align_corners"},
                        [](const nvinfer1::DimsExprs* inputs, Dimensions&) { return inputs[0]; },
                        edgedyn_sliced_depthwise2d});

}  // namespace edgedyn::plugins
