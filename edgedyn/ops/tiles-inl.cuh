// Depthwise filtering by tiles: the outputs of a block, and the tile of x in shared memory that they read.
//
// A block's outputs are `columns` x `rows` of one plane; a thread computes `wide` adjacent ones. Tiles
// start at a column that 16-byte copies can reach, some columns left of the first one that is read. Copies
// are asynchronous: they take no registers, so that enough bytes are in flight to keep the memory busy.
#pragma once

#include "cuda-inl.cuh"

namespace edgedyn {

constexpr int kColumns = 128;  // of a block at most

// A depthwise filter of one plane, and its outputs.
struct Plane {
  int64_t height, width, out_height, out_width;
  int64_t side, stride, dilation, padding;
};

// The share of a thread: each of `slots` threads takes `wide` columns and `rows_each` rows; `stages` tiles at
// once.
struct Share {
  int slots, wide, rows_each, stages;
};

struct Tiling {
  Plane plane;
  Share share;
  int columns, rows, groups,
      row_groups;              // of outputs: columns = wide * groups, rows = rows_each * row_groups
  int lead, pitch, tile_rows;  // of x: columns left of the first padded one, of a row, rows
  unsigned strips, bands;      // of columns and of rows that make a plane
  bool is_x_aligned, is_y_aligned, are_generated_aligned;
};

// The outputs of a block: first row and column, plane, and part of the work besides pixels.
struct Place {
  int top, left;
  unsigned plane, part;
};

// The outputs of a thread in a block: `wide` columns from `column`, for the group of rows `row_group`.
struct Slot {
  int column, row_group;
  int count;  // of columns that exist; none where the thread has no work
};

// rows is 0 where not even one row fits into shared memory: then the definition computes. `generated` has the
// pixels of y; null where no tensor has.
template <typename T>
Tiling MakeTiling(const Plane& plane, const Share& share, const T* x, const T* y,
                  const Generated<T>* generated) {
  constexpr int64_t kLanes = 16 / sizeof(T);
  Tiling t{};
  t.plane = plane, t.share = share;
  // within a plane, blocks count by int
  constexpr int64_t kMost = int64_t{1} << 29;
  if (plane.height > kMost || plane.width > kMost || plane.padding + plane.dilation * plane.side > kMost)
    return t;
  t.strips = static_cast<unsigned>(CeilDiv<int64_t>(plane.out_width, kColumns));
  t.columns = static_cast<int>(CeilDiv(CeilDiv<int64_t>(plane.out_width, t.strips), kLanes) * kLanes);
  t.groups = t.columns / share.wide;
  const int64_t before = CeilDiv(plane.padding, kLanes) * kLanes,
                reach = (plane.side - 1) * plane.dilation + 1;
  const int64_t lead = before - plane.padding;
  const int64_t pitch = CeilDiv(lead + (t.columns - 1) * plane.stride + reach, kLanes) * kLanes;
  t.row_groups = share.slots / t.groups;
  const int64_t needed = CeilDiv<int64_t>(plane.out_height, share.rows_each);
  if (t.row_groups > needed) t.row_groups = static_cast<int>(needed);
  const int64_t most_rows = kSharedBytes / (pitch * static_cast<int64_t>(sizeof(T)) * share.stages);
  const int64_t most_groups =
      most_rows < reach ? 0 : ((most_rows - reach) / plane.stride + 1) / share.rows_each;
  if (t.row_groups > most_groups) t.row_groups = static_cast<int>(most_groups);
  if (t.row_groups == 0) return t;
  t.rows = t.row_groups * share.rows_each;
  t.bands = static_cast<unsigned>(CeilDiv<int64_t>(plane.out_height, t.rows));
  t.lead = static_cast<int>(lead), t.pitch = static_cast<int>(pitch);
  t.tile_rows = static_cast<int>((t.rows - 1) * plane.stride + reach);
  t.is_x_aligned = IsAligned(x, 16) && plane.width % kLanes == 0;
  t.is_y_aligned = IsAligned(y, sizeof(T) * share.wide) && plane.out_width % share.wide == 0;
  t.are_generated_aligned =
      IsAligned(generated, sizeof(*generated) * share.wide) && plane.out_width % share.wide == 0;
  return t;
}

// The number of blocks for the tiles of so many planes.
inline int64_t Blocks(const Tiling& t, int64_t planes) { return int64_t{t.strips} * t.bands * planes; }

template <typename T>
int64_t TileBytes(const Tiling& t) {
  return static_cast<int64_t>(t.tile_rows) * t.pitch * static_cast<int64_t>(sizeof(T));
}

// Parts of the same pixels follow each other in time, so that the next one finds x in the second-level cache.
EDGEDYN_DEVICE Place FindPlace(const Tiling& t, unsigned parts) {
  const unsigned tile = blockIdx.x / parts, part = blockIdx.x % parts;
  const unsigned band = tile / t.strips % t.bands, strip = tile % t.strips;
  return {static_cast<int>(band) * t.rows, static_cast<int>(strip) * t.columns, tile / t.strips / t.bands,
          part};
}

EDGEDYN_DEVICE Slot FindSlot(const Tiling& t, const Place& place, int index) {
  const int column = index % t.groups * t.share.wide, row_group = index / t.groups;
  const int left = static_cast<int>(t.plane.out_width) - place.left - column;
  if (left <= 0 || row_group >= t.row_groups) return {column, row_group, 0};
  return {column, row_group, left < t.share.wide ? left : t.share.wide};
}

// Starts the copy of the tile of one plane of x; `zero` where there is no pixel.
template <typename T>
EDGEDYN_DEVICE void BeginTile(const Tiling& t, const Place& place, const T* x, T zero, T* tile) {
  constexpr int kLanes = 16 / sizeof(T);
  const int stride = static_cast<int>(t.plane.stride), padding = static_cast<int>(t.plane.padding);
  const int height = static_cast<int>(t.plane.height), width = static_cast<int>(t.plane.width);
  const int top = place.top * stride - padding, left = place.left * stride - padding - t.lead;
  const int threads = static_cast<int>(blockDim.x), vectors = t.pitch / kLanes;
  int row = static_cast<int>(threadIdx.x) / vectors, vector = static_cast<int>(threadIdx.x) % vectors;
  const int rows_on = threads / vectors, vectors_on = threads % vectors;
  while (row < t.tile_rows) {
    const int i = top + row, j = left + vector * kLanes;
    T* to = tile + row * t.pitch + vector * kLanes;
    const T* from = x + static_cast<int64_t>(i) * width + j;
    const bool is_row = i >= 0 && i < height;
    if (is_row && t.is_x_aligned && j >= 0 && j < width) {
      __pipeline_memcpy_async(to, from, 16);
    } else {
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        to[k] = is_row && !t.is_x_aligned && j + k >= 0 && j + k < width ? from[k] : zero;
      }
    }
    row += rows_on, vector += vectors_on;
    if (vector >= vectors) vector -= vectors, ++row;
  }
}

// Calls filter(plane, tile) for `count` planes, each with its tile, while kStages - 1 further tiles are in
// flight. first(plane) is the beginning of the plane; all threads of the block must call this.
template <int kStages, typename T, typename First, typename Filter>
EDGEDYN_DEVICE void ForEachTile(const Tiling& t, const Place& place, int count, T zero, First first,
                                Filter filter) {
  T* tiles = reinterpret_cast<T*>(shared_memory);
  const int size = t.tile_rows * t.pitch;
  for (int plane = 0; plane < kStages - 1; ++plane) {
    if (plane < count) BeginTile(t, place, first(plane), zero, tiles + plane * size);
    __pipeline_commit();
  }
  for (int plane = 0; plane < count; ++plane) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();
    const int next = plane + kStages - 1;
    if (next < count) BeginTile(t, place, first(next), zero, tiles + next % kStages * size);
    __pipeline_commit();
    filter(plane, tiles + plane % kStages * size);
  }
}

// A row of pixels around kWide aligned ones: the inputs of kSide adjacent taps.
template <int kSide, typename T, int kCount>
EDGEDYN_DEVICE void ReadRow(const T* centre, float zero_point, float (&row)[kCount]) {
  constexpr int kWide = kCount - kSide + 1;
  const auto wide = *reinterpret_cast<const Wide<T, kWide>*>(centre);
#pragma unroll
  for (int j = 0; j < kWide; ++j) row[kSide / 2 + j] = Load(wide.at[j], zero_point);
#pragma unroll
  for (int k = 0; k < kSide / 2; ++k) {
    row[k] = Load(centre[k - kSide / 2], zero_point);
    row[kSide / 2 + kWide + k] = Load(centre[kWide + k], zero_point);
  }
}

// Adds tap(dy, dx, j) times pixel, for kWide outputs of which the first stands at (row, column) of a block.
// kIsDense: stride and dilation 1, padding kSide / 2. kSide is 0 where only the plane knows it.
template <int kSide, bool kIsDense, typename T, int kWide, typename Tap>
EDGEDYN_DEVICE void AddTaps(const Tiling& t, const T* tile, int row, int column, float zero_point,
                            float (&sum)[kWide], Tap tap) {
  if constexpr (kIsDense) {
    const T* centre = tile + row * t.pitch + t.lead + kSide / 2 + column;
#pragma unroll
    for (int dy = 0; dy < kSide; ++dy) {
      float pixels[kWide + kSide - 1];
      ReadRow<kSide>(centre + dy * t.pitch, zero_point, pixels);
#pragma unroll
      for (int dx = 0; dx < kSide; ++dx) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) sum[j] += tap(dy, dx, j) * pixels[dx + j];
      }
    }
  } else {
    const int side = kSide ? kSide : static_cast<int>(t.plane.side);
    const int stride = static_cast<int>(t.plane.stride), dilation = static_cast<int>(t.plane.dilation);
    const T* first = tile + row * stride * t.pitch + t.lead + column * stride;
    for (int dy = 0; dy < side; ++dy) {
      for (int dx = 0; dx < side; ++dx) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          const T stored = first[dy * dilation * t.pitch + dx * dilation + j * stride];
          sum[j] += tap(dy, dx, j) * Load(stored, zero_point);
        }
      }
    }
  }
}

}  // namespace edgedyn
