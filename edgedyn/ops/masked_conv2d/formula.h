// Convolution evaluated only where a mask is set; zero elsewhere, bias included.
//
//   y[b, o, p] = a(bias[o] + sum_{i, t} weight[o, i, t] * x[b, g(o) + i, s p + d off(t)])   where mask[b, p]
//   is 1 y[b, o, p] = 0                                                                          where
//   mask[b, p] is 0
//
// x: (B, I, H, W)   weight: (O, I / groups, R, R)   bias: (O,) or null   mask: (B, 1, h, w) of 0 and 1
// y: (B, O, h, w)   s stride, d dilation, g(o) the first channel of o's group, a activation
//
// Nothing ties an active position to its neighbours, so any 32 of them are the columns of a small matrix and
// their convolution is weight times matrix: a mask removes whole columns, and the product stays dense.
// Gathering an entry costs as much as several multiply-adds, and pays where the entry then meets many output
// channels. A depthwise kernel uses each entry once: there it is cheaper to filter the neighbours of an
// active position along with it.
#pragma once

#include <cstdint>

#include "shared.h"

namespace edgedyn {

enum class Activation { kNone, kRelu, kRelu6 };

struct MaskedConv2d {
  int64_t batch, channels, height, width;
  int64_t outputs, out_height, out_width;
  int64_t side, stride, padding, dilation, groups;
  Activation activation;
};

// NaN compares false and stays NaN, as in torch.
EDGEDYN_HD float activate(Activation activation, float y) {
  if (activation != Activation::kNone && y < 0) return 0;
  return activation == Activation::kRelu6 && y > 6 ? 6 : y;
}

// One output pixel by the definition; a pixel outside of x is 0, and its tap is still multiplied: 0 * inf is
// NaN.
template <typename T>
EDGEDYN_HD float convolve_pixel(const MaskedConv2d& p, const T* x, const T* weight, const T* bias,
                                const T* mask, int64_t b, int64_t o, int64_t h, int64_t w) {
  if (static_cast<float>(mask[(b * p.out_height + h) * p.out_width + w]) == 0) return 0;
  const int64_t depth = p.channels / p.groups;
  const int64_t first = o / (p.outputs / p.groups) * depth;
  float sum = bias ? static_cast<float>(bias[o]) : 0;
  for (int64_t i = 0; i < depth; ++i) {
    for (int64_t t = 0; t < p.side * p.side; ++t) {
      const int64_t row = h * p.stride - p.padding + t / p.side * p.dilation;
      const int64_t column = w * p.stride - p.padding + t % p.side * p.dilation;
      const bool is_inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
      const int64_t at = ((b * p.channels + first + i) * p.height + row) * p.width + column;
      const float value = is_inside ? static_cast<float>(x[at]) : 0.0f;
      sum += static_cast<float>(weight[(o * depth + i) * p.side * p.side + t]) * value;
    }
  }
  return activate(p.activation, sum);
}

}  // namespace edgedyn
