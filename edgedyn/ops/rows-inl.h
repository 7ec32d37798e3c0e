// Rows of pixels between memory (float or INT8) and float scratch, for every instruction set that Highway
// compiles.
//
// The include guard is unusual because foreach_target.h includes a kernel once per instruction set.
#include "hwy/highway.h"
#include "shared.h"

#if defined(EDGEDYN_OPS_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EDGEDYN_OPS_ROWS_INL_H_
#undef EDGEDYN_OPS_ROWS_INL_H_
#else
#define EDGEDYN_OPS_ROWS_INL_H_
#endif

#include <algorithm>
#include <cstring>

HWY_BEFORE_NAMESPACE();
namespace edgedyn {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using Vector = hn::Vec<Floats>;

inline void ReadRow(const float* HWY_RESTRICT from, int64_t count, const Quantization&,
                    float* HWY_RESTRICT to) {
  std::memcpy(to, from, count * sizeof(float));
}

inline void ReadRow(const int8_t* HWY_RESTRICT from, int64_t count, const Quantization& q,
                    float* HWY_RESTRICT to) {
  const Floats d;
  const hn::RebindToSigned<Floats> d32;
  const hn::Rebind<int8_t, Floats> d8;
  const int64_t lanes = hn::Lanes(d);
  const auto zero_point = hn::Set(d32, q.zero_point);
  const auto scale = hn::Set(d, q.scale);
  int64_t j = 0;
  for (; j + lanes <= count; j += lanes) {
    const auto stored = hn::PromoteTo(d32, hn::LoadU(d8, from + j));
    hn::StoreU(hn::Mul(hn::ConvertTo(d, hn::Sub(stored, zero_point)), scale), d, to + j);
  }
  for (; j < count; ++j) to[j] = static_cast<float>(from[j] - q.zero_point) * q.scale;
}

// Stores lanes of which only the first `count` exist.
inline void WriteLanes(Vector v, int64_t count, const Quantization&, float* to) {
  const Floats d;
  if (count >= static_cast<int64_t>(hn::Lanes(d))) {
    hn::StoreU(v, d, to);
    return;
  }
  HWY_ALIGN float lanes[HWY_MAX_BYTES / sizeof(float)];
  hn::Store(v, d, lanes);
  std::memcpy(to, lanes, count * sizeof(float));
}

// Rounds ties to even and saturates, as torch's quantize_per_tensor does.
inline void WriteLanes(Vector v, int64_t count, const Quantization& q, int8_t* to) {
  const Floats d;
  const hn::RebindToSigned<Floats> d32;
  const hn::Rebind<int8_t, Floats> d8;
  // clamp first, to integers: far outside of int32 the conversion is undefined
  const auto lowest = hn::Set(d, static_cast<float>(-128 - q.zero_point));
  const auto highest = hn::Set(d, static_cast<float>(127 - q.zero_point));
  const auto bounded = hn::Min(hn::Max(hn::Mul(v, hn::Set(d, q.inverse)), lowest), highest);
  const auto stored = hn::DemoteTo(d8, hn::Add(hn::NearestInt(bounded), hn::Set(d32, q.zero_point)));
  if (count >= static_cast<int64_t>(hn::Lanes(d))) {
    hn::StoreU(stored, d8, to);
    return;
  }
  HWY_ALIGN int8_t lanes[HWY_MAX_BYTES];
  hn::StoreU(stored, d8, lanes);
  std::memcpy(to, lanes, count);
}

// Copies the columns [left, left + count) of a row of `width` pixels; 0 outside, and everywhere where from is
// null.
template <typename T>
inline void ReadPadded(const T* from, int64_t width, int64_t left, int64_t count, const Quantization& q,
                       float* to) {
  const int64_t begin = from ? std::clamp<int64_t>(-left, 0, count) : count;
  const int64_t end = from ? std::clamp<int64_t>(width - left, begin, count) : count;
  std::fill(to, to + begin, 0.0f);
  if (begin < end) ReadRow(from + left + begin, end - begin, q, to + begin);
  std::fill(to + end, to + count, 0.0f);
}

}  // namespace HWY_NAMESPACE
}  // namespace edgedyn
HWY_AFTER_NAMESPACE();

#endif
