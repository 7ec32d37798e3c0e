// Depthwise filtering whose kernel at (channel, pixel) combines a channel filter and a spatial filter.
//
//   k[b, t, c, p] = channel_filter[b, t * C + c] o spatial_filter[b, t * G + c / share, p]      o is * or +
//   y[b, c, p]    = sum_t k[b, t, c, p] * x[b, c, p * stride + off(t)]
//
// x: (B, C, H, W)   channel_filter: (B, T * C, 1, 1)   spatial_filter: (B, T * G, h, w)   y: (B, C, h, w)
// G heads, share = C / G, T = R * R taps, h = H / stride, w = W / stride, both rounded down
//
// A kernel differs at every channel and pixel, so a tap costs two operations, combining and applying, and
// nothing factors out of the sum. Only reads can be shared: the spatial filter of some pixels serves all
// channels of its head from the first-level cache, and no combined kernel is ever in memory.
#pragma once

#include <cstdint>

#include "shared.h"

namespace edgedyn {

struct DecoupledDepthwise2d {
  int64_t batch, channels, height, width;
  int64_t heads, out_height, out_width;
  int64_t side, stride, dilation;
  bool is_product;  // of the filters; else their sum
};

// One output pixel by the definition; a pixel outside of x is 0, and its tap is still multiplied: 0 * inf is
// NaN. x is a pointer, or Pixels, which converts stored pixels to real ones.
template <typename X, typename T>
EDGEDYN_HD float filter_pixel(const DecoupledDepthwise2d& p, const X& x, const T* channel_filter,
                              const T* spatial_filter, int64_t b, int64_t c, int64_t h, int64_t w) {
  const int64_t taps = p.side * p.side, head = c / (p.channels / p.heads);
  const auto plane = x + (b * p.channels + c) * p.height * p.width;
  float sum = 0;
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t i = h * p.stride + (t / p.side - p.side / 2) * p.dilation;
    const int64_t j = w * p.stride + (t % p.side - p.side / 2) * p.dilation;
    const bool is_inside = i >= 0 && i < p.height && j >= 0 && j < p.width;
    const float value = is_inside ? static_cast<float>(plane[i * p.width + j]) : 0.0f;
    const float channel = static_cast<float>(channel_filter[(b * taps + t) * p.channels + c]);
    const int64_t map = (b * taps + t) * p.heads + head;
    const float spatial = static_cast<float>(spatial_filter[(map * p.out_height + h) * p.out_width + w]);
    sum += (p.is_product ? channel * spatial : channel + spatial) * value;
  }
  return sum;
}

}  // namespace edgedyn
