// sliced_depthwise2d on CUDA: a block filters a tile of one plane, a thread two columns of it, down the rows.
//
// A thread interpolates the two grid rows around a pixel row along its columns ("upper" and "lower"); they
// hold in registers for all rows between two grid centres, where y = (1 - v) * sum upper x + v * sum lower x.
// Of x it keeps the last R rows, so that a pixel is read once. This order of the sum is not the definition's
// where a value is infinite: such an output, and a filter of another side or dilated, is computed by the
// definition.
#include "sliced_depthwise2d/formula.h"
#include "tiles-inl.cuh"

namespace edgedyn {
namespace {

constexpr int kThreads = 128, kWide = 2, kRowsEach = 32, kMostRows = 256;

template <typename T>
struct Arguments {
  SlicedDepthwise2d p;
  Tiling tiling;
  Pixels<T> x;
  const Generated<T>* grid;
  const Generated<T>* offset;
  T* y;
  Quantization of_y;
};

// The part of a Cell that a block keeps in shared memory.
struct GridCell {
  int low, high;
  float weight;
};

EDGEDYN_DEVICE GridCell LocateIn(int64_t pixel, int64_t size, int64_t cells, bool align_corners) {
  const Cell cell = locate(pixel < size ? pixel : size - 1, size, cells, align_corners);
  return {static_cast<int>(cell.low), static_cast<int>(cell.high), cell.weight};
}

// One grid row along the columns of a thread; neighbours mostly lie between the same two cells.
template <typename G>
EDGEDYN_DEVICE void InterpolateRow(const G* row, const GridCell* columns, float (&values)[kWide]) {
  float low = 0, high = 0;
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    if (j == 0 || columns[j].low != columns[j - 1].low) {
      low = static_cast<float>(row[columns[j].low]), high = static_cast<float>(row[columns[j].high]);
    }
    values[j] = lerp(low, high, columns[j].weight);
  }
}

// The interpolated kernels of two grid rows, for the columns of a thread.
template <int kSide>
struct Tables {
  float upper[kSide * kSide][kWide], lower[kSide * kSide][kWide];
  float upper_offset[kWide], lower_offset[kWide];
};

template <int kSide, typename T>
EDGEDYN_DEVICE void Interpolate(const Arguments<T>& a, int64_t b, int64_t filter, const GridCell& row,
                                const GridCell* columns, Tables<kSide>& tables) {
  const int64_t cells = a.p.grid_height * a.p.grid_width;
  const int64_t upper = row.low * a.p.grid_width, lower = row.high * a.p.grid_width;
#pragma unroll
  for (int t = 0; t < kSide * kSide; ++t) {
    const auto* plane = a.grid + ((b * kSide * kSide + t) * a.p.filters + filter) * cells;
    InterpolateRow(plane + upper, columns, tables.upper[t]);
    InterpolateRow(plane + lower, columns, tables.lower[t]);
  }
  if (!a.offset) return;
  const auto* plane = a.offset + (b * a.p.filters + filter) * cells;
  InterpolateRow(plane + upper, columns, tables.upper_offset);
  InterpolateRow(plane + lower, columns, tables.lower_offset);
}

// kWide outputs from the rows of pixels that their taps read, of which the first is window[first].
template <int kSide>
EDGEDYN_DEVICE void FilterRow(const float (&window)[kSide][kWide + kSide - 1], int first,
                              const Tables<kSide>& tables, float scale, float weight, float (&y)[kWide]) {
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    float upper = 0, lower = 0;
#pragma unroll
    for (int t = 0; t < kSide * kSide; ++t) {
      const float pixel = window[(first + t / kSide) % kSide][j + t % kSide];
      upper += tables.upper[t][j] * pixel, lower += tables.lower[t][j] * pixel;
    }
    y[j] = lerp(upper, lower, weight) * scale + lerp(tables.upper_offset[j], tables.lower_offset[j], weight);
  }
}

EDGEDYN_DEVICE bool IsFinite(float value) { return fabsf(value) <= 3.4028235e38f; }

// All outputs of a thread by the definition. Not inlined: its registers would be missing on the usual path.
template <typename T>
__device__ __noinline__ void FilterAgain(const Arguments<T>& a) {
  const Place place = FindPlace(a.tiling, 1);
  const Slot slot = FindSlot(a.tiling, place, static_cast<int>(threadIdx.x));
  const int64_t b = place.plane / a.p.channels, c = place.plane % a.p.channels;
  for (int i = 0; i < kRowsEach * kWide; ++i) {
    const int64_t row = place.top + slot.row_group * kRowsEach + i / kWide;
    const int64_t column = place.left + slot.column + i % kWide;
    if (row >= a.p.height || column >= a.p.width) continue;
    const float y = filter_pixel(a.p, a.x, a.grid, a.offset, b, c, row, column);
    Store(y, a.of_y, a.y + (place.plane * a.p.height + row) * a.p.width + column);
  }
}

template <int kSide, typename T>
__global__ void __launch_bounds__(kThreads, 4) FilterTile(const __grid_constant__ Arguments<T> a) {
  static __shared__ GridCell rows[kMostRows], columns[kColumns];
  static_assert(sizeof(rows) + sizeof(columns) + kSharedBytes <= kMostSharedBytes, "shared memory");
  const Tiling& t = a.tiling;
  const Place place = FindPlace(t, 1);
  const unsigned channels = static_cast<unsigned>(a.p.channels),
                 share = channels / static_cast<unsigned>(a.p.filters);
  const unsigned b = place.plane / channels, filter = place.plane % channels / share;
  const int64_t plane = a.p.height * a.p.width;
  T* tile = reinterpret_cast<T*>(shared_memory);
  BeginTile(t, place, a.x.data + place.plane * plane, a.x.Zero(), tile);
  __pipeline_commit();
  for (int i = static_cast<int>(threadIdx.x); i < t.rows; i += kThreads) {
    rows[i] = LocateIn(place.top + i, a.p.height, a.p.grid_height, a.p.align_corners);
  }
  for (int j = static_cast<int>(threadIdx.x); j < t.columns; j += kThreads) {
    columns[j] = LocateIn(place.left + j, a.p.width, a.p.grid_width, a.p.align_corners);
  }
  __pipeline_wait_prior(0);
  __syncthreads();

  const Slot slot = FindSlot(t, place, static_cast<int>(threadIdx.x));
  if (slot.count <= 0) return;
  const int begin = slot.row_group * kRowsEach;
  const int rows_left = static_cast<int>(a.p.height) - place.top;
  const int end = rows_left < begin + kRowsEach ? rows_left : begin + kRowsEach;
  const T* centre = tile + t.lead + kSide / 2 + slot.column;
  T* to = a.y + (place.plane * a.p.height + place.top) * a.p.width + place.left + slot.column;
  const float zero_point = static_cast<float>(a.x.of.zero_point);

  bool is_finite = true;
  Tables<kSide> tables{};
  float window[kSide][kWide + kSide - 1];
  for (int h = begin; h < end;) {
    const GridCell cell = rows[h];
    Interpolate(a, b, filter, cell, columns + slot.column, tables);
#pragma unroll
    for (int i = 0; i + 1 < kSide; ++i) ReadRow<kSide>(centre + (h + i) * t.pitch, zero_point, window[i]);
    for (bool is_between = true; is_between;) {
#pragma unroll
      for (int i = 0; i < kSide; ++i) {  // unrolled: the window turns without being moved
        if (!is_between) break;
        ReadRow<kSide>(centre + (h + kSide - 1) * t.pitch, zero_point, window[(i + kSide - 1) % kSide]);
        float y[kWide];
        FilterRow<kSide>(window, i, tables, a.x.of.scale, rows[h].weight, y);
        is_finite = is_finite && IsFinite(y[0] + y[1]);
        WriteWide(y, slot.count, t.is_y_aligned, a.of_y, to + h * a.p.width);
        ++h;
        is_between = h < end && rows[h].low == cell.low;
      }
    }
  }
  if (!is_finite) FilterAgain(a);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) FilterByDefinition(const __grid_constant__ Arguments<T> a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t plane = a.p.height * a.p.width, pixel = index % plane, image = index / plane;
  if (image >= a.p.batch * a.p.channels) return;
  const float y = filter_pixel(a.p, a.x, a.grid, a.offset, image / a.p.channels, image % a.p.channels,
                               pixel / a.p.width, pixel % a.p.width);
  Store(y, a.of_y, a.y + index);
}

template <typename T>
cudaError_t Filter(const Call& call, const SlicedDepthwise2d& p) {
  const Pixels<T> x = PixelsOf<T>(call);
  T* y = static_cast<T*>(call.output);
  const Plane plane{p.height, p.width, p.height, p.width, p.side, 1, p.dilation, p.side / 2 * p.dilation};
  Arguments<T> a{p,
                 MakeTiling(plane, {kThreads, kWide, kRowsEach, 1}, x.data, y, nullptr),
                 x,
                 GeneratedOf<T>(call, 1),
                 GeneratedOf<T>(call, 2),
                 y,
                 call.of_y};
  const int64_t blocks = Blocks(a.tiling, p.batch * p.channels);
  const bool is_tiled = p.dilation == 1 && a.tiling.rows > 0 && a.tiling.rows <= kMostRows;
  if (is_tiled && p.side == 1)
    return Launch(FilterTile<1, T>, blocks, kThreads, TileBytes<T>(a.tiling), call, a);
  if (is_tiled && p.side == 3)
    return Launch(FilterTile<3, T>, blocks, kThreads, TileBytes<T>(a.tiling), call, a);
  const int64_t pixels = p.batch * p.channels * p.height * p.width;
  return Launch(FilterByDefinition<T>, CeilDiv<int64_t>(pixels, kThreads), kThreads, 0, call, a);
}

}  // namespace
}  // namespace edgedyn

EDGEDYN_EXPORT int edgedyn_sliced_depthwise2d(const edgedyn::Call* call) {
  using namespace edgedyn;
  const int64_t* x = call->shapes[0];
  const int64_t* grid = call->shapes[1];
  const int64_t side = call->attributes[0], dilation = call->attributes[1], taps = side * side;
  if (!IsTyped(*call) || side < 1 || side % 2 == 0 || dilation < 1) return cudaErrorInvalidValue;
  const int64_t filters = grid[1] / taps;
  if (grid[0] != x[0] || filters < 1 || grid[1] % taps || x[1] % filters) return cudaErrorInvalidValue;
  if (call->inputs[2] && !HasShape(*call, 2, x[0], filters, grid[2], grid[3])) return cudaErrorInvalidValue;
  if (x[0] * x[1] * x[2] * x[3] == 0) return cudaSuccess;
  if (grid[2] * grid[3] == 0) return cudaErrorInvalidValue;
  const SlicedDepthwise2d p{x[0],    x[1],    x[2], x[3],     filters,
                            grid[2], grid[3], side, dilation, call->attributes[2] != 0};
  return ForType(*call, [&](auto type) { return Filter<decltype(type)>(*call, p); });
}
