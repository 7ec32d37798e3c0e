// atom_depthwise2d on CUDA: a block filters the same pixels of many channels with up to kKernels kernels per
// pixel.
//
// A thread holds one mixed kernel of four pixels in registers while the channels pass by; the threads of the
// other kernels read the same tile of x. So coefficients are mixed once for up to kChannels channels, and x
// is read once for all kernels. Sides other than 3 are computed by the definition.
#include "atom_depthwise2d/formula.h"
#include "tiles-inl.cuh"

namespace edgedyn {
namespace {

constexpr int kThreads = 384, kWide = 4, kStages = 4, kKernels = 8, kChannels = 64, kSide = 3,
              kTaps = kSide * kSide;

template <typename T>
struct Arguments {
  AtomDepthwise2d p;
  Tiling tiling;
  unsigned kernels, kernel_parts,
      channel_parts;  // kernels of a block; blocks for all kernels and for all channels
  Pixels<T> x;
  const Generated<T>* alpha;
  const Generated<T>* bases;
  T* y;
  Quantization of_y;
};

// mix_tap for all taps of the pixels of a thread, coefficient by coefficient: each is read once.
template <typename G>
EDGEDYN_DEVICE void MixTaps(const AtomDepthwise2d& p, const G* alpha, const G* bases, int count,
                            bool is_aligned, float (&taps)[kTaps][kWide]) {
  const int64_t pixels = p.out_height() * p.out_width();
  for (int64_t k = 0; k < p.bases; ++k) {
    float share[kWide];
    ReadWide(alpha + k * pixels, count, is_aligned, share);
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const float basis = static_cast<float>(bases[k * kTaps + tap]);
#pragma unroll
      for (int j = 0; j < kWide; ++j) taps[tap][j] += share[j] * basis;
    }
  }
}

template <bool kIsDense, typename T>
__global__ void __launch_bounds__(kThreads, 2) FilterTile(const __grid_constant__ Arguments<T> a) {
  const Tiling& t = a.tiling;
  const Place place = FindPlace(t, a.kernel_parts * a.channel_parts);
  const unsigned b = place.plane, first = place.part / a.kernel_parts * kChannels;
  const unsigned left = static_cast<unsigned>(a.p.channels) - first;
  const int channels = left < kChannels ? static_cast<int>(left) : kChannels;
  const int index = static_cast<int>(threadIdx.x);
  const int64_t m = place.part % a.kernel_parts * a.kernels + static_cast<unsigned>(index / t.share.slots);

  Slot slot = FindSlot(t, place, index % t.share.slots);
  if (place.top + slot.row_group >= t.plane.out_height || m >= a.p.kernels) slot.count = 0;
  const int64_t pixels = t.plane.out_height * t.plane.out_width;
  const int64_t at = (place.top + slot.row_group) * t.plane.out_width + place.left + slot.column;
  float taps[kTaps][kWide] = {};
  if (slot.count > 0) {
    const auto* alpha = a.alpha + (b * a.p.kernels + m) * a.p.bases * pixels + at;
    MixTaps(a.p, alpha, a.bases, slot.count, t.are_generated_aligned, taps);
  }
  const float zero_point = static_cast<float>(a.x.of.zero_point), scale = a.x.of.scale;
  const T* image = a.x.data + (b * a.p.channels + first) * a.p.height * a.p.width;
  T* to = a.y + ((b * a.p.kernels + m) * a.p.channels + first) * pixels + at;
  const auto begin = [&](int c) { return image + c * (a.p.height * a.p.width); };
  ForEachTile<kStages>(t, place, channels, a.x.Zero(), begin, [&](int c, const T* tile) {
    if (slot.count == 0) return;
    float y[kWide] = {};
    AddTaps<kSide, kIsDense>(t, tile, slot.row_group, slot.column, zero_point, y,
                             [&](int dy, int dx, int j) { return taps[dy * kSide + dx][j]; });
#pragma unroll
    for (int j = 0; j < kWide; ++j) y[j] *= scale;
    WriteWide(y, slot.count, t.is_y_aligned, a.of_y, to + c * pixels);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) FilterByDefinition(const __grid_constant__ Arguments<T> a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t width = a.p.out_width(), pixels = a.p.out_height() * width;
  const int64_t pixel = index % pixels, c = index / pixels % a.p.channels,
                image = index / pixels / a.p.channels;
  if (image >= a.p.batch * a.p.kernels) return;
  const float y = filter_pixel(a.p, a.x, a.alpha, a.bases, image / a.p.kernels, image % a.p.kernels, c,
                               pixel / width, pixel % width);
  Store(y, a.of_y, a.y + index);
}

template <typename T>
cudaError_t Filter(const Call& call, const AtomDepthwise2d& p) {
  const Pixels<T> x = PixelsOf<T>(call);
  const Generated<T>* alpha = GeneratedOf<T>(call, 1);
  T* y = static_cast<T*>(call.output);
  const Plane plane{p.height, p.width, p.out_height(), p.out_width(), p.side, p.stride, 1, p.side / 2};
  const int kernels = p.kernels < kKernels ? static_cast<int>(p.kernels) : kKernels;
  const int slots = kThreads / kernels / 32 * 32;  // whole warps: its pixels have the same kernel's number
  const Tiling tiling = MakeTiling(plane, {slots, kWide, 1, kStages}, x.data, y, alpha);
  const auto kernel_parts = static_cast<unsigned>(CeilDiv<int64_t>(p.kernels, kernels));
  const auto channel_parts = static_cast<unsigned>(CeilDiv<int64_t>(p.channels, kChannels));
  const Arguments<T> a{p,
                       tiling,
                       static_cast<unsigned>(kernels),
                       kernel_parts,
                       channel_parts,
                       x,
                       alpha,
                       GeneratedOf<T>(call, 2),
                       y,
                       call.of_y};
  if (p.side != kSide || tiling.rows == 0) {
    const int64_t outputs = p.batch * p.kernels * p.channels * plane.out_height * plane.out_width;
    return Launch(FilterByDefinition<T>, CeilDiv<int64_t>(outputs, kThreads), kThreads, 0, call, a);
  }
  const int64_t blocks = Blocks(tiling, p.batch * kernel_parts * channel_parts);
  return Launch(p.stride == 1 ? FilterTile<true, T> : FilterTile<false, T>, blocks, slots * kernels,
                kStages * TileBytes<T>(tiling), call, a);
}

}  // namespace
}  // namespace edgedyn

EDGEDYN_EXPORT int edgedyn_atom_depthwise2d(const edgedyn::Call* call) {
  using namespace edgedyn;
  const int64_t* x = call->shapes[0];
  const int64_t* alpha = call->shapes[1];
  const int64_t bases = call->shapes[2][0], taps = call->shapes[2][1];
  const int64_t side = call->attributes[0], stride = call->attributes[1];
  if (!IsTyped(*call) || side < 1 || side % 2 == 0 || stride < 1) return cudaErrorInvalidValue;
  if (bases < 1 || taps != side * side || alpha[1] < 1 || alpha[1] % bases) return cudaErrorInvalidValue;
  const AtomDepthwise2d p{x[0], x[1], x[2], x[3], alpha[1] / bases, bases, side, stride};
  if (!HasShape(*call, 1, x[0], alpha[1], p.out_height(), p.out_width())) return cudaErrorInvalidValue;
  if (x[0] * x[1] * x[2] * x[3] == 0) return cudaSuccess;
  return ForType(*call, [&](auto type) { return Filter<decltype(type)>(*call, p); });
}
