// sliced_depthwise2d for ExecuTorch: a strip of columns at a time, down the rows.
//
// For a strip, the two grid rows around the pixel row are interpolated along the columns once ("upper" and
// "lower"); they hold for all rows between two grid centres. Rows are then read once into a padded tile of
// float scratch, so that no tap asks where the border is, and four rows share each load of a kernel.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "sliced_depthwise2d/kernel_executorch.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// after foreach_target.h
#include "executorch.h"
#include "hwy/highway.h"
#include "rows-inl.h"
#include "sliced_depthwise2d/formula.h"

#ifndef EDGEDYN_SLICED_DEPTHWISE2D_ARGUMENTS
#define EDGEDYN_SLICED_DEPTHWISE2D_ARGUMENTS
namespace edgedyn {

template <typename T>
struct SlicedArguments {
  SlicedDepthwise2d p;
  const T* x;
  const float* grid;
  const float* offset;
  T* y;
  Quantization of_x, of_y;
};

// The scratch of one strip, and how wide the strip may be for it to fit.
struct SlicedStrip {
  static constexpr int64_t kFloats = 16384;  // 64 KiB per thread
  static constexpr int64_t kRows = 8;        // of a tile; more would leave the first-level cache
  static constexpr int64_t kLanes = 16;      // of the widest instruction set

  explicit SlicedStrip(const SlicedDepthwise2d& p)
      : tables(p.side * p.side + 1), halo(p.side / 2 * p.dilation), tile_rows(kRows + 2 * halo) {
    const int64_t room = kFloats - tile_rows * 2 * halo;
    const int64_t widest = room / (2 * tables + 3 + tile_rows) / kLanes * kLanes;
    const int64_t most = widest < 256 ? widest : 256;
    if (most <= 0) return;
    const int64_t strips = (p.width + most - 1) / most;
    columns = ((p.width + strips - 1) / strips + kLanes - 1) / kLanes * kLanes;
  }

  int64_t tables, halo, tile_rows;
  int64_t columns = 0;  // 0: does not fit
};

using SlicedPlace = int64_t[5];  // sample, filter, first column, rows [begin, end)

}  // namespace edgedyn
#endif

HWY_BEFORE_NAMESPACE();
namespace edgedyn {
namespace HWY_NAMESPACE {

// Sums over taps at one vector of pixels between two grid rows, of which it takes `above` and `below`.
template <typename T>
constexpr int kSums = 1;
template <>
constexpr int kSums<int8_t> =
    2;  // INT8 pixels are finite: one sum per grid row is 2 operations per tap, not 3

// The kernel first: an infinite pixel then meets one kernel, not two of two signs.
HWY_INLINE void AddTap(Vector upper, Vector lower, Vector pixels, Vector above, Vector below,
                       Vector (&sums)[1]) {
  sums[0] = hn::MulAdd(hn::MulAdd(lower, below, hn::Mul(upper, above)), pixels, sums[0]);
}
HWY_INLINE void AddTap(Vector upper, Vector lower, Vector pixels, Vector, Vector, Vector (&sums)[2]) {
  sums[0] = hn::MulAdd(upper, pixels, sums[0]), sums[1] = hn::MulAdd(lower, pixels, sums[1]);
}

HWY_INLINE Vector Total(const Vector (&sums)[1], Vector, Vector) { return sums[0]; }
HWY_INLINE Vector Total(const Vector (&sums)[2], Vector above, Vector below) {
  return hn::MulAdd(sums[1], below, hn::Mul(sums[0], above));
}

// One strip of one filter's channels.
template <typename T>
class SlicedFilter {
 public:
  SlicedFilter(const SlicedArguments<T>& a, const SlicedStrip& strip, int64_t b, int64_t filter, int64_t left,
               float* scratch)
      : a_(a), p_(a.p), strip_(strip), b_(b), filter_(filter), left_(left),
        count_(std::min(strip.columns, a.p.width - left)), tile_width_(strip.columns + 2 * strip.halo) {
    const int64_t s = strip.columns;
    upper_ = scratch, lower_ = upper_ + strip.tables * s;
    low_ = reinterpret_cast<int32_t*>(lower_ + strip.tables * s), high_ = low_ + s;
    weight_ = reinterpret_cast<float*>(high_ + s), tile_ = weight_ + s;
    for (int64_t j = 0; j < s; ++j) {
      const Cell cell = locate(std::min(left + j, p_.width - 1), p_.width, p_.grid_width, p_.align_corners);
      low_[j] = static_cast<int32_t>(cell.low), high_[j] = static_cast<int32_t>(cell.high),
      weight_[j] = cell.weight;
    }
  }

  void FilterRows(int64_t begin, int64_t end) {
    int64_t upper = -1, lower = -1;
    for (int64_t h = begin, rows; h < end; h += rows) {
      const Cell first = Locate(h);
      rows = 1;
      while (rows < SlicedStrip::kRows && h + rows < end && Locate(h + rows).low == first.low) ++rows;
      if (first.low != upper && first.low == lower) std::swap(upper_, lower_), std::swap(upper, lower);
      if (first.low != upper) Interpolate(upper = first.low, upper_);
      if (first.high != lower) Interpolate(lower = first.high, lower_);
      const int64_t share = p_.channels / p_.filters;
      for (int64_t c = filter_ * share; c < (filter_ + 1) * share; ++c) FilterTile(c, h, rows);
    }
  }

 private:
  Cell Locate(int64_t row) const { return locate(row, p_.height, p_.grid_height, p_.align_corners); }

  // One grid row of every tap, and of the offset, along the columns of the strip.
  void Interpolate(int64_t row, float* HWY_RESTRICT table) const {
    const Floats d;
    const int64_t taps = p_.side * p_.side, cells = p_.grid_height * p_.grid_width;
    for (int64_t t = 0; t < taps + (a_.offset ? 1 : 0); ++t, table += strip_.columns) {
      const float* plane = t < taps ? a_.grid + ((b_ * taps + t) * p_.filters + filter_) * cells
                                    : a_.offset + (b_ * p_.filters + filter_) * cells;
      const float* from = plane + row * p_.grid_width;
      for (int64_t j = 0; j < strip_.columns; j += hn::Lanes(d)) {
        const auto low = Cells(from, low_ + j), high = Cells(from, high_ + j);
        const auto weight = hn::LoadU(d, weight_ + j);
        hn::StoreU(hn::MulAdd(high, weight, hn::Mul(low, hn::Sub(hn::Set(d, 1.0f), weight))), d, table + j);
      }
    }
  }

  // The cells of a grid row at ascending indices: mostly within one vector, whose lanes are then looked up.
  Vector Cells(const float* from, const int32_t* index) const {
    const Floats d;
    const hn::RebindToSigned<Floats> d32;
    const int64_t lanes = hn::Lanes(d),
                  first = std::min<int64_t>(index[0], std::max(p_.grid_width - lanes, int64_t{0}));
    const auto indices = hn::LoadU(d32, index);
    if (index[lanes - 1] - first >= lanes) return hn::GatherIndex(d, from, indices);
    const auto places = hn::IndicesFromVec(d, hn::Sub(indices, hn::Set(d32, static_cast<int32_t>(first))));
    if (p_.grid_width >= lanes) return hn::TableLookupLanes(hn::LoadU(d, from + first), places);
    // a copy: Highway 1.0's MaskedLoad reads all lanes on SSE4 and NEON, past the end of the grid
    HWY_ALIGN float cells[HWY_MAX_BYTES / sizeof(float)] = {};
    std::memcpy(cells, from, p_.grid_width * sizeof(float));
    return hn::TableLookupLanes(hn::Load(d, cells), places);
  }

  void FilterTile(int64_t c, int64_t h, int64_t rows) const {
    const T* plane = a_.x + (b_ * p_.channels + c) * p_.height * p_.width;
    for (int64_t i = 0; i < rows + 2 * strip_.halo; ++i) {
      const int64_t row = h + i - strip_.halo;
      const T* from = row >= 0 && row < p_.height ? plane + row * p_.width : nullptr;
      ReadPadded(from, p_.width, left_ - strip_.halo, tile_width_, a_.of_x, tile_ + i * tile_width_);
    }
    T* to = a_.y + ((b_ * p_.channels + c) * p_.height + h) * p_.width + left_;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) FilterBlock<4>(i, h + i, to + i * p_.width);
    for (; i < rows; ++i) FilterBlock<1>(i, h + i, to + i * p_.width);
  }

  // Rows between the same two grid rows, and how much of each they take.
  template <int kRows>
  struct Block {
    const float* tile;
    int64_t tile_width, columns;
    Vector above[kRows], below[kRows];
  };

  template <int kRows>
  void FilterBlock(int64_t row, int64_t h, T* to) const {
    const Floats d;
    Block<kRows> block{tile_ + row * tile_width_, tile_width_, strip_.columns, {}, {}};
    for (int r = 0; r < kRows; ++r) {
      const float weight = Locate(h + r).weight;
      block.above[r] = hn::Set(d, 1 - weight), block.below[r] = hn::Set(d, weight);
    }
    const bool is_common = p_.side == 3 && p_.dilation == 1;
    const int64_t offset = (strip_.tables - 1) * strip_.columns, count = count_, width = p_.width;
    const Quantization of_y = a_.of_y;
    for (int64_t j = 0; j < count; j += hn::Lanes(d)) {
      Vector sums[kRows][kSums<T>];
      for (int r = 0; r < kRows; ++r) {
        for (Vector& sum : sums[r]) sum = hn::Zero(d);
      }
      is_common ? Sum3x3(block, j, sums) : SumAny(block, j, sums);
      for (int r = 0; r < kRows; ++r) {
        Vector total = Total(sums[r], block.above[r], block.below[r]);
        if (a_.offset) {
          total = hn::MulAdd(hn::LoadU(d, upper_ + offset + j), block.above[r], total);
          total = hn::MulAdd(hn::LoadU(d, lower_ + offset + j), block.below[r], total);
        }
        WriteLanes(total, count - j, of_y, to + r * width + j);
      }
    }
  }

  // A column of taps at a time: a row of pixels is loaded once for the up to three output rows that read it.
  template <int kRows>
  HWY_INLINE void Sum3x3(const Block<kRows>& block, int64_t j, Vector (&sums)[kRows][kSums<T>]) const {
    const Floats d;
    for (int dx = 0; dx < 3; ++dx) {
      Vector upper[3], lower[3];
      for (int dy = 0; dy < 3; ++dy) {
        upper[dy] = hn::LoadU(d, upper_ + (3 * dy + dx) * block.columns + j);
        lower[dy] = hn::LoadU(d, lower_ + (3 * dy + dx) * block.columns + j);
      }
      for (int i = 0; i < kRows + 2; ++i) {
        const Vector pixels = hn::LoadU(d, block.tile + i * block.tile_width + j + dx);
        for (int dy = 0; dy < 3; ++dy) {
          const int r = i - dy;
          if (r >= 0 && r < kRows)
            AddTap(upper[dy], lower[dy], pixels, block.above[r], block.below[r], sums[r]);
        }
      }
    }
  }

  template <int kRows>
  HWY_INLINE void SumAny(const Block<kRows>& block, int64_t j, Vector (&sums)[kRows][kSums<T>]) const {
    const Floats d;
    const float* upper = upper_ + j;
    const float* lower = lower_ + j;
    for (int64_t dy = 0; dy < p_.side; ++dy) {
      const float* x = block.tile + dy * p_.dilation * block.tile_width + j;
      for (int64_t dx = 0; dx < p_.side;
           ++dx, x += p_.dilation, upper += block.columns, lower += block.columns) {
        const Vector of_upper = hn::LoadU(d, upper), of_lower = hn::LoadU(d, lower);
        for (int r = 0; r < kRows; ++r) {
          const Vector pixels = hn::LoadU(d, x + r * block.tile_width);
          AddTap(of_upper, of_lower, pixels, block.above[r], block.below[r], sums[r]);
        }
      }
    }
  }

  const SlicedArguments<T>& a_;
  const SlicedDepthwise2d& p_;
  const SlicedStrip& strip_;
  const int64_t b_, filter_, left_, count_, tile_width_;
  float *upper_, *lower_, *weight_, *tile_;
  int32_t *low_, *high_;
};

template <typename T>
void FilterStrip(const SlicedArguments<T>& a, const SlicedStrip& strip, const SlicedPlace& at) {
  alignas(64) float scratch[SlicedStrip::kFloats];
  SlicedFilter<T>(a, strip, at[0], at[1], at[2], scratch).FilterRows(at[3], at[4]);
}
EDGEDYN_PER_TYPE(FilterStrip, SlicedArguments, SlicedStrip, SlicedPlace)

}  // namespace HWY_NAMESPACE
}  // namespace edgedyn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace edgedyn {
namespace {

EDGEDYN_DISPATCH(FilterStrip, SlicedArguments, SlicedStrip, SlicedPlace)

constexpr int64_t kBand = 128;  // rows of a work item

template <typename T>
void Filter(const SlicedArguments<T>& a) {
  const SlicedDepthwise2d& p = a.p;
  const SlicedStrip strip(p);
  const int64_t strips = (p.width + strip.columns - 1) / strip.columns;
  const int64_t bands = (p.height + kBand - 1) / kBand;
  parallel_for(0, p.batch * p.filters * strips * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t band = item % bands, left = item / bands % strips * strip.columns;
      const int64_t filter = item / bands / strips % p.filters, b = item / bands / strips / p.filters;
      FilterStrip(a, strip, {b, filter, left, band * kBand, std::min((band + 1) * kBand, p.height)});
    }
  });
}

// Returns the error in the arguments, or null.
const char* Check(const Tensor& x, ScalarType type, const Tensor& grid, const optional<Tensor>& offset,
                  int64_t kernel_size, int64_t dilation) {
  if (!IsDense(x, 4, type)) return "expected x as a contiguous (B, C, H, W) of the op's type";
  if (!IsDense(grid, 4, ScalarType::Float))
    return "expected grid as a contiguous (B, T * F, gh, gw) of float";
  if (kernel_size < 1 || kernel_size % 2 == 0 || dilation < 1)
    return "expected an odd kernel_size and dilation >= 1";
  const int64_t taps = kernel_size * kernel_size, filters = grid.size(1) / taps;
  if (grid.size(0) != x.size(0) || filters == 0 || grid.size(1) % taps || x.size(1) % filters)
    return "expected a grid of T * F channels where F divides the channels of x, and the batch of x";
  if (grid.numel() == 0 && x.numel() > 0) return "expected a grid of at least one cell";
  if (!offset.has_value()) return nullptr;
  if (!IsDense(*offset, 4, ScalarType::Float) || offset->size(0) != x.size(0) || offset->size(1) != filters ||
      offset->size(2) != grid.size(2) || offset->size(3) != grid.size(3))
    return "expected an offset of one channel per filter on the grid's cells";
  return nullptr;
}

template <typename T>
Tensor& Run(KernelRuntimeContext& context, const Tensor& x, const Tensor& grid,
            const optional<Tensor>& offset, int64_t kernel_size, int64_t dilation, bool align_corners,
            Quantization of_x, Quantization of_y, Tensor& out) {
  const char* wrong = Check(x, kScalarType<T>, grid, offset, kernel_size, dilation);
  EDGEDYN_CHECK(context, !wrong, out, "sliced_depthwise2d: %s", wrong);
  EDGEDYN_CHECK(context, IsInt8(of_x) && IsInt8(of_y), out,
                "sliced_depthwise2d: expected scales > 0 and zero points in [-128, 127]");
  EDGEDYN_CHECK(context, ResizeTo(out, kScalarType<T>, {x.size(0), x.size(1), x.size(2), x.size(3)}), out,
                "sliced_depthwise2d: out cannot hold y of the shape of x");
  const int64_t filters = grid.size(1) / (kernel_size * kernel_size);
  const SlicedArguments<T> a{{x.size(0), x.size(1), x.size(2), x.size(3), filters, grid.size(2), grid.size(3),
                              kernel_size, dilation, align_corners},
                             x.const_data_ptr<T>(),
                             grid.const_data_ptr<float>(),
                             offset.has_value() ? offset->const_data_ptr<float>() : nullptr,
                             out.mutable_data_ptr<T>(),
                             of_x,
                             of_y};
  EDGEDYN_CHECK(context, SlicedStrip(a.p).columns > 0, out,
                "sliced_depthwise2d: kernel_size %ld at dilation %ld needs more than 64 KiB of scratch",
                static_cast<long>(kernel_size), static_cast<long>(dilation));
  if (x.numel() > 0) Filter(a);
  return out;
}

Tensor& sliced_depthwise2d_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& grid,
                               const optional<Tensor>& offset, int64_t kernel_size, int64_t dilation,
                               bool align_corners, Tensor& out) {
  return Run<float>(context, x, grid, offset, kernel_size, dilation, align_corners, {}, {}, out);
}

Tensor& sliced_depthwise2d_int8_out(KernelRuntimeContext& context, const Tensor& x, double x_scale,
                                    int64_t x_zero_point, const Tensor& grid, const optional<Tensor>& offset,
                                    int64_t kernel_size, int64_t dilation, bool align_corners, double y_scale,
                                    int64_t y_zero_point, Tensor& out) {
  return Run<int8_t>(context, x, grid, offset, kernel_size, dilation, align_corners,
                     Affine(x_scale, x_zero_point), Affine(y_scale, y_zero_point), out);
}

EXECUTORCH_LIBRARY(edgedyn, "sliced_depthwise2d.out", sliced_depthwise2d_out);
EXECUTORCH_LIBRARY(edgedyn, "sliced_depthwise2d_int8.out", sliced_depthwise2d_int8_out);

}  // namespace
}  // namespace edgedyn
#endif
