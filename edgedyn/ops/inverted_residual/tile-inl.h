// What float and INT8 tiles of a block share, for every instruction set that Highway compiles: activations,
// the columns of a tile, and its output.
#include <limits>
#include <vector>

#include "hwy/highway.h"
#include "inverted_residual/windows-inl.h"

#if defined(EDGEDYN_OPS_BLOCK_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EDGEDYN_OPS_BLOCK_TILE_INL_H_
#undef EDGEDYN_OPS_BLOCK_TILE_INL_H_
#else
#define EDGEDYN_OPS_BLOCK_TILE_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace edgedyn {
namespace HWY_NAMESPACE {

// An activation of values in units of `unit`: float values have unit 1, INT8 ones their quantization step.
struct Finish {
  BlockActivation activation = BlockActivation::kNone;
  const float* slopes = nullptr;  // one per channel
  float unit = 1;
  bool bounds = false;  // keeps values within int32 when they are rounded
};

// Bounds that keep NaN: Highway's Min and Max return the other operand on some targets.
HWY_INLINE Vector AtLeast(Vector v, Vector least) { return hn::IfThenElse(hn::Lt(v, least), least, v); }
HWY_INLINE Vector AtMost(Vector v, Vector most) { return hn::IfThenElse(hn::Gt(v, most), most, v); }

// Hardswish, and bounds that keep values within int32: out of line, since they are rare and long.
template <int kCount>
HWY_NOINLINE void ActivateRarely(const Finish& f, Vector (&v)[kCount]) {
  const Floats d;
  const Vector three = hn::Set(d, 3 / f.unit), six = hn::Set(d, 6 / f.unit), sixth = hn::Set(d, f.unit / 6);
  const Vector most = hn::Set(d, 1e9f), least = hn::Set(d, -1e9f);
  for (auto& value : v) {
    if (f.activation == BlockActivation::kHardswish) {
      const Vector gate = AtMost(AtLeast(hn::Add(value, three), hn::Zero(d)), six);
      value = hn::Mul(hn::Mul(value, gate), sixth);
    }
    if (f.bounds) value = AtMost(AtLeast(value, least), most);
  }
}

// Applies the activation to the vectors of one channel. NaN stays NaN, as in torch.
template <int kCount>
HWY_INLINE void Activate(const Finish& f, int64_t channel, Vector (&v)[kCount]) {
  const Floats d;
  const Vector zero = hn::Zero(d);
  if (f.activation == BlockActivation::kPrelu) {
    const Vector slope = hn::Set(d, f.slopes[channel]);
    EDGEDYN_UNROLL
    for (auto& value : v) value = hn::IfThenElse(hn::Lt(value, zero), hn::Mul(value, slope), value);
  } else if (f.activation == BlockActivation::kRelu || f.activation == BlockActivation::kRelu6) {
    const bool is_capped = f.activation == BlockActivation::kRelu6;
    const Vector most = hn::Set(d, is_capped ? 6 / f.unit : std::numeric_limits<float>::infinity());
    EDGEDYN_UNROLL
    for (auto& value : v) value = AtMost(AtLeast(value, zero), most);
  }
  if (f.activation == BlockActivation::kHardswish || f.bounds) {
    Vector rare[kCount];
    EDGEDYN_UNROLL
    for (int k = 0; k < kCount; ++k) rare[k] = v[k];
    ActivateRarely(f, rare);
    EDGEDYN_UNROLL
    for (int k = 0; k < kCount; ++k) v[k] = rare[k];
  }
}

// Room for `words` values of 32 bits, at a cache line.
template <typename T>
HWY_INLINE T* Carve(std::vector<T>& scratch, int64_t words) {
  scratch.resize(std::max<int64_t>(scratch.size(), words + 16));
  return scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64 / 4;
}

// The columns of a tile, in its own coordinates: hidden column j of a row is column left + j of the image.
struct TileColumns {
  TileColumns(const InvertedResidual& p, const BlockTile& tile)
      : left(tile.column * p.stride - p.side / 2), width((tile.columns - 1) * p.stride + p.side),
        begin(std::max<int64_t>(-left, 0)), end(std::min(width, p.width - left)) {}

  // Words between two rows of scratch, with room for the lanes behind the last column; an odd number of cache
  // lines, because many rows would fall into one cache set otherwise.
  int64_t Pitch(const InvertedResidual& p, const BlockTile& tile, int64_t lanes) const {
    const int64_t read = (tile.columns + lanes) * p.stride + p.side + lanes, written = end + lanes;
    return (RoundUp(std::max(read, written), 16) / 16 | 1) * 16;
  }

  int64_t left, width;
  int64_t begin, end;  // inside of the image
};

// The columns of a tile that are computed: all, or those that an active position of the mask needs.
class NeededColumns {
 public:
  NeededColumns(const InvertedResidual& p, const float* mask, const BlockTile& tile,
                const TileColumns& columns)
      : p_(p), tile_(tile), columns_(columns),
        mask_(mask ? mask + (tile.sample * p.out_height + tile.row) * p.out_width + tile.column : nullptr) {}

  // Columns of `rows` rows of y.
  Windows OfOutput(int64_t row, int64_t rows) const {
    return mask_ ? Windows(Active(row, row + rows)) : Windows(tile_.columns);
  }

  // Columns of a quad of hidden rows, counted from the first one inside of the image.
  Windows OfHidden(int64_t quad) const {
    const int64_t count = columns_.end - columns_.begin;
    if (!mask_) return Windows(count);
    const int64_t top = quad * kQuad;  // rows of y from the first to the last that read the quad
    const std::vector<uint8_t> active = Active(std::max<int64_t>(top - p_.side + p_.stride, 0) / p_.stride,
                                               (top + kQuad - 1) / p_.stride + 1);
    std::vector<uint8_t> needed(count);
    for (int64_t j = 0; j < tile_.columns; ++j) {
      if (!active[j]) continue;
      const int64_t first = j * p_.stride - columns_.begin;
      for (int64_t i = std::max<int64_t>(first, 0); i < std::min(first + p_.side, count); ++i) needed[i] = 1;
    }
    return Windows(needed);
  }

 private:
  // Columns with an active position in output rows [row, last).
  std::vector<uint8_t> Active(int64_t row, int64_t last) const {
    std::vector<uint8_t> active(tile_.columns);
    for (; row < std::min(last, tile_.rows); ++row) {
      for (int64_t j = 0; j < tile_.columns; ++j) active[j] |= mask_[row * p_.out_width + j] != 0;
    }
    return active;
  }

  const InvertedResidual& p_;
  const BlockTile& tile_;
  const TileColumns& columns_;
  const float* mask_;
};

HWY_INLINE void WriteRow(const float* HWY_RESTRICT f, int64_t count, const float* residual, const float* mask,
                         float* HWY_RESTRICT to) {
  const Floats d;
  const int64_t lanes = hn::Lanes(d);
  int64_t j = 0;
  for (; j + lanes <= count; j += lanes) {
    Vector value = hn::LoadU(d, f + j);
    if (mask) value = hn::IfThenElseZero(hn::Ne(hn::LoadU(d, mask + j), hn::Zero(d)), value);
    if (residual) value = hn::Add(hn::LoadU(d, residual + j), value);
    hn::StoreU(value, d, to + j);
  }
  for (; j < count; ++j) {
    const float value = mask && mask[j] == 0 ? 0 : f[j];
    to[j] = residual ? residual[j] + value : value;
  }
}

// Writes `rows` rows of a tile from scratch [output][row of the step]: F(x) where the mask is set, plus x
// with a residual. Whole rows: y's planes often lie a power of two apart, and single lines of them would fall
// into one set of every cache.
template <typename T>
HWY_INLINE void WriteRows(const BlockArguments<T>& a, const BlockTile& tile, int64_t first, int64_t rows,
                          const float* from, int64_t pitch) {
  const InvertedResidual& p = a.p;
  for (int64_t o = 0; o < p.outputs; ++o) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = tile.row + first + i;
      const int64_t at = ((tile.sample * p.outputs + o) * p.out_height + row) * p.out_width + tile.column;
      const float* f = from + (o * kQuad / p.stride + i) * pitch;
      const float* mask =
          a.mask ? a.mask + (tile.sample * p.out_height + row) * p.out_width + tile.column : nullptr;
      WriteRow(f, tile.columns, p.residual ? a.x + at : nullptr, mask, a.y + at);
    }
  }
}

// The steps of a tile, and where its columns lie. A Derived tile computes hidden rows (Expand) and vectors of
// y (Filter, Project) in scratch; y_ is [output][row of the step][column].
template <class Derived, typename T, bool kMasked>
class Tile {
 public:
  void Run() {
    if (p_.side == 3 && p_.stride == 1) return RunSteps<3, 1>();
    if constexpr (!kMasked) {
      if (p_.side == 3) return RunSteps<3, 2>();
      if (p_.stride == 1) return RunSteps<5, 1>();
      RunSteps<5, 2>();
    }
  }

 protected:
  Tile(const BlockArguments<T>& a, const BlockTile& tile)
      : a_(a), p_(a.p), tile_(tile), columns_(p_, tile),
        needed_(p_, kMasked ? a.mask : nullptr, tile_, columns_), lanes_(hn::Lanes(Floats())),
        vectors_((columns_.end - columns_.begin + lanes_ - 1) / lanes_),
        pitch_(columns_.Pitch(p_, tile, lanes_)), y_pitch_(RoundUp(tile.columns + lanes_, lanes_)) {}

  // Words of scratch for y.
  int64_t OutputWords() const { return RoundUp(p_.outputs, 4) * kQuad * y_pitch_; }

  const BlockArguments<T>& a_;
  const InvertedResidual& p_;
  const BlockTile tile_;
  const TileColumns columns_;
  const NeededColumns needed_;
  const int64_t lanes_, vectors_, pitch_, y_pitch_;
  float* y_ = nullptr;

 private:
  template <int kSide, int kStride>
  void RunSteps() {
    Derived& tile = static_cast<Derived&>(*this);
    constexpr int kRows = kQuad / kStride;  // of y per step
    const int64_t steps = (tile_.rows + kRows - 1) / kRows;
    tile.Expand(0);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t rows = std::min<int64_t>(kRows, tile_.rows - step * kRows);
      if ((rows - 1) * kStride + kSide > kQuad) tile.Expand(step + 1);
      const Windows windows = needed_.OfOutput(step * kRows, rows);
      for (int64_t v = 0; v < windows.size(); ++v) {
        tile.template Filter<kSide, kStride>(step, windows[v]);
        tile.template Project<kRows>(windows[v]);
      }
      WriteRows(a_, tile_, step * kRows, rows, y_, y_pitch_);
    }
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace edgedyn
HWY_AFTER_NAMESPACE();

#endif
