// The work of inverted_residual: its arguments, and how the output is cut into tiles whose hidden maps stay
// in a core's cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "inverted_residual/formula.h"

// Before a loop over the registers of a tile: GCC keeps an array in registers only if its loops are unrolled
// early.
#define EDGEDYN_UNROLL _Pragma("GCC unroll 8")

namespace edgedyn {

// A layer of a block as the runtime hands it over. T: the type of the weights; scales of int8 weights, one
// per output channel.
template <typename T>
struct LayerTensors {
  const T* weight;
  const float* scales;
  const float* bias;
  const float* slopes;
};

template <typename T>
struct BlockArguments {
  InvertedResidual p;
  const float* x;
  LayerTensors<T> expand, depthwise, project;
  const float* mask;
  float* y;
  Quantization of_x, of_hidden, of_filtered;  // INT8 only
};

constexpr int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Output rows [row, row + rows) and columns [column, column + columns) of one sample.
struct BlockTile {
  int64_t sample, row, rows, column, columns;
};

// A step computes four hidden rows of a tile (a quad), and from two quads 4 / stride rows of y.
constexpr int64_t kQuad = 4;

// How y is cut into tiles. Hidden maps take `words` words of 32 bits per column, and a tile is as wide as the
// budget in bytes allows.
struct BlockGrid {
  BlockGrid(const InvertedResidual& p, int64_t words, int64_t lanes, int64_t budget) : p(p) {
    const int64_t room = std::max(budget / 4 / words, 2 * lanes) / lanes * lanes;  // hidden columns
    const int64_t widest = std::max<int64_t>((room - p.side) / p.stride + 1, 1);
    const int64_t strips = (p.out_width + widest - 1) / widest;
    columns = (p.out_width + strips - 1) / strips;
    const int64_t step = kQuad / p.stride;
    rows = std::clamp<int64_t>(RoundUp(p.out_height / 8, step), 2 * step, 16 * step);
    across = (p.out_width + columns - 1) / columns, down = (p.out_height + rows - 1) / rows;
  }

  int64_t count() const { return p.batch * down * across; }

  BlockTile tile(int64_t index) const {
    const int64_t column = index % across * columns, row = index / across % down * rows;
    return {index / across / down, row, std::min(rows, p.out_height - row), column,
            std::min(columns, p.out_width - column)};
  }

  // Columns of the hidden map that a tile reads, padding included.
  int64_t hidden_columns() const { return (columns - 1) * p.stride + p.side; }

  InvertedResidual p;
  int64_t rows, columns, down, across;
};

}  // namespace edgedyn
