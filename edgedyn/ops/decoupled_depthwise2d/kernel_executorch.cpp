// decoupled_depthwise2d for ExecuTorch: a tile of output pixels at a time, through the channels of a head.
//
// The spatial filter of a tile is copied to scratch once, all taps beside each other, and serves up to 32
// channels from cache. A channel's pixels are then read into a padded tile of float, split by column phase
// where the stride is above 1, so that a tap neither asks where the border is nor gathers: it is one offset
// into the tile. Four rows share each channel tap.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "decoupled_depthwise2d/kernel_executorch.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// after foreach_target.h
#include "decoupled_depthwise2d/formula.h"
#include "executorch.h"
#include "hwy/highway.h"
#include "rows-inl.h"

#ifndef EDGEDYN_DECOUPLED_DEPTHWISE2D_ARGUMENTS
#define EDGEDYN_DECOUPLED_DEPTHWISE2D_ARGUMENTS
#include <array>

namespace edgedyn {

using ::executorch::aten::string_view;

template <typename T>
struct DecoupledArguments {
  DecoupledDepthwise2d p;
  const T* x;
  const float* channel_filter;
  const float* spatial_filter;
  T* y;
  Quantization of_x, of_y;
};

// The size of a tile, as wide as its scratch allows, and how its pixels of x lie.
//
// Row i is row (i / step) * dilation + i % step of x below the first: every row where the taps' rows overlap
// (step = dilation), and only the rows that the taps span at a dilation above the tile's height.
// A row is `stride` phases of `phase` pixels: its column j is pixel j / stride of phase j % stride.
struct DecoupledTile {
  static constexpr int64_t kFloats = 16384;  // 64 KiB per thread
  static constexpr int64_t kRows = 4;        // more rows would read shorter pieces of a row
  static constexpr int64_t kMaxSide = 27;    // a larger kernel does not fit
  static constexpr int64_t kLanes = 16;      // of the widest instruction set

  explicit DecoupledTile(const DecoupledDepthwise2d& p) {
    if (p.side > kMaxSide || p.stride > kFloats || (p.side > 1 && p.dilation > kFloats)) return;
    const int64_t taps = p.side * p.side, reach = (p.side - 1) * p.dilation;
    for (rows = kRows; rows > 0; rows /= 2) {
      const int64_t window = (rows - 1) * p.stride + 1;
      step = std::min(p.dilation, window), x_rows = (p.side - 1) * step + window;
      const int64_t x_lines = (x_rows + (p.stride > 1 ? 1 : 0)) * p.stride;  // a row more to split from
      const int64_t room = kFloats - taps - x_lines * (reach / p.stride);
      const int64_t widest = room / (taps * rows + x_lines) / kLanes * kLanes;
      if (widest <= 0) continue;
      const int64_t tiles = (p.out_width + widest - 1) / widest;
      columns = ((p.out_width + tiles - 1) / tiles + kLanes - 1) / kLanes * kLanes;
      break;
    }
    phase = columns + reach / p.stride;
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t column = t % p.side * p.dilation;
      offsets[t] = (t / p.side * step * p.stride + column % p.stride) * phase + column / p.stride;
    }
  }

  int64_t rows = 0, columns = 0;  // 0: does not fit
  int64_t step = 0, x_rows = 0, phase = 0;
  int64_t offsets[kMaxSide * kMaxSide];  // in the tile of x: the input of a tap for its first pixel
};

// One tile of some channels of one head.
struct DecoupledWork {
  int64_t b, head, first_channel, last_channel, top, left;
};

}  // namespace edgedyn
#endif

HWY_BEFORE_NAMESPACE();
namespace edgedyn {
namespace HWY_NAMESPACE {

template <typename T, bool kIsProduct>
class DecoupledFilter {
 public:
  DecoupledFilter(const DecoupledArguments<T>& a, const DecoupledTile& tile, const DecoupledWork& work,
                  float* scratch)
      : a_(a), p_(a.p), tile_(tile), work_(work), taps_(a.p.side * a.p.side),
        rows_(std::min(tile.rows, a.p.out_height - work.top)),
        count_(std::min(tile.columns, a.p.out_width - work.left)), x_width_(a.p.stride * tile.phase) {
    spatial_ = scratch, x_ = spatial_ + taps_ * tile.rows * tile.columns;
    line_ = x_ + tile.x_rows * x_width_, channel_ = line_ + (p_.stride > 1 ? x_width_ : 0);
  }

  void FilterChannels() const {
    ReadSpatial();
    for (int64_t c = work_.first_channel; c < work_.last_channel; ++c) {
      ReadPixels(c);
      for (int64_t t = 0; t < taps_; ++t)
        channel_[t] = a_.channel_filter[(work_.b * taps_ + t) * p_.channels + c];
      T* to = a_.y + ((work_.b * p_.channels + c) * p_.out_height + work_.top) * p_.out_width + work_.left;
      int64_t r = 0;
      for (; r + 4 <= rows_; r += 4) FilterBlock<4>(r, to + r * p_.out_width);
      for (; r < rows_; ++r) FilterBlock<1>(r, to + r * p_.out_width);
    }
  }

 private:
  void ReadSpatial() const {
    for (int64_t t = 0; t < taps_; ++t) {
      const int64_t map = (work_.b * taps_ + t) * p_.heads + work_.head;
      const float* from = a_.spatial_filter + (map * p_.out_height + work_.top) * p_.out_width;
      for (int64_t r = 0; r < rows_; ++r)
        ReadPadded(from + r * p_.out_width, p_.out_width, work_.left, tile_.columns, {},
                   spatial_ + (t * tile_.rows + r) * tile_.columns);
    }
  }

  void ReadPixels(int64_t c) const {
    const T* plane = a_.x + (work_.b * p_.channels + c) * p_.height * p_.width;
    const int64_t halo = p_.side / 2 * p_.dilation;
    const int64_t top = work_.top * p_.stride - halo, left = work_.left * p_.stride - halo;
    const int64_t count = (p_.side - 1) * tile_.step + (rows_ - 1) * p_.stride + 1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = top + i / tile_.step * p_.dilation + i % tile_.step;
      const T* from = row >= 0 && row < p_.height ? plane + row * p_.width : nullptr;
      float* to = x_ + i * x_width_;
      ReadPadded(from, p_.width, left, x_width_, a_.of_x, p_.stride > 1 ? line_ : to);
      if (p_.stride > 1) SplitPhases(to);
    }
  }

  void SplitPhases(float* HWY_RESTRICT to) const {
    const Floats d;
    const int64_t lanes = hn::Lanes(d), stride = p_.stride;
    int64_t j = 0;
    for (; stride == 2 && j + lanes <= tile_.phase; j += lanes) {
      Vector even, odd;
      hn::LoadInterleaved2(d, line_ + 2 * j, even, odd);
      hn::StoreU(even, d, to + j);
      hn::StoreU(odd, d, to + tile_.phase + j);
    }
    for (; j < tile_.phase; ++j)
      for (int64_t phase = 0; phase < stride; ++phase)
        to[phase * tile_.phase + j] = line_[j * stride + phase];
  }

  template <int kRows>
  void FilterBlock(int64_t row, T* to) const {
    const Floats d;
    const int64_t columns = tile_.columns, plane = tile_.rows * columns;
    const float* x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = x_ + (row + r) * p_.stride * x_width_;
    for (int64_t j = 0; j < count_; j += hn::Lanes(d)) {
      Vector sum[kRows];
      for (int r = 0; r < kRows; ++r) sum[r] = hn::Zero(d);
      const float* HWY_RESTRICT spatial = spatial_ + row * columns + j;
      for (int64_t t = 0; t < taps_; ++t, spatial += plane) {
        const Vector channel = hn::Set(d, channel_[t]);
        const int64_t at = tile_.offsets[t] + j;
        for (int r = 0; r < kRows; ++r) {
          const Vector pixel = hn::LoadU(d, spatial + r * columns);
          const Vector kernel = kIsProduct ? hn::Mul(channel, pixel) : hn::Add(channel, pixel);
          sum[r] = hn::MulAdd(kernel, hn::LoadU(d, x[r] + at), sum[r]);
        }
      }
      for (int r = 0; r < kRows; ++r) WriteLanes(sum[r], count_ - j, a_.of_y, to + r * p_.out_width + j);
    }
  }

  const DecoupledArguments<T>& a_;
  const DecoupledDepthwise2d& p_;
  const DecoupledTile& tile_;
  const DecoupledWork& work_;
  const int64_t taps_, rows_, count_, x_width_;
  float *spatial_, *x_, *line_, *channel_;
};

template <typename T>
void FilterTile(const DecoupledArguments<T>& a, const DecoupledTile& tile, const DecoupledWork& work) {
  alignas(64) float scratch[DecoupledTile::kFloats];
  if (a.p.is_product)
    DecoupledFilter<T, true>(a, tile, work, scratch).FilterChannels();
  else
    DecoupledFilter<T, false>(a, tile, work, scratch).FilterChannels();
}
EDGEDYN_PER_TYPE(FilterTile, DecoupledArguments, DecoupledTile, DecoupledWork)

}  // namespace HWY_NAMESPACE
}  // namespace edgedyn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace edgedyn {
namespace {

EDGEDYN_DISPATCH(FilterTile, DecoupledArguments, DecoupledTile, DecoupledWork)

constexpr int64_t kRun = 32;  // channels of a work item: they share a copy of the spatial filter

template <typename T>
void Filter(const DecoupledArguments<T>& a, const DecoupledTile& tile) {
  const DecoupledDepthwise2d& p = a.p;
  const int64_t share = p.channels / p.heads, runs = (share + kRun - 1) / kRun;
  const int64_t bands = (p.out_height + tile.rows - 1) / tile.rows;
  const int64_t strips = (p.out_width + tile.columns - 1) / tile.columns;
  parallel_for(0, p.batch * p.heads * runs * bands * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t left = item % strips * tile.columns, top = item / strips % bands * tile.rows;
      const int64_t run = item / strips / bands % runs, head = item / strips / bands / runs % p.heads;
      const int64_t b = item / strips / bands / runs / p.heads, first = head * share + run * kRun;
      FilterTile(a, tile, {b, head, first, std::min(first + kRun, (head + 1) * share), top, left});
    }
  });
}

// The op's arguments that are not tensors.
struct Options {
  int64_t side, stride, dilation, heads;
  string_view combine;
};

// Returns the error in the arguments, or null.
const char* Check(const Tensor& x, ScalarType type, const Tensor& channel_filter,
                  const Tensor& spatial_filter, const Options& o) {
  if (o.side < 1 || o.side % 2 == 0 || o.stride < 1 || o.dilation < 1)
    return "expected an odd kernel_size, stride >= 1 and dilation >= 1";
  if (o.combine != "mul" && o.combine != "add") return "expected combine as 'mul' or 'add'";
  if (!IsDense(x, 4, type)) return "expected x as a contiguous (B, C, H, W) of the op's type";
  if (o.heads < 1 || x.size(1) % o.heads) return "expected heads to divide the channels of x";
  if (!IsDense(spatial_filter, 4, ScalarType::Float))
    return "expected spatial_filter as contiguous, 4 axes of float";
  const int64_t maps = spatial_filter.size(1), h = spatial_filter.size(2), w = spatial_filter.size(3);
  // side <= maps: its square does not overflow
  if (spatial_filter.size(0) != x.size(0) || o.side > maps || maps % o.heads ||
      maps / o.heads != o.side * o.side || h != x.size(2) / o.stride || w != x.size(3) / o.stride || h == 0 ||
      w == 0)
    return "expected spatial_filter as (B, T * G, H // stride, W // stride), not empty";
  if (!IsDense(channel_filter, 4, ScalarType::Float) || channel_filter.size(0) != x.size(0) ||
      channel_filter.size(1) != o.side * o.side * x.size(1) || channel_filter.size(2) != 1 ||
      channel_filter.size(3) != 1)
    return "expected channel_filter as a contiguous (B, T * C, 1, 1) of float";
  return nullptr;
}

template <typename T>
Tensor& Run(KernelRuntimeContext& context, const Tensor& x, const Tensor& channel_filter,
            const Tensor& spatial_filter, const Options& o, Quantization of_x, Quantization of_y,
            Tensor& out) {
  const char* wrong = Check(x, kScalarType<T>, channel_filter, spatial_filter, o);
  EDGEDYN_CHECK(context, !wrong, out, "decoupled_depthwise2d: %s", wrong);
  EDGEDYN_CHECK(context, IsInt8(of_x) && IsInt8(of_y), out,
                "decoupled_depthwise2d: expected scales > 0 and zero points in [-128, 127]");
  const int64_t h = spatial_filter.size(2), w = spatial_filter.size(3);
  EDGEDYN_CHECK(context, ResizeTo(out, kScalarType<T>, {x.size(0), x.size(1), h, w}), out,
                "decoupled_depthwise2d: out cannot hold y (B, C, H // stride, W // stride) of the type of x");
  const DecoupledArguments<T> a{{x.size(0), x.size(1), x.size(2), x.size(3), o.heads, h, w, o.side, o.stride,
                                 o.dilation, o.combine == "mul"},
                                x.const_data_ptr<T>(),
                                channel_filter.const_data_ptr<float>(),
                                spatial_filter.const_data_ptr<float>(),
                                out.mutable_data_ptr<T>(),
                                of_x,
                                of_y};
  const DecoupledTile tile(a.p);
  EDGEDYN_CHECK(
      context, tile.columns > 0, out,
      "decoupled_depthwise2d: kernel_size %ld, stride %ld and dilation %ld need more than 64 KiB of scratch",
      static_cast<long>(o.side), static_cast<long>(o.stride), static_cast<long>(o.dilation));
  if (out.numel() > 0) Filter(a, tile);
  return out;
}

Tensor& decoupled_depthwise2d_out(KernelRuntimeContext& context, const Tensor& x,
                                  const Tensor& channel_filter, const Tensor& spatial_filter,
                                  int64_t kernel_size, int64_t stride, int64_t dilation, int64_t heads,
                                  string_view combine, Tensor& out) {
  return Run<float>(context, x, channel_filter, spatial_filter,
                    {kernel_size, stride, dilation, heads, combine}, {}, {}, out);
}

Tensor& decoupled_depthwise2d_int8_out(KernelRuntimeContext& context, const Tensor& x, double x_scale,
                                       int64_t x_zero_point, const Tensor& channel_filter,
                                       const Tensor& spatial_filter, int64_t kernel_size, int64_t stride,
                                       int64_t dilation, int64_t heads, string_view combine, double y_scale,
                                       int64_t y_zero_point, Tensor& out) {
  return Run<int8_t>(context, x, channel_filter, spatial_filter,
                     {kernel_size, stride, dilation, heads, combine}, Affine(x_scale, x_zero_point),
                     Affine(y_scale, y_zero_point), out);
}

EXECUTORCH_LIBRARY(edgedyn, "decoupled_depthwise2d.out", decoupled_depthwise2d_out);
EXECUTORCH_LIBRARY(edgedyn, "decoupled_depthwise2d_int8.out", decoupled_depthwise2d_int8_out);

}  // namespace
}  // namespace edgedyn
#endif
