// Depthwise filtering with kernels sliced from a low-resolution grid at every pixel.
//
//   k[b, t, c, p] = sum_ij lerp_y(p, i) * lerp_x(p, j) * grid[b, t * F + c / share, i, j]
//   y[b, c, p]    = sum_t k[b, t, c, p] * x[b, c, p + off(t)]  (+ the same lerp of offset[b, c / share] at p)
//
// x, y: (B, C, H, W)   grid: (B, T * F, gh, gw), tap-major   offset: (B, F, gh, gw) or null   share = C / F
//
// Between two grid rows a pixel row's kernels are (1 - v) * upper + v * lower, where upper and lower are
// these grid rows interpolated along the columns: small tables that hold for every pixel row in between.
#pragma once

#include <cstdint>

#include "shared.h"

namespace edgedyn {

struct SlicedDepthwise2d {
  int64_t batch, channels, height, width;
  int64_t filters, grid_height, grid_width;
  int64_t side, dilation;
  bool align_corners;
};

// Where a pixel lies between two cells of the grid.
struct Cell {
  int64_t low, high;
  float weight;  // of high
};

// Exact integers up to the one division that makes the weight: a float position would be off by cells *
// 2^-24.
EDGEDYN_HD Cell locate(int64_t pixel, int64_t size, int64_t cells, bool align_corners) {
  int64_t position = align_corners ? pixel * (cells - 1) : (2 * pixel + 1) * cells - size;
  const int64_t unit = align_corners ? (size > 1 ? size - 1 : 1) : 2 * size;
  if (position < 0) position = 0;
  const int64_t low = position / unit;
  return {low, low + 1 < cells ? low + 1 : cells - 1,
          static_cast<float>(position - low * unit) / static_cast<float>(unit)};
}

EDGEDYN_HD float lerp(float low, float high, float weight) { return low * (1 - weight) + high * weight; }

template <typename T>
EDGEDYN_HD float slice(const T* plane, int64_t grid_width, const Cell& row, const Cell& column) {
  const T* upper = plane + row.low * grid_width;
  const T* lower = plane + row.high * grid_width;
  return lerp(
      lerp(static_cast<float>(upper[column.low]), static_cast<float>(lower[column.low]), row.weight),
      lerp(static_cast<float>(upper[column.high]), static_cast<float>(lower[column.high]), row.weight),
      column.weight);
}

// One output pixel by the definition; a pixel outside of x is 0, and its tap is still multiplied: 0 * inf is
// NaN. x is a pointer, or Pixels, which converts stored pixels to real ones.
template <typename X, typename T>
EDGEDYN_HD float filter_pixel(const SlicedDepthwise2d& p, const X& x, const T* grid, const T* offset,
                              int64_t b, int64_t c, int64_t h, int64_t w) {
  const Cell row = locate(h, p.height, p.grid_height, p.align_corners);
  const Cell column = locate(w, p.width, p.grid_width, p.align_corners);
  const int64_t cells = p.grid_height * p.grid_width;
  const int64_t filter = c / (p.channels / p.filters);
  const auto plane = x + (b * p.channels + c) * p.height * p.width;
  float sum = 0;
  for (int64_t t = 0; t < p.side * p.side; ++t) {
    const int64_t i = h + (t / p.side - p.side / 2) * p.dilation;
    const int64_t j = w + (t % p.side - p.side / 2) * p.dilation;
    const bool is_inside = i >= 0 && i < p.height && j >= 0 && j < p.width;
    const float value = is_inside ? static_cast<float>(plane[i * p.width + j]) : 0.0f;
    const T* taps = grid + ((b * p.side * p.side + t) * p.filters + filter) * cells;
    sum += slice(taps, p.grid_width, row, column) * value;
  }
  return offset ? sum + slice(offset + (b * p.filters + filter) * cells, p.grid_width, row, column) : sum;
}

}  // namespace edgedyn
