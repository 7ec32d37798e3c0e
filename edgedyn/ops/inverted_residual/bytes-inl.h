// Four bytes per 32-bit lane: their dot products, and how they are packed, for every instruction set that
// Highway compiles. In intrinsics where Highway 1.0 has nothing, or something slower.
#include "hwy/highway.h"
#include "rows-inl.h"

#if defined(EDGEDYN_OPS_BLOCK_BYTES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EDGEDYN_OPS_BLOCK_BYTES_INL_H_
#undef EDGEDYN_OPS_BLOCK_BYTES_INL_H_
#else
#define EDGEDYN_OPS_BLOCK_BYTES_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace edgedyn {
namespace HWY_NAMESPACE {

using Ints = hn::RebindToSigned<Floats>;
using IntVector = hn::Vec<Ints>;

// Dot products of four bytes per lane. x86 multiplies unsigned by signed
// bytes, NEON signed by signed: stored values are offset by kOffset.
#if HWY_TARGET == HWY_SCALAR
constexpr int32_t kOffset = 0;
constexpr int64_t kTapWords = 1;
using Quads = int32_t;
using Taps = int32_t;
HWY_INLINE Quads MakeQuads(IntVector v) { return hn::GetLane(v); }
HWY_INLINE Taps LoadTaps(const int32_t* from) { return *from; }
HWY_INLINE IntVector Dot(IntVector sum, Quads x, Taps w) {
  int32_t total = hn::GetLane(sum);
  for (int k = 0; k < 4; ++k) total += static_cast<int8_t>(x >> 8 * k) * static_cast<int8_t>(w >> 8 * k);
  return hn::Set(Ints(), total);
}
#elif HWY_TARGET == HWY_AVX3_DL
constexpr int32_t kOffset = 128;
constexpr int64_t kTapWords = 1;
using Quads = IntVector;
using Taps = IntVector;
HWY_INLINE Quads MakeQuads(IntVector v) { return v; }
HWY_INLINE Taps LoadTaps(const int32_t* from) { return hn::Set(Ints(), *from); }
HWY_INLINE IntVector Dot(IntVector sum, Quads x, Taps w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(x.raw), "v"(w.raw));
  return sum;
}
#elif HWY_ARCH_X86
// pmaddubsw would saturate: the even and the odd bytes are multiplied as 16 bits
constexpr int32_t kOffset = 128;
constexpr int64_t kTapWords = 2;
using Shorts = hn::Repartition<int16_t, Ints>;
struct Quads {
  hn::Vec<Shorts> even, odd;
};
using Taps = Quads;
HWY_INLINE Quads MakeQuads(IntVector v) {
  return {hn::BitCast(Shorts(), hn::And(v, hn::Set(Ints(), 0x00FF00FF))),
          hn::BitCast(Shorts(), hn::ShiftRight<8>(hn::BitCast(hn::RebindToUnsigned<Shorts>(), v)))};
}
HWY_INLINE Taps LoadTaps(const int32_t* from) {
  return {hn::BitCast(Shorts(), hn::Set(Ints(), from[0])), hn::BitCast(Shorts(), hn::Set(Ints(), from[1]))};
}
HWY_INLINE IntVector Dot(IntVector sum, Quads x, Taps w) {
  IntVector unused = hn::Zero(Ints());
  sum = hn::ReorderWidenMulAccumulate(Ints(), x.even, w.even, sum, unused);
  return hn::ReorderWidenMulAccumulate(Ints(), x.odd, w.odd, sum, unused);
}
#else
constexpr int32_t kOffset = 0;
constexpr int64_t kTapWords = 1;
using Quads = IntVector;
using Taps = IntVector;
HWY_INLINE Quads MakeQuads(IntVector v) { return v; }
HWY_INLINE Taps LoadTaps(const int32_t* from) { return hn::Set(Ints(), *from); }
HWY_INLINE IntVector Dot(IntVector sum, Quads x, Taps w) {
#if defined(__ARM_FEATURE_DOTPROD)
  return IntVector(vdotq_s32(sum.raw, vreinterpretq_s8_s32(x.raw), vreinterpretq_s8_s32(w.raw)));
#else
  // two products of a value by a weight of at least -127 fit 16 bits
  const int8x16_t a = vreinterpretq_s8_s32(x.raw), b = vreinterpretq_s8_s32(w.raw);
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return IntVector(vpadalq_s16(sum.raw, vpaddq_s16(low, high)));
#endif
}
#endif

// Rounds values within int32 to the nearest integer, ties to even. hn::NearestInt also saturates, which takes
// four more instructions on x86: half of the work behind a dot product.
HWY_INLINE IntVector RoundedInts(Vector v) {
#if !HWY_ARCH_X86 || HWY_TARGET == HWY_SCALAR
  return hn::NearestInt(v);
#elif HWY_TARGET <= HWY_AVX3
  return IntVector{_mm512_cvtps_epi32(v.raw)};
#elif HWY_TARGET == HWY_AVX2
  return IntVector{_mm256_cvtps_epi32(v.raw)};
#else
  return IntVector{_mm_cvtps_epi32(v.raw)};
#endif
}

// The two upper bytes of each lane of `first`, and above them the two lower ones of `second`.
HWY_INLINE IntVector Funnel(IntVector first, IntVector second) {
#if HWY_TARGET == HWY_AVX3_DL
  return IntVector{_mm512_shrdi_epi32(first.raw, second.raw, 16)};
#else
  const hn::RebindToUnsigned<Ints> d;
  return hn::BitCast(
      Ints(), hn::Or(hn::ShiftRight<16>(hn::BitCast(d, first)), hn::ShiftLeft<16>(hn::BitCast(d, second))));
#endif
}

// A zero point, for Pack.
#if HWY_TARGET == HWY_SCALAR
using ZeroPoint = int32_t;
HWY_INLINE ZeroPoint MakeZeroPoint(const Quantization& q) { return q.zero_point; }
#else
using ZeroPoint = hn::Vec<hn::Repartition<int16_t, Ints> >;
HWY_INLINE ZeroPoint MakeZeroPoint(const Quantization& q) {
  return hn::Set(hn::Repartition<int16_t, Ints>(), static_cast<int16_t>(q.zero_point + kOffset));
}
#endif

// The bytes of four vectors of rounded steps, a's in the lowest byte of each lane; saturates.
HWY_INLINE IntVector Pack(IntVector a, IntVector b, IntVector c, IntVector d, ZeroPoint zero_point) {
#if HWY_TARGET == HWY_SCALAR
  uint32_t word = 0;
  for (const IntVector v : {d, c, b, a}) {
    const int64_t stored = static_cast<int64_t>(hn::GetLane(v)) + zero_point;
    word = word << 8 | static_cast<uint8_t>(std::clamp<int64_t>(stored, -128, 127));
  }
  return hn::Set(Ints(), static_cast<int32_t>(word));
#else
  const hn::Repartition<int16_t, Ints> d16;
  const hn::Repartition<uint8_t, Ints> d8;
  const auto ab = hn::SaturatedAdd(hn::ReorderDemote2To(d16, a, b), zero_point);
  const auto cd = hn::SaturatedAdd(hn::ReorderDemote2To(d16, c, d), zero_point);
#if !HWY_ARCH_X86
  const hn::Vec<decltype(d8)> bytes(vreinterpretq_u8_s8(vqmovn_high_s16(vqmovn_s16(ab.raw), cd.raw)));
#elif HWY_TARGET <= HWY_AVX3
  const hn::Vec<decltype(d8)> bytes{_mm512_packus_epi16(ab.raw, cd.raw)};
#elif HWY_TARGET == HWY_AVX2
  const hn::Vec<decltype(d8)> bytes{_mm256_packus_epi16(ab.raw, cd.raw)};
#else
  const hn::Vec<decltype(d8)> bytes{_mm_packus_epi16(ab.raw, cd.raw)};
#endif
  alignas(16) static constexpr uint8_t kTranspose[16] = {0, 4, 8,  12, 1, 5, 9,  13,
                                                         2, 6, 10, 14, 3, 7, 11, 15};
  return hn::BitCast(Ints(), hn::TableLookupBytes(bytes, hn::LoadDup128(d8, kTranspose)));
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace edgedyn
HWY_AFTER_NAMESPACE();

#endif
