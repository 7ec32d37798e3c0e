// masked_conv2d for ExecuTorch: a matrix product over gathered active positions, or a depthwise filter that
// skips.
//
// Matrix: the active positions are listed in tiles of 32. A tile gathers its pixels, entry by entry of the
// kernel, into float scratch and multiplies them by four output channels at a time, weights by broadcast;
// then each output channel writes the zeros of the tile's stretch of the plane and its 32 values over them,
// while both are in cache.
//
// Depthwise (depthwise-inl.h): an entry is used once, and gathering it costs more than filtering a whole
// vector of columns. So vectors are filtered, and only those without an active position are skipped.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "masked_conv2d/kernel_executorch.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// after foreach_target.h
#include "executorch.h"
#include "hwy/highway.h"
#include "masked_conv2d/depthwise-inl.h"
#include "masked_conv2d/work.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace edgedyn {
namespace HWY_NAMESPACE {

// All or some output channels at one tile's positions.
template <typename T>
class TileConvolution {
 public:
  TileConvolution(const MaskedArguments<T>& a, const ActiveList& list, const ActiveTile& tile)
      : a_(a), p_(a.p), tile_(tile), depth_(p_.channels / p_.groups * p_.side * p_.side),
        plane_(p_.out_height * p_.out_width) {
    for (int64_t j = 0; j < kPixels; ++j) {  // lanes without a position compute the first one's again
      const int64_t listed = tile.count ? list.positions[tile.first + (j < tile.count ? j : 0)] : 0;
      const int64_t b = (list.begin + listed) / plane_, at = (list.begin + listed) % plane_;
      row_[j] = at / p_.out_width * p_.stride - p_.padding;
      column_[j] = at % p_.out_width * p_.stride - p_.padding;
      sample_[j] = b * p_.channels * p_.height * p_.width;
      to_[j] = b * p_.outputs * plane_ + at;
    }
  }

  // Blocks of at most kOutputs output channels; none spans two groups.
  void ConvolveBlocks(int64_t begin, int64_t end) {
    const int64_t outputs = p_.outputs / p_.groups, blocks = (outputs + kOutputs - 1) / kOutputs;
    int64_t gathered = -1;  // the group whose pixels are in scratch, where they fit at once
    for (int64_t block = begin; block < end; ++block) {
      const int64_t group = block / blocks, first = group * outputs + block % blocks * kOutputs;
      const int64_t count = std::min(kOutputs, (group + 1) * outputs - first);
      if (tile_.count > 0) {
        Begin(first, count);
        for (int64_t k = 0; k < depth_; k += kDepth) {
          const int64_t slice = std::min(kDepth, depth_ - k);
          if (gathered != group) Gather(group, k, slice);
          Multiply(a_.weight + first * depth_ + k, slice, count);
        }
        if (depth_ <= kDepth) gathered = group;
      }
      for (int64_t o = 0; o < count; ++o) Write(first + o, sums_ + o * kPixels);
    }
  }

 private:
  void Begin(int64_t first, int64_t count) {
    for (int64_t o = 0; o < count; ++o) {
      std::fill_n(sums_ + o * kPixels, kPixels, a_.bias ? a_.bias[first + o] : 0.0f);
    }
  }

  // Entries [begin, begin + count) of the group's kernels, channel by channel as the weights lie.
  void Gather(int64_t group, int64_t begin, int64_t count) {
    const int64_t taps = p_.side * p_.side, channel = group * (p_.channels / p_.groups);
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t skip = (t + taps - begin % taps) % taps;
      if (skip >= count) continue;
      Locate(t);
      const T* plane = a_.x + (channel + (begin + skip) / taps) * p_.height * p_.width;
      for (int64_t k = skip; k < count; k += taps, plane += p_.height * p_.width) {
        GatherEntry(plane, pixels_ + k * kPixels);
      }
    }
  }

  // Where one tap reads; outside of x it reads any pixel, and outside_ names the lanes to clear.
  void Locate(int64_t t) {
    const int64_t dy = t / p_.side * p_.dilation, dx = t % p_.side * p_.dilation;
    outside_count_ = 0;
    for (int64_t j = 0; j < kPixels; ++j) {
      const int64_t row = row_[j] + dy, column = column_[j] + dx;
      const bool is_inside = row >= 0 && row < p_.height && column >= 0 && column < p_.width;
      from_[j] = sample_[j] + (is_inside ? row * p_.width + column : 0);
      outside_[outside_count_] = static_cast<int32_t>(j);
      outside_count_ += !is_inside;
    }
  }

  void GatherEntry(const float* HWY_RESTRICT plane, float* HWY_RESTRICT to) const {
    for (int64_t j = 0; j < kPixels; ++j) to[j] = plane[from_[j]];
    for (int64_t n = 0; n < outside_count_; ++n) to[outside_[n]] = 0;
  }

  void GatherEntry(const int8_t* HWY_RESTRICT plane, float* HWY_RESTRICT to) const {
    int8_t stored[kPixels];
    for (int64_t j = 0; j < kPixels; ++j) stored[j] = plane[from_[j]];
    for (int64_t n = 0; n < outside_count_; ++n) stored[outside_[n]] = Inactive(plane, a_.of_x);
    ReadRow(stored, kPixels, a_.of_x, to);
  }

  void Multiply(const float* weight, int64_t depth, int64_t count) {
    int64_t o = 0;
    for (; o + 4 <= count; o += 4) MultiplyRows<4>(weight + o * depth_, depth, sums_ + o * kPixels);
    for (; o < count; ++o) MultiplyRows<1>(weight + o * depth_, depth, sums_ + o * kPixels);
  }

  template <int kRows>
  void MultiplyRows(const float* weight, int64_t depth, float* sums) const {
    const int64_t lanes = hn::Lanes(Floats());
    for (int64_t j = 0; j < tile_.count; j += 2 * lanes) {
      if (tile_.count - j > lanes) {
        MultiplyBlock<kRows, 2>(weight, depth, pixels_ + j, sums + j);
      } else {
        MultiplyBlock<kRows, 1>(weight, depth, pixels_ + j, sums + j);
      }
    }
  }

  template <int kRows, int kVectors>
  void MultiplyBlock(const float* HWY_RESTRICT weight, int64_t depth, const float* HWY_RESTRICT pixels,
                     float* HWY_RESTRICT sums) const {
    const Floats d;
    const int64_t lanes = hn::Lanes(d);
    Vector sum[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::LoadU(d, sums + r * kPixels + v * lanes);
    }
    for (int64_t k = 0; k < depth; ++k, pixels += kPixels) {
      Vector x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = hn::LoadU(d, pixels + v * lanes);
      for (int r = 0; r < kRows; ++r) {
        const Vector w = hn::Set(d, weight[r * depth_ + k]);
        for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(w, x[v], sum[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[r][v], d, sums + r * kPixels + v * lanes);
    }
  }

  // Zeros along the tile's stretch of one output channel, in each sample that it touches, and the active
  // values.
  void Write(int64_t o, const float* sums) const {
    T* plane = a_.y + o * plane_;
    for (int64_t begin = tile_.begin; begin < tile_.end;) {
      const int64_t b = begin / plane_, end = std::min(tile_.end, (b + 1) * plane_);
      T* sample = plane + b * p_.outputs * plane_;
      std::fill(sample + begin - b * plane_, sample + end - b * plane_, Inactive(plane, a_.of_y));
      begin = end;
    }
    const Floats d;
    const int64_t lanes = hn::Lanes(d);
    alignas(64) T values[kPixels];
    for (int64_t j = 0; j < tile_.count; j += lanes) {
      WriteLanes(Activate(p_.activation, hn::LoadU(d, sums + j)), lanes, a_.of_y, values + j);
    }
    for (int64_t j = 0; j < tile_.count; ++j) plane[to_[j]] = values[j];
  }

  const MaskedArguments<T>& a_;
  const MaskedConv2d& p_;
  const ActiveTile& tile_;
  const int64_t depth_, plane_;
  alignas(64) float pixels_[kDepth * kPixels];
  alignas(64) float sums_[kOutputs * kPixels];
  int64_t row_[kPixels], column_[kPixels], sample_[kPixels], from_[kPixels], to_[kPixels];
  int32_t outside_[kPixels + 1], outside_count_ = 0;
};

template <typename T>
void ConvolveTile(const MaskedArguments<T>& a, const ActiveList& list, const TileWork& at) {
  TileConvolution<T>(a, list, list.tiles[at.tile]).ConvolveBlocks(at.begin, at.end);
}
EDGEDYN_PER_TYPE(ConvolveTile, MaskedArguments, ActiveList, TileWork)

template <typename T>
void FilterBand(const MaskedArguments<T>& a, const MaskedBand& band, const BandPlace& at) {
  BandFilter<T> filter(a, band, at[0], at[1], at[2]);
  for (int64_t o = at[3]; o < at[4]; ++o) filter.FilterChannel(o);
}
EDGEDYN_PER_TYPE(FilterBand, MaskedArguments, MaskedBand, BandPlace)

}  // namespace HWY_NAMESPACE
}  // namespace edgedyn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace edgedyn {
namespace {

EDGEDYN_DISPATCH(ConvolveTile, MaskedArguments, ActiveList, TileWork)
EDGEDYN_DISPATCH(FilterBand, MaskedArguments, MaskedBand, BandPlace)

// Tiles hold equal numbers of active positions, so that threads get equal work wherever the mask is set.
template <typename T>
void Convolve(const MaskedArguments<T>& a) {
  const MaskedConv2d& p = a.p;
  const int64_t blocks = p.groups * ((p.outputs / p.groups + kOutputs - 1) / kOutputs);
  const int64_t positions = p.batch * p.out_height * p.out_width;
  for (int64_t begin = 0; begin < positions; begin += ActiveList::kPositions) {
    const ActiveList list(a.mask, begin, std::min(begin + ActiveList::kPositions, positions));
    const int64_t parts = list.count < 16 ? blocks : 1;  // few tiles: their blocks are work items
    parallel_for(0, list.count * parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t part = item % parts;
        ConvolveTile(a, list, {item / parts, part * blocks / parts, (part + 1) * blocks / parts});
      }
    });
  }
}

template <typename T>
void Filter(const MaskedArguments<T>& a, const MaskedBand& band) {
  const MaskedConv2d& p = a.p;
  const int64_t strips = (p.out_width + band.columns - 1) / band.columns;
  const int64_t bands = (p.out_height + MaskedBand::kRows - 1) / MaskedBand::kRows;
  const int64_t blocks = (p.outputs + MaskedBand::kChannels - 1) / MaskedBand::kChannels;
  parallel_for(0, p.batch * blocks * bands * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t left = item % strips * band.columns, top = item / strips % bands * MaskedBand::kRows;
      const int64_t b = item / strips / bands / blocks,
                    first = item / strips / bands % blocks * MaskedBand::kChannels;
      FilterBand(a, band, {b, top, left, first, std::min(first + MaskedBand::kChannels, p.outputs)});
    }
  });
}

// Size of the output along one axis; 0 where the kernel does not fit.
int64_t Extent(int64_t extent, const MaskedConv2d& p) {
  const int64_t room = extent + 2 * p.padding - p.dilation * (p.side - 1) - 1;
  return room < 0 ? 0 : room / p.stride + 1;
}

bool ReadActivation(std::string_view name, Activation& activation) {
  if (name == "none") return activation = Activation::kNone, true;
  if (name == "relu") return activation = Activation::kRelu, true;
  if (name == "relu6") return activation = Activation::kRelu6, true;
  return false;
}

// Returns the error in the tensors, or null; fills the sizes of p, whose other arguments are set.
const char* Check(const Tensor& x, ScalarType type, const Tensor& weight, const optional<Tensor>& bias,
                  const Tensor& mask, MaskedConv2d& p) {
  if (p.stride < 1 || p.padding < 0 || p.dilation < 1 || p.groups < 1)
    return "expected padding >= 0, and stride, dilation and groups >= 1";
  if (!IsDense(x, 4, type) || (x.numel() == 0 && x.size(0) > 0))
    return "expected x as a contiguous (B, I, H, W) of the op's type, at least one channel and pixel";
  if (!IsDense(weight, 4, ScalarType::Float) || weight.size(2) != weight.size(3) || weight.size(2) < 1)
    return "expected weight as a contiguous (O, I / groups, R, R) of float";
  if (x.size(1) != weight.size(1) * p.groups || weight.size(0) % p.groups)
    return "expected I / groups channels per kernel, and groups to divide O";
  if (bias.has_value() &&
      (bias->dim() != 1 || bias->size(0) != weight.size(0) || bias->scalar_type() != ScalarType::Float))
    return "expected bias as one float per output channel";
  p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.outputs = weight.size(0), p.side = weight.size(2);
  p.out_height = Extent(p.height, p), p.out_width = Extent(p.width, p);
  if (p.out_height < 1 || p.out_width < 1) return "expected a kernel that fits the padded x";
  if (!IsDense(mask, 4, ScalarType::Float) || mask.size(0) != p.batch || mask.size(1) != 1 ||
      mask.size(2) != p.out_height || mask.size(3) != p.out_width)
    return "expected mask as a contiguous (B, 1, h, w) of float, one value per position of the output";
  const float* begin = mask.const_data_ptr<float>();
  const bool is_binary = std::all_of(begin, begin + mask.numel(), [](float m) { return m == 0 || m == 1; });
  return is_binary ? nullptr : "expected a mask of 0 and 1 only";
}

template <typename T>
Tensor& Run(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight,
            const optional<Tensor>& bias, const Tensor& mask, MaskedConv2d p, std::string_view activation,
            Quantization of_x, Quantization of_y, Tensor& out) {
  EDGEDYN_CHECK(context, ReadActivation(activation, p.activation), out,
                "masked_conv2d: expected the activation none, relu or relu6");
  const char* wrong = Check(x, kScalarType<T>, weight, bias, mask, p);
  EDGEDYN_CHECK(context, !wrong, out, "masked_conv2d: %s", wrong);
  EDGEDYN_CHECK(context, IsInt8(of_x) && IsInt8(of_y), out,
                "masked_conv2d: expected scales > 0 and zero points in [-128, 127]");
  EDGEDYN_CHECK(context, ResizeTo(out, kScalarType<T>, {p.batch, p.outputs, p.out_height, p.out_width}), out,
                "masked_conv2d: out cannot hold y");
  const MaskedArguments<T> a{p,
                             x.const_data_ptr<T>(),
                             weight.const_data_ptr<float>(),
                             bias.has_value() ? bias->const_data_ptr<float>() : nullptr,
                             mask.const_data_ptr<float>(),
                             out.mutable_data_ptr<T>(),
                             of_x,
                             of_y};
  if (out.numel() == 0) return out;
  const MaskedBand band(p);
  if (p.groups > 1 && p.groups == p.channels && band.columns > 0) {
    Filter(a, band);
  } else {
    Convolve(a);
  }
  return out;
}

Tensor& masked_conv2d_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight,
                          const optional<Tensor>& bias, const Tensor& mask, int64_t stride, int64_t padding,
                          int64_t dilation, int64_t groups, std::string_view activation, Tensor& out) {
  MaskedConv2d p{};
  p.stride = stride, p.padding = padding, p.dilation = dilation, p.groups = groups;
  return Run<float>(context, x, weight, bias, mask, p, activation, {}, {}, out);
}

Tensor& masked_conv2d_int8_out(KernelRuntimeContext& context, const Tensor& x, double x_scale,
                               int64_t x_zero_point, const Tensor& weight, const optional<Tensor>& bias,
                               const Tensor& mask, int64_t stride, int64_t padding, int64_t dilation,
                               int64_t groups, std::string_view activation, double y_scale,
                               int64_t y_zero_point, Tensor& out) {
  MaskedConv2d p{};
  p.stride = stride, p.padding = padding, p.dilation = dilation, p.groups = groups;
  return Run<int8_t>(context, x, weight, bias, mask, p, activation, Affine(x_scale, x_zero_point),
                     Affine(y_scale, y_zero_point), out);
}

EXECUTORCH_LIBRARY(edgedyn, "masked_conv2d.out", masked_conv2d_out);
EXECUTORCH_LIBRARY(edgedyn, "masked_conv2d_int8.out", masked_conv2d_int8_out);

}  // namespace
}  // namespace edgedyn
#endif
