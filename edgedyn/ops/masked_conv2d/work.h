// How the work of masked_conv2d is cut: tiles of listed active positions, or bands of rows.
#pragma once

#include <cstdint>

#include "masked_conv2d/formula.h"

namespace edgedyn {

template <typename T>
struct MaskedArguments {
  MaskedConv2d p;
  const T* x;
  const float* weight;
  const float* bias;
  const float* mask;
  T* y;
  Quantization of_x, of_y;
};

inline float Inactive(const float*, const Quantization&) { return 0; }
inline int8_t Inactive(const int8_t*, const Quantization& q) { return static_cast<int8_t>(q.zero_point); }

// The sizes of the matrix product.
constexpr int64_t kPixels = 32;  // of a tile: two vectors of the widest instruction set
constexpr int64_t kDepth = 192;  // entries of a kernel at a time: 24 KiB of pixels, in the first-level cache
constexpr int64_t kOutputs = 128;  // output channels that share gathered pixels: 16 KiB of sums

// A stretch of output positions, [begin, end), and the part of the list that holds its active ones.
struct ActiveTile {
  int64_t begin, end;
  int32_t first, count;
};

// The active ones of the output positions [begin, end), counted through all samples.
struct ActiveList {
  static constexpr int64_t kPositions = 8192;
  static constexpr int64_t kStretch = 512;  // of a tile at most: one that only writes zeros is work, too

  ActiveList(const float* mask, int64_t begin, int64_t end) : begin(begin) {
    int32_t active = 0;
    ActiveTile tile{begin, begin, 0, 0};
    for (int64_t i = begin; i < end; ++i) {
      positions[active] = static_cast<uint16_t>(i - begin);
      active += mask[i] != 0;
      if (active - tile.first < kPixels && i + 1 - tile.begin < kStretch && i + 1 < end) continue;
      tile.end = i + 1, tile.count = active - tile.first;
      tiles[count++] = tile;
      tile = {i + 1, i + 1, active, 0};
    }
  }

  int64_t begin, count = 0;
  ActiveTile tiles[kPositions / kPixels];
  uint16_t positions[kPositions];  // less begin
};

// Blocks [begin, end) of output channels at one tile.
struct TileWork {
  int64_t tile, begin, end;
};

// The band of rows of a depthwise filter, and how many columns fit the scratch beside it.
struct MaskedBand {
  static constexpr int64_t kFloats = 16384;  // 64 KiB per thread
  static constexpr int64_t kRows = 16;
  static constexpr int64_t kColumns = 128;  // more would leave the first-level cache
  static constexpr int64_t kLanes = 16;     // of the widest instruction set
  static constexpr int64_t kChannels = 16;  // that share one reading of the mask

  explicit MaskedBand(const MaskedConv2d& p)
      : reach((p.side - 1) * p.dilation + 1), tile_rows((kRows - 1) * p.stride + reach) {
    const int64_t room = kFloats - tile_rows * (reach - p.stride);
    const int64_t widest = room / (tile_rows * p.stride + kRows) / kLanes * kLanes;
    const int64_t most = widest < kColumns ? widest : kColumns;
    if (most <= 0) return;
    const int64_t strips = (p.out_width + most - 1) / most;
    columns = ((p.out_width + strips - 1) / strips + kLanes - 1) / kLanes * kLanes;
  }

  int64_t reach, tile_rows;
  int64_t columns = 0;  // 0: does not fit
};

using BandPlace = int64_t[5];  // sample, first row, first column, output channels [begin, end)

}  // namespace edgedyn
