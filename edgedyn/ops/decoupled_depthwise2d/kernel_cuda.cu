// decoupled_depthwise2d on CUDA: a block filters the same pixels of many channels, one channel after the
// other.
//
// A thread holds the spatial filter of four pixels in registers while the channels of its head pass by: it is
// read once for up to kChannels channels. Both combinations are one fused multiply-add, k = spatial *
// multiplier + addend with (channel, -0) for the product and (1, channel) for the sum; both round as the
// definition does. Sides other than 3 are computed by the definition.
#include "decoupled_depthwise2d/formula.h"
#include "tiles-inl.cuh"

namespace edgedyn {
namespace {

constexpr int kThreads = 256, kWide = 4, kStages = 4, kChannels = 32, kSide = 3, kTaps = kSide * kSide;

template <typename T>
struct Arguments {
  DecoupledDepthwise2d p;
  Tiling tiling;
  unsigned parts;  // of a head's channels, kChannels each
  Pixels<T> x;
  const Generated<T>* channel_filter;
  const Generated<T>* spatial_filter;
  T* y;
  Quantization of_y;
};

struct Combination {
  float multiplier, addend;
};

// The channel filters of a block.
template <typename T>
EDGEDYN_DEVICE void Combine(const Arguments<T>& a, int64_t b, int64_t first, int count,
                            Combination* filters) {
  for (int i = static_cast<int>(threadIdx.x); i < count * kTaps; i += kThreads) {
    const int64_t at = (b * kTaps + i % kTaps) * a.p.channels + first + i / kTaps;
    const float channel = static_cast<float>(a.channel_filter[at]);
    filters[i] = a.p.is_product ? Combination{channel, -0.0f} : Combination{1, channel};
  }
}

template <bool kIsDense, typename T>
__global__ void __launch_bounds__(kThreads, 2) FilterTile(const __grid_constant__ Arguments<T> a) {
  static __shared__ Combination filters[kChannels * kTaps];
  static_assert(sizeof(filters) + kSharedBytes <= kMostSharedBytes, "shared memory");
  const Tiling& t = a.tiling;
  const Place place = FindPlace(t, a.parts);
  const unsigned heads = static_cast<unsigned>(a.p.heads),
                 share = static_cast<unsigned>(a.p.channels) / heads;
  const unsigned b = place.plane / heads, head = place.plane % heads;
  const unsigned first = head * share + place.part * kChannels, left = share - place.part * kChannels;
  const int count = left < kChannels ? static_cast<int>(left) : kChannels;
  Combine(a, b, first, count, filters);

  Slot slot = FindSlot(t, place, static_cast<int>(threadIdx.x));
  if (place.top + slot.row_group >= a.p.out_height) slot.count = 0;
  const int64_t pixels = a.p.out_height * a.p.out_width;
  const int64_t at = (place.top + slot.row_group) * a.p.out_width + place.left + slot.column;
  float spatial[kTaps][kWide];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const auto* plane = a.spatial_filter + ((b * kTaps + tap) * a.p.heads + head) * pixels;
    ReadWide(plane + at, slot.count, t.are_generated_aligned, spatial[tap]);
  }
  const float zero_point = static_cast<float>(a.x.of.zero_point), scale = a.x.of.scale;
  const int64_t size = a.p.height * a.p.width, image = b * a.p.channels + first;
  const auto begin = [&](int c) { return a.x.data + (image + c) * size; };
  ForEachTile<kStages>(t, place, count, a.x.Zero(), begin, [&](int c, const T* tile) {
    if (slot.count == 0) return;
    const Combination* filter = filters + c * kTaps;
    float y[kWide] = {};
    AddTaps<kSide, kIsDense>(t, tile, slot.row_group, slot.column, zero_point, y, [&](int dy, int dx, int j) {
      const Combination with = filter[dy * kSide + dx];
      return fmaf(spatial[dy * kSide + dx][j], with.multiplier, with.addend);
    });
#pragma unroll
    for (int j = 0; j < kWide; ++j) y[j] *= scale;
    WriteWide(y, slot.count, t.is_y_aligned, a.of_y, a.y + (image + c) * pixels + at);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) FilterByDefinition(const __grid_constant__ Arguments<T> a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pixels = a.p.out_height * a.p.out_width, pixel = index % pixels, image = index / pixels;
  if (image >= a.p.batch * a.p.channels) return;
  const float y = filter_pixel(a.p, a.x, a.channel_filter, a.spatial_filter, image / a.p.channels,
                               image % a.p.channels, pixel / a.p.out_width, pixel % a.p.out_width);
  Store(y, a.of_y, a.y + index);
}

template <typename T>
cudaError_t Filter(const Call& call, const DecoupledDepthwise2d& p) {
  const Pixels<T> x = PixelsOf<T>(call);
  const Generated<T>* spatial_filter = GeneratedOf<T>(call, 2);
  T* y = static_cast<T*>(call.output);
  const int64_t padding = p.side / 2 * p.dilation;
  const Plane plane{p.height, p.width, p.out_height, p.out_width, p.side, p.stride, p.dilation, padding};
  const Tiling tiling = MakeTiling(plane, {kThreads, kWide, 1, kStages}, x.data, y, spatial_filter);
  const auto parts = static_cast<unsigned>(CeilDiv<int64_t>(p.channels / p.heads, kChannels));
  const Arguments<T> a{p, tiling, parts, x, GeneratedOf<T>(call, 1), spatial_filter, y, call.of_y};
  if (p.side != kSide || tiling.rows == 0) {
    const int64_t outputs = p.batch * p.channels * p.out_height * p.out_width;
    return Launch(FilterByDefinition<T>, CeilDiv<int64_t>(outputs, kThreads), kThreads, 0, call, a);
  }
  const bool is_dense = p.stride == 1 && p.dilation == 1;
  const int64_t blocks = Blocks(tiling, p.batch * p.heads * parts);
  return Launch(is_dense ? FilterTile<true, T> : FilterTile<false, T>, blocks, kThreads,
                kStages * TileBytes<T>(tiling), call, a);
}

}  // namespace
}  // namespace edgedyn

EDGEDYN_EXPORT int edgedyn_decoupled_depthwise2d(const edgedyn::Call* call) {
  using namespace edgedyn;
  const int64_t* x = call->shapes[0];
  const int64_t* spatial = call->shapes[2];
  const int64_t side = call->attributes[0], stride = call->attributes[1], dilation = call->attributes[2];
  const int64_t heads = call->attributes[3], combine = call->attributes[4], taps = side * side;
  if (!IsTyped(*call) || side < 1 || side % 2 == 0 || stride < 1 || dilation < 1)
    return cudaErrorInvalidValue;
  if (heads < 1 || x[1] % heads || combine < 0 || combine > 1) return cudaErrorInvalidValue;
  if (!HasShape(*call, 1, x[0], taps * x[1], 1, 1)) return cudaErrorInvalidValue;
  if (!HasShape(*call, 2, x[0], taps * heads, x[2] / stride, x[3] / stride)) return cudaErrorInvalidValue;
  if (x[0] * x[1] * spatial[2] * spatial[3] == 0) return cudaSuccess;
  const DecoupledDepthwise2d p{x[0],       x[1], x[2],   x[3],     heads,       spatial[2],
                               spatial[3], side, stride, dilation, combine == 0};
  return ForType(*call, [&](auto type) { return Filter<decltype(type)>(*call, p); });
}
