// The columns that the lanes of a vector stand for. Without a mask they are one stretch. With a mask only the
// columns that an active position needs are computed, and a vector holds several stretches of them: full
// vectors of 16 lanes would hit an active position nearly everywhere.
#include <algorithm>
#include <vector>

#include "hwy/highway.h"
#include "inverted_residual/work.h"
#include "rows-inl.h"

#if defined(EDGEDYN_OPS_BLOCK_WINDOWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EDGEDYN_OPS_BLOCK_WINDOWS_INL_H_
#undef EDGEDYN_OPS_BLOCK_WINDOWS_INL_H_
#else
#define EDGEDYN_OPS_BLOCK_WINDOWS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace edgedyn {
namespace HWY_NAMESPACE {

struct Window {
  static constexpr int64_t kStretches = 5;  // at most
  static constexpr int64_t kGap = 3;        // columns that are computed rather than left out

  int64_t stretches = 0;
  int64_t column[kStretches];         // of a stretch's first lane
  int64_t lane[kStretches + 1] = {};  // first lanes, and the number of lanes behind them
};

class Windows {
 public:
  // All columns in [0, count).
  explicit Windows(int64_t count) { Cover(count); }

  // The needed columns.
  explicit Windows(const std::vector<uint8_t>& needed) {
    const int64_t count = needed.size(), lanes = hn::Lanes(Floats());
    for (int64_t j = 0; j < count; ++j) {
      if (!needed[j]) continue;
      int64_t last = j;
      for (int64_t i = j; i < count && i - last <= Window::kGap; ++i) {
        if (needed[i]) last = i;
      }
      Append(j, last + 1, lanes);
      j = last;
    }
    if (static_cast<int64_t>(list_.size()) * lanes >= count) Cover(count);
  }

  int64_t size() const { return list_.size(); }
  const Window& operator[](int64_t index) const { return list_[index]; }

 private:
  void Cover(int64_t count) {
    const int64_t lanes = hn::Lanes(Floats());
    list_.clear();
    for (int64_t j = 0; j < count; j += lanes) Append(j, j + lanes, lanes);
  }

  void Append(int64_t begin, int64_t end, int64_t lanes) {
    while (begin < end) {
      if (list_.empty() || list_.back().stretches == Window::kStretches ||
          list_.back().lane[list_.back().stretches] == lanes) {
        list_.emplace_back();
      }
      Window& w = list_.back();
      const int64_t lane = w.lane[w.stretches], taken = std::min(end - begin, lanes - lane);
      w.column[w.stretches++] = begin, w.lane[w.stretches] = lane + taken;
      begin += taken;
    }
  }

  std::vector<Window> list_;
};

// A vector of every stride-th value.
template <int kStride, class D, typename T>
HWY_INLINE hn::Vec<D> LoadStrided(D d, const T* from) {
#if HWY_TARGET == HWY_SCALAR
  return hn::LoadU(d, from);  // one lane
#else
  if constexpr (kStride == 1) return hn::LoadU(d, from);
  return hn::ConcatEven(d, hn::LoadU(d, from + hn::Lanes(d)), hn::LoadU(d, from));
#endif
}

// Reads and writes the columns of a window; it touches up to a vector behind them.
template <class D, bool kMasked, int kStride = 1>
class WindowAccess {
 public:
  explicit WindowAccess(const Window& w) : w_(w), last_(w.column[w.stretches - 1] - w.lane[w.stretches - 1]) {
    if constexpr (!kMasked) return;
    const D d;
    for (int64_t k = 0; k < w.stretches; ++k) {
      const auto behind = hn::FirstN(d, w.lane[k]);
      from_[k] = hn::Not(behind), inside_[k] = hn::And(from_[k], hn::FirstN(d, w.lane[k + 1]));
    }
  }

  // Every stride-th value, the columns counted in strides.
  template <typename T>
  HWY_INLINE hn::Vec<D> Load(const T* row) const {
    const D d;
    hn::Vec<D> v = LoadStrided<kStride>(d, row + w_.column[0] * kStride);
    if constexpr (!kMasked) return v;
    for (int64_t k = 1; k < w_.stretches; ++k) {
      v = hn::IfThenElse(from_[k], LoadStrided<kStride>(d, row + (w_.column[k] - w_.lane[k]) * kStride), v);
    }
    return v;
  }

  template <typename T>
  HWY_INLINE void Store(hn::Vec<D> v, T* row) const {
    const D d;
    if (!kMasked || w_.stretches == 1) return hn::StoreU(v, d, row + w_.column[0]);
    for (int64_t k = 0; k < w_.stretches; ++k) {
      hn::BlendedStore(v, inside_[k], d, row + w_.column[k] - w_.lane[k]);
    }
  }

  // Load where only [begin, end) may be read; other lanes are 0.
  HWY_INLINE hn::Vec<D> LoadWithin(const float* row, const float* begin, const float* end) const {
    const D d;
    if (row + w_.column[0] >= begin && row + last_ + hn::Lanes(d) <= end) return Load(row);
    HWY_ALIGN float values[HWY_MAX_BYTES / sizeof(float)] = {};
    for (int64_t k = 0; k < w_.stretches; ++k) {
      for (int64_t lane = w_.lane[k]; lane < w_.lane[k + 1]; ++lane) {
        const float* from = row + w_.column[k] + lane - w_.lane[k];
        if (from < end) values[lane] = *from;
      }
    }
    return hn::Load(d, values);
  }

 private:
  const Window& w_;
  int64_t last_;  // column at which the last stretch's vector begins; the first one's begins furthest left
  hn::Mask<D> from_[Window::kStretches], inside_[Window::kStretches];
};

}  // namespace HWY_NAMESPACE
}  // namespace edgedyn
HWY_AFTER_NAMESPACE();

#endif
