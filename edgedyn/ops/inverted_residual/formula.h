// An inverted residual: 1 x 1 convolution, depthwise convolution, 1 x 1 convolution, each with bias and
// activation.
//
//   hidden[b, e, p]   = a1(expand_bias[e]    + sum_i expand[e, i]    * x[b, i, p])           0 outside of x
//   filtered[b, e, p] = a2(depthwise_bias[e] + sum_t depthwise[e, t] * hidden[b, e, s p + off(t)])
//   y[b, o, p]        = a3(project_bias[o]   + sum_e project[o, e]   * filtered[b, e, p])    where mask is 1
//   y[b, o, p]        = 0                                                                    where mask is 0
//   y                += x                                                                    if residual
//
// x: (B, C, H, W)   expand: (E, C, 1, 1)   depthwise: (E, 1, R, R)   project: (O, E, 1, 1)   mask: (B, 1, h,
// w) of 0 and 1, or null   y: (B, O, h, w)   s stride, a activations; slopes: one per channel, of a PReLU
//
// The padding is of the hidden map, not of x: a hidden value outside of x is 0, not a1(expand_bias).
#pragma once

#include <cstdint>

#include "shared.h"

namespace edgedyn {

enum class BlockActivation { kNone, kRelu, kRelu6, kPrelu, kHardswish };

struct InvertedResidual {
  int64_t batch, channels, height, width;
  int64_t hidden, outputs, out_height, out_width;
  int64_t side, stride;
  BlockActivation expand, depthwise, project;
  bool residual;
};

// NaN compares false and stays NaN, as in torch; hardswish of -inf is NaN there: -inf * 0.
EDGEDYN_HD float Activate(BlockActivation activation, float y, float slope) {
  switch (activation) {
    case BlockActivation::kNone:
      return y;
    case BlockActivation::kRelu:
      return y < 0 ? 0 : y;
    case BlockActivation::kRelu6:
      return y < 0 ? 0 : y > 6 ? 6 : y;
    case BlockActivation::kPrelu:
      return y > 0 ? y : y * slope;
    case BlockActivation::kHardswish:
      return y * (y + 3 < 0 ? 0 : y + 3 > 6 ? 6 : y + 3) / 6;
  }
  return y;
}

// A convolution's weights, biases and slopes; slopes are null without a PReLU.
template <typename T>
struct BlockLayer {
  const T *weight, *bias, *slopes;

  EDGEDYN_HD float Finish(BlockActivation activation, float sum, int64_t channel) const {
    return Activate(activation, sum, slopes ? static_cast<float>(slopes[channel]) : 0);
  }
};

template <typename T>
EDGEDYN_HD float HiddenPixel(const InvertedResidual& p, const T* x, const BlockLayer<T>& expand, int64_t b,
                             int64_t e, int64_t row, int64_t column) {
  if (row < 0 || row >= p.height || column < 0 || column >= p.width) return 0;
  float sum = static_cast<float>(expand.bias[e]);
  for (int64_t i = 0; i < p.channels; ++i) {
    const int64_t at = ((b * p.channels + i) * p.height + row) * p.width + column;
    sum += static_cast<float>(expand.weight[e * p.channels + i]) * static_cast<float>(x[at]);
  }
  return expand.Finish(p.expand, sum, e);
}

// A hidden value outside of x is still multiplied: 0 * inf is NaN.
template <typename T>
EDGEDYN_HD float FilteredPixel(const InvertedResidual& p, const T* x, const BlockLayer<T>& expand,
                               const BlockLayer<T>& depthwise, int64_t b, int64_t e, int64_t h, int64_t w) {
  float sum = static_cast<float>(depthwise.bias[e]);
  for (int64_t t = 0; t < p.side * p.side; ++t) {
    const int64_t row = h * p.stride - p.side / 2 + t / p.side;
    const int64_t column = w * p.stride - p.side / 2 + t % p.side;
    sum += static_cast<float>(depthwise.weight[e * p.side * p.side + t]) *
           HiddenPixel(p, x, expand, b, e, row, column);
  }
  return depthwise.Finish(p.depthwise, sum, e);
}

// One output pixel by the definition.
template <typename T>
EDGEDYN_HD float BlockPixel(const InvertedResidual& p, const T* x, const BlockLayer<T>& expand,
                            const BlockLayer<T>& depthwise, const BlockLayer<T>& project, const T* mask,
                            int64_t b, int64_t o, int64_t h, int64_t w) {
  const float base =
      p.residual ? static_cast<float>(x[((b * p.channels + o) * p.height + h) * p.width + w]) : 0;
  if (mask && static_cast<float>(mask[(b * p.out_height + h) * p.out_width + w]) == 0) return base;
  float sum = static_cast<float>(project.bias[o]);
  for (int64_t e = 0; e < p.hidden; ++e) {
    sum += static_cast<float>(project.weight[o * p.hidden + e]) *
           FilteredPixel(p, x, expand, depthwise, b, e, h, w);
  }
  return base + project.Finish(p.project, sum, o);
}

}  // namespace edgedyn
