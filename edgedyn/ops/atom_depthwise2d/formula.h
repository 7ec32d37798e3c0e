// Depthwise filtering with kernels that every pixel mixes anew from a few fixed bases.
//
//   k[b, m, t, p]      = sum_k alpha[b, m * K + k, p] * bases[k, t]
//   y[b, m * C + c, p] = sum_t k[b, m, t, p] * x[b, c, p * stride + off(t)]
//
// x: (B, C, H, W)   alpha: (B, M * K, h, w)   bases: (K, T)   y: (B, M * C, h, w)   h = ceil(H / stride), w
// likewise
//
// Zero padding R / 2, odd R, T = R * R taps row-major. In this order a pixel costs M * K * T + C * M * T
// multiply-adds, the first term shared by all channels; with the bases first it costs C * K * T + C * M * K,
// which is less only where C is small or K is far below M (ACDA has K = M * (R / 2)). Both terms are small
// matrix products at every pixel: a kernel that keeps the M * T mixed taps of a strip of pixels in scratch
// uses a loaded tap for several channels, and a loaded pixel of x for several kernels.
#pragma once

#include <cstdint>

#include "shared.h"

namespace edgedyn {

struct AtomDepthwise2d {
  int64_t batch, channels, height, width;
  int64_t kernels, bases;
  int64_t side, stride;

  EDGEDYN_HD int64_t out_height() const { return height > 0 ? (height - 1) / stride + 1 : 0; }
  EDGEDYN_HD int64_t out_width() const { return width > 0 ? (width - 1) / stride + 1 : 0; }
};

// One tap of the kernel of one pixel: alpha points at its first coefficient, `pixels` apart from the next.
template <typename T>
EDGEDYN_HD float mix_tap(const AtomDepthwise2d& p, const T* alpha, const T* bases, int64_t pixels,
                         int64_t t) {
  float sum = 0;
  for (int64_t k = 0; k < p.bases; ++k) {
    sum += static_cast<float>(alpha[k * pixels]) * static_cast<float>(bases[k * p.side * p.side + t]);
  }
  return sum;
}

// One output pixel by the definition; a pixel outside of x is 0, and its tap is still multiplied: 0 * inf is
// NaN. x is a pointer, or Pixels, which converts stored pixels to real ones.
template <typename X, typename T>
EDGEDYN_HD float filter_pixel(const AtomDepthwise2d& p, const X& x, const T* alpha, const T* bases, int64_t b,
                              int64_t m, int64_t c, int64_t h, int64_t w) {
  const int64_t pixels = p.out_height() * p.out_width();
  const auto plane = x + (b * p.channels + c) * p.height * p.width;
  const T* mix = alpha + (b * p.kernels + m) * p.bases * pixels + h * p.out_width() + w;
  float sum = 0;
  for (int64_t t = 0; t < p.side * p.side; ++t) {
    const int64_t i = h * p.stride + t / p.side - p.side / 2;
    const int64_t j = w * p.stride + t % p.side - p.side / 2;
    const bool is_inside = i >= 0 && i < p.height && j >= 0 && j < p.width;
    const float value = is_inside ? static_cast<float>(plane[i * p.width + j]) : 0.0f;
    sum += mix_tap(p, mix, bases, pixels, t) * value;
  }
  return sum;
}

}  // namespace edgedyn
