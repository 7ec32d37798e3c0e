// masked_conv2d on CUDA: depthwise by tiles, everything else as a product of gathered columns.
//
// Depthwise: a block filters the same pixels of many channels, one channel after the other; a thread reads
// the mask of its four pixels once. A tile without an active position reads no x and only writes zeros.
//
// Else: a block takes kRun output positions and kOutputs channels of one group. It lists the active
// positions, gathers kPositions of them at a time, one tap and kDepth channels after the other, and
// multiplies: a thread has 8 channels of 4 positions in registers. A mask removes whole columns of the
// product, which stays dense.
#include "masked_conv2d/formula.h"
#include "tiles-inl.cuh"

namespace edgedyn {
namespace {

template <typename T>
struct Arguments {
  MaskedConv2d p;
  Tiling tiling;   // of a depthwise filter
  unsigned parts;  // of its outputs, kChannels each
  Pixels<T> x;
  const Generated<T>* weight;
  const Generated<T>* bias;
  const Generated<T>* mask;
  T* y;
  Quantization of_y;

  EDGEDYN_DEVICE float BiasOf(int64_t o) const { return bias ? static_cast<float>(bias[o]) : 0; }
};

namespace depthwise {

constexpr int kThreads = 256, kWide = 4, kStages = 4, kChannels = 32, kMostTaps = 49;

// kSide is 0 where only the call knows it.
template <int kSide, bool kIsDense, typename T>
__global__ void __launch_bounds__(kThreads, 3) FilterTile(const __grid_constant__ Arguments<T> a) {
  static __shared__ float weights[kChannels * (kSide ? kSide * kSide : kMostTaps)];
  static_assert(sizeof(weights) + kSharedBytes <= kMostSharedBytes, "shared memory");
  const Tiling& t = a.tiling;
  const int side = kSide ? kSide : static_cast<int>(a.p.side), taps = side * side;
  const Place place = FindPlace(t, a.parts);
  const unsigned b = place.plane, first = place.part * kChannels;
  const unsigned left = static_cast<unsigned>(a.p.outputs) - first;
  const int count = left < kChannels ? static_cast<int>(left) : kChannels;
  for (int i = static_cast<int>(threadIdx.x); i < count * taps; i += kThreads) {
    weights[i] = static_cast<float>(a.weight[first * taps + i]);
  }

  Slot slot = FindSlot(t, place, static_cast<int>(threadIdx.x));
  if (place.top + slot.row_group >= a.p.out_height) slot.count = 0;
  const int64_t pixels = a.p.out_height * a.p.out_width;
  const int64_t at = (place.top + slot.row_group) * a.p.out_width + place.left + slot.column;
  float mask[kWide];
  ReadWide(a.mask + b * pixels + at, slot.count, t.are_generated_aligned, mask);
  T* to = a.y + (b * a.p.outputs + first) * pixels + at;
  if (!__syncthreads_or(mask[0] != 0 || mask[1] != 0 || mask[2] != 0 || mask[3] != 0)) {
    const float zeros[kWide] = {};
    for (int o = 0; o < count; ++o) WriteWide(zeros, slot.count, t.is_y_aligned, a.of_y, to + o * pixels);
    return;
  }
  const float zero_point = static_cast<float>(a.x.of.zero_point), scale = a.x.of.scale;
  const int64_t size = a.p.height * a.p.width;
  const unsigned share = static_cast<unsigned>(a.p.outputs) / static_cast<unsigned>(a.p.groups);
  const T* image = a.x.data + b * a.p.channels * size;
  const auto begin = [&](int o) { return image + (first + static_cast<unsigned>(o)) / share * size; };
  ForEachTile<kStages>(t, place, count, a.x.Zero(), begin, [&](int o, const T* tile) {
    const float* weight = weights + o * taps;
    float y[kWide] = {};
    if (slot.count > 0) {
      AddTaps<kSide, kIsDense>(t, tile, slot.row_group, slot.column, zero_point, y,
                               [&](int dy, int dx, int) { return weight[dy * side + dx]; });
    }
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      y[j] = mask[j] != 0 ? activate(a.p.activation, y[j] * scale + a.BiasOf(first + o)) : 0;
    }
    WriteWide(y, slot.count, t.is_y_aligned, a.of_y, to + o * pixels);
  });
}

}  // namespace depthwise

namespace gathered {

constexpr int kThreads = 128, kRun = 512, kPositions = 64, kOutputs = 64, kDepth = 16;
constexpr int kOutputsEach = 8, kPositionsEach = 4, kPositionStep = kPositions / kPositionsEach;
constexpr int kPitch = kOutputs + 4;  // threads that store down the depth meet other banks

// The active ones of a run of positions, in order, counted from its beginning.
struct ActiveList {
  int16_t positions[kRun];
  int counts[kThreads];
  bool is_active[kRun];

  // All threads of the block come here; returns how many there are.
  template <typename G>
  EDGEDYN_DEVICE int Find(const G* mask, int64_t first, int64_t all) {
    constexpr int kEach = kRun / kThreads;
    const int thread = static_cast<int>(threadIdx.x);
    int own = 0;
    for (int i = thread * kEach; i < (thread + 1) * kEach; ++i) {
      is_active[i] = first + i < all && static_cast<float>(mask[first + i]) != 0;
      own += is_active[i];
    }
    counts[thread] = own;
    __syncthreads();
    int before = 0, total = 0;
    for (int k = 0; k < kThreads; ++k) before += k < thread ? counts[k] : 0, total += counts[k];
    for (int i = thread * kEach; i < (thread + 1) * kEach; ++i) {
      if (is_active[i]) positions[before++] = static_cast<int16_t>(i);
    }
    __syncthreads();
    return total;
  }
};

// A position of the output: sample, row and column.
struct Position {
  int64_t b, pixel;
  int row, column;
};

EDGEDYN_DEVICE Position PositionAt(const MaskedConv2d& p, int64_t position) {
  const int64_t pixels = p.out_height * p.out_width, b = position / pixels, pixel = position % pixels;
  return {b, pixel, static_cast<int>(pixel / p.out_width), static_cast<int>(pixel % p.out_width)};
}

// One step of the product in shared memory: kDepth channels of one tap.
struct Step {
  alignas(16) float columns[kDepth][kPositions];
  alignas(16) float weights[kDepth][kPitch];
};

template <typename T>
EDGEDYN_DEVICE void Gather(const Arguments<T>& a, const T* from, int depth_left, bool is_inside,
                           float (*columns)[kPositions]) {
  const int thread = static_cast<int>(threadIdx.x), position = thread % kPositions;
  const int64_t plane = a.p.height * a.p.width;
  const float zero_point = static_cast<float>(a.x.of.zero_point);
#pragma unroll
  for (int i = thread / kPositions; i < kDepth; i += kThreads / kPositions) {
    columns[i][position] = is_inside && i < depth_left ? Load(from[i * plane], zero_point) : 0;
  }
}

// weights points at the first output and channel of the tap; outputs and channels that do not exist weigh 0.
template <typename G>
EDGEDYN_DEVICE void ReadWeights(const MaskedConv2d& p, const G* weights, int outputs_left, int depth_left,
                                float (*to)[kPitch]) {
  const int64_t taps = p.side * p.side, output = p.channels / p.groups * taps;
  const int thread = static_cast<int>(threadIdx.x), i = thread % kDepth;
#pragma unroll
  for (int o = thread / kDepth; o < kOutputs; o += kThreads / kDepth) {
    to[i][o] = o < outputs_left && i < depth_left ? static_cast<float>(weights[o * output + i * taps]) : 0;
  }
}

EDGEDYN_DEVICE void Multiply(const Step& step, int output, int position,
                             float (&sum)[kOutputsEach][kPositionsEach]) {
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    float pixels[kPositionsEach];
#pragma unroll
    for (int j = 0; j < kPositionsEach; ++j) pixels[j] = step.columns[i][position + j * kPositionStep];
    const auto* weights = reinterpret_cast<const Wide<float, 4>*>(&step.weights[i][output]);
#pragma unroll
    for (int four = 0; four < kOutputsEach / 4; ++four) {
      const Wide<float, 4> weight = weights[four];
#pragma unroll
      for (int o = 0; o < 4; ++o) {
#pragma unroll
        for (int j = 0; j < kPositionsEach; ++j) sum[4 * four + o][j] += weight.at[o] * pixels[j];
      }
    }
  }
}

// The sums of kOutputs channels from `first` at the positions listed[0], ..., of which `count` exist.
template <typename T>
EDGEDYN_DEVICE void Convolve(const Arguments<T>& a, int64_t first, int outputs, int64_t run,
                             const int16_t* listed, int count, Step& step,
                             float (&sum)[kOutputsEach][kPositionsEach]) {
  const int thread = static_cast<int>(threadIdx.x), own = thread % kPositions;
  const int64_t depth = a.p.channels / a.p.groups, group = first / (a.p.outputs / a.p.groups);
  const Position at = PositionAt(a.p, run + listed[own < count ? own : 0]);
  const T* image = a.x.data + (at.b * a.p.channels + group * depth) * a.p.height * a.p.width;
  const auto* weight = a.weight + first * depth * a.p.side * a.p.side;
  const int side = static_cast<int>(a.p.side);
  for (int tap = 0; tap < side * side; ++tap) {
    const int64_t row = at.row * a.p.stride - a.p.padding + tap / side * a.p.dilation;
    const int64_t column = at.column * a.p.stride - a.p.padding + tap % side * a.p.dilation;
    const bool is_inside = own < count && row >= 0 && row < a.p.height && column >= 0 && column < a.p.width;
    for (int64_t i = 0; i < depth; i += kDepth) {
      const int depth_left = depth - i < kDepth ? static_cast<int>(depth - i) : kDepth;
      const T* from = image + i * a.p.height * a.p.width + row * a.p.width + column;
      Gather(a, from, depth_left, is_inside, step.columns);
      ReadWeights(a.p, weight + i * a.p.side * a.p.side + tap, outputs, depth_left, step.weights);
      __syncthreads();
      Multiply(step, thread / kPositionStep * kOutputsEach, thread % kPositionStep, sum);
      __syncthreads();
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) ConvolveActive(const __grid_constant__ Arguments<T> a) {
  static __shared__ ActiveList list;
  static __shared__ Step step;
  const int64_t a_group = a.p.outputs / a.p.groups, parts = CeilDiv<int64_t>(a_group, kOutputs);
  const int64_t part = blockIdx.x % (parts * a.p.groups), run = blockIdx.x / (parts * a.p.groups) * kRun;
  const int64_t first = part / parts * a_group + part % parts * kOutputs,
                left = a_group - part % parts * kOutputs;
  const int outputs = left < kOutputs ? static_cast<int>(left) : kOutputs;
  const int64_t pixels = a.p.out_height * a.p.out_width, all = a.p.batch * pixels;
  const int thread = static_cast<int>(threadIdx.x), active = list.Find(a.mask, run, all);

  for (int i = thread; i < kRun && run + i < all; i += kThreads) {
    if (list.is_active[i]) continue;
    const Position at = PositionAt(a.p, run + i);
    T* to = a.y + (at.b * a.p.outputs + first) * pixels + at.pixel;
    for (int o = 0; o < outputs; ++o) Store(0, a.of_y, to + o * pixels);
  }
  for (int begin = 0; begin < active; begin += kPositions) {
    const int count = active - begin < kPositions ? active - begin : kPositions;
    float sum[kOutputsEach][kPositionsEach] = {};
    Convolve(a, first, outputs, run, list.positions + begin, count, step, sum);
    const int output = thread / kPositionStep * kOutputsEach;
#pragma unroll
    for (int j = 0; j < kPositionsEach; ++j) {
      const int own = thread % kPositionStep + j * kPositionStep;
      if (own >= count) continue;
      const Position at = PositionAt(a.p, run + list.positions[begin + own]);
      T* to = a.y + (at.b * a.p.outputs + first + output) * pixels + at.pixel;
#pragma unroll
      for (int o = 0; o < kOutputsEach; ++o) {
        if (output + o >= outputs) continue;
        const float y = sum[o][j] * a.x.of.scale + a.BiasOf(first + output + o);
        Store(activate(a.p.activation, y), a.of_y, to + o * pixels);
      }
    }
  }
}

}  // namespace gathered

template <typename T>
cudaError_t Filter(const Call& call, const MaskedConv2d& p) {
  const Pixels<T> x = PixelsOf<T>(call);
  const Generated<T>* mask = GeneratedOf<T>(call, 3);
  T* y = static_cast<T*>(call.output);
  Arguments<T> a{p, {}, 0, x, GeneratedOf<T>(call, 1), GeneratedOf<T>(call, 2), mask, y, call.of_y};
  if (p.channels == p.groups && p.side * p.side <= depthwise::kMostTaps) {
    using namespace depthwise;
    const Plane plane{p.height, p.width, p.out_height, p.out_width, p.side, p.stride, p.dilation, p.padding};
    a.tiling = MakeTiling(plane, {kThreads, kWide, 1, kStages}, x.data, y, mask);
    a.parts = static_cast<unsigned>(CeilDiv<int64_t>(p.outputs, kChannels));
    const bool is_dense = p.side == 3 && p.stride == 1 && p.dilation == 1 && p.padding == 1;
    const int64_t blocks = Blocks(a.tiling, p.batch * a.parts);
    const auto kernel = is_dense ? FilterTile<3, true, T> : FilterTile<0, false, T>;
    if (a.tiling.rows > 0) return Launch(kernel, blocks, kThreads, kStages * TileBytes<T>(a.tiling), call, a);
  }
  using namespace gathered;
  const int64_t runs = CeilDiv<int64_t>(p.batch * p.out_height * p.out_width, kRun);
  const int64_t parts = CeilDiv<int64_t>(p.outputs / p.groups, kOutputs) * p.groups;
  return Launch(ConvolveActive<T>, runs * parts, kThreads, 0, call, a);
}

}  // namespace
}  // namespace edgedyn

EDGEDYN_EXPORT int edgedyn_masked_conv2d(const edgedyn::Call* call) {
  using namespace edgedyn;
  const int64_t* x = call->shapes[0];
  const int64_t* weight = call->shapes[1];
  const int64_t stride = call->attributes[0], padding = call->attributes[1], dilation = call->attributes[2];
  const int64_t groups = call->attributes[3], activation = call->attributes[4], side = weight[2];
  if (!IsTyped(*call) || stride < 1 || padding < 0 || dilation < 1 || groups < 1)
    return cudaErrorInvalidValue;
  if (activation < 0 || activation > 2 || side < 1 || weight[3] != side) return cudaErrorInvalidValue;
  if (x[1] != weight[1] * groups || weight[0] % groups) return cudaErrorInvalidValue;
  if (call->inputs[2] && call->shapes[2][0] != weight[0]) return cudaErrorInvalidValue;
  const int64_t reach = dilation * (side - 1) + 1;
  const int64_t height = x[2] + 2 * padding - reach, width = x[3] + 2 * padding - reach;
  if (height < 0 || width < 0) return cudaErrorInvalidValue;
  const int64_t out_height = height / stride + 1, out_width = width / stride + 1;
  const MaskedConv2d p{x[0],
                       x[1],
                       x[2],
                       x[3],
                       weight[0],
                       out_height,
                       out_width,
                       side,
                       stride,
                       padding,
                       dilation,
                       groups,
                       static_cast<Activation>(activation)};
  if (!HasShape(*call, 3, x[0], 1, p.out_height, p.out_width)) return cudaErrorInvalidValue;
  if (p.batch * p.outputs == 0) return cudaSuccess;
  return ForType(*call, [&](auto type) { return Filter<decltype(type)>(*call, p); });
}
