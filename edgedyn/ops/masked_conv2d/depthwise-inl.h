// The depthwise path of masked_conv2d: one strip of a band of rows, for every instruction set that Highway
// compiles.
//
// A band is read once into padded float scratch, so that no tap asks where the border is; four rows share
// each load of a weight, and vectors of columns without an active position in the four rows are skipped.
#include "hwy/highway.h"
#include "masked_conv2d/work.h"
#include "rows-inl.h"

#if defined(EDGEDYN_OPS_MASKED_CONV2D_DEPTHWISE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EDGEDYN_OPS_MASKED_CONV2D_DEPTHWISE_INL_H_
#undef EDGEDYN_OPS_MASKED_CONV2D_DEPTHWISE_INL_H_
#else
#define EDGEDYN_OPS_MASKED_CONV2D_DEPTHWISE_INL_H_
#endif

#include <algorithm>

HWY_BEFORE_NAMESPACE();
namespace edgedyn {
namespace HWY_NAMESPACE {

// Comparisons, not Min and Max: those may drop a NaN.
inline Vector Activate(Activation activation, Vector y) {
  const Floats d;
  if (activation == Activation::kNone) return y;
  y = hn::IfThenZeroElse(hn::Lt(y, hn::Zero(d)), y);
  const Vector six = hn::Set(d, 6.0f);
  return activation == Activation::kRelu6 ? hn::IfThenElse(hn::Gt(y, six), six, y) : y;
}

// Compile-time parameters of a depthwise kernel's loops.
enum class Taps { kDense3x3, kUnitStride, kAny };

// One strip of a band of rows, for some output channels of a depthwise convolution.
template <typename T>
class BandFilter {
 public:
  BandFilter(const MaskedArguments<T>& a, const MaskedBand& band, int64_t b, int64_t top, int64_t left)
      : a_(a), p_(a.p), band_(band), b_(b), top_(top), left_(left),
        rows_(std::min(MaskedBand::kRows, a.p.out_height - top)),
        count_(std::min(band.columns, a.p.out_width - left)),
        tile_width_((band.columns - 1) * a.p.stride + band.reach), tile_(scratch_),
        mask_(scratch_ + band.tile_rows * tile_width_), row_(top * a.p.stride - a.p.padding),
        column_(left * a.p.stride - a.p.padding), begin_(std::clamp<int64_t>(-column_, 0, tile_width_)),
        end_(std::clamp<int64_t>(a.p.width - column_, begin_, tile_width_)) {
    const float* mask = a_.mask + (b * p_.out_height + top) * p_.out_width;
    for (int64_t i = 0; i < rows_; ++i) {
      ReadPadded(mask + i * p_.out_width, p_.out_width, left, band.columns, {}, mask_ + i * band.columns);
    }
    is_active_ = std::any_of(mask_, mask_ + rows_ * band.columns, [](float m) { return m != 0; });
    std::fill(tile_, mask_, 0.0f);  // outside of x the tile stays 0 for every channel
  }

  void FilterChannel(int64_t o) {
    T* to = a_.y + ((b_ * p_.outputs + o) * p_.out_height + top_) * p_.out_width + left_;
    if (!is_active_) {
      for (int64_t i = 0; i < rows_; ++i) std::fill_n(to + i * p_.out_width, count_, Inactive(to, a_.of_y));
      return;
    }
    const int64_t channel = o / (p_.outputs / p_.channels);
    const T* plane = a_.x + (b_ * p_.channels + channel) * p_.height * p_.width;
    const int64_t rows = (rows_ - 1) * p_.stride + band_.reach;
    for (int64_t i = std::max<int64_t>(0, -row_); i < std::min(rows, p_.height - row_) && begin_ < end_;
         ++i) {
      const T* from = plane + (row_ + i) * p_.width + column_ + begin_;
      ReadRow(from, end_ - begin_, a_.of_x, tile_ + i * tile_width_ + begin_);
    }
    if (p_.stride > 1) {
      FilterRows<Taps::kAny>(o, to);
    } else if (p_.side == 3 && p_.dilation == 1) {
      FilterRows<Taps::kDense3x3>(o, to);
    } else {
      FilterRows<Taps::kUnitStride>(o, to);
    }
  }

 private:
  template <Taps kTaps>
  void FilterRows(int64_t o, T* to) const {
    int64_t i = 0;
    for (; i + 4 <= rows_; i += 4) FilterBlock<4, kTaps>(o, i, to + i * p_.out_width);
    for (; i < rows_; ++i) FilterBlock<1, kTaps>(o, i, to + i * p_.out_width);
  }

  template <int kRows, Taps kTaps>
  void FilterBlock(int64_t o, int64_t i, T* to) const {
    const Floats d;
    const float* mask = mask_ + i * band_.columns;
    for (int64_t j = 0; j < count_; j += hn::Lanes(d)) {
      Vector any = hn::LoadU(d, mask + j);
      for (int r = 1; r < kRows; ++r) any = hn::Or(any, hn::LoadU(d, mask + r * band_.columns + j));
      Vector y[kRows];
      for (int r = 0; r < kRows; ++r) y[r] = hn::Zero(d);
      if (!hn::AllTrue(d, hn::Eq(any, hn::Zero(d)))) {
        FilterVectors<kRows, kTaps>(o, tile_ + (i * tile_width_ + j) * p_.stride, y);
      }
      for (int r = 0; r < kRows; ++r) {
        const auto is_active = hn::Ne(hn::LoadU(d, mask + r * band_.columns + j), hn::Zero(d));
        WriteLanes(hn::IfThenElseZero(is_active, y[r]), count_ - j, a_.of_y, to + r * p_.out_width + j);
      }
    }
  }

  template <int kRows, Taps kTaps>
  HWY_INLINE void FilterVectors(int64_t o, const float* HWY_RESTRICT x, Vector (&y)[kRows]) const {
    const Floats d;
    const hn::RebindToSigned<Floats> d32;
    const int64_t side = kTaps == Taps::kDense3x3 ? 3 : p_.side;
    const int64_t dilation = kTaps == Taps::kDense3x3 ? 1 : p_.dilation;
    const int64_t stride = kTaps == Taps::kAny ? p_.stride : 1;
    const auto lanes = hn::Mul(hn::Iota(d32, 0), hn::Set(d32, static_cast<int32_t>(stride)));
    const float* weight = a_.weight + o * side * side;
    for (int r = 0; r < kRows; ++r) y[r] = hn::Set(d, a_.bias ? a_.bias[o] : 0.0f);
    HWY_UNROLL(3)
    for (int64_t dy = 0; dy < side; ++dy) {
      for (int64_t dx = 0; dx < side; ++dx) {
        const Vector w = hn::Set(d, weight[dy * side + dx]);
        for (int r = 0; r < kRows; ++r) {
          const float* from = x + (r * stride + dy * dilation) * tile_width_ + dx * dilation;
          y[r] =
              hn::MulAdd(w, kTaps == Taps::kAny ? hn::GatherIndex(d, from, lanes) : hn::LoadU(d, from), y[r]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) y[r] = Activate(p_.activation, y[r]);
  }

  const MaskedArguments<T>& a_;
  const MaskedConv2d& p_;
  const MaskedBand& band_;
  const int64_t b_, top_, left_, rows_, count_, tile_width_;
  float *const tile_, *const mask_;
  const int64_t row_, column_;  // of x, at the tile's corner
  const int64_t begin_, end_;   // columns of the tile inside of x
  bool is_active_;
  alignas(64) float scratch_[MaskedBand::kFloats];
};

}  // namespace HWY_NAMESPACE
}  // namespace edgedyn
HWY_AFTER_NAMESPACE();

#endif
