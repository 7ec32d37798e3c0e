// atom_depthwise2d for ExecuTorch: a strip of one output row at a time, all channels.
//
// The taps of a strip's kernels are mixed once into a table of float scratch, which all channels then read.
// Four channels at a time are read into a padded tile, so that no tap asks where the border is; in registers,
// four channels and three kernels share each load of a tap and of a pixel: 7 loads for 12 multiply-adds.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "atom_depthwise2d/kernel_executorch.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// after foreach_target.h
#include "atom_depthwise2d/formula.h"
#include "executorch.h"
#include "hwy/highway.h"
#include "rows-inl.h"

#ifndef EDGEDYN_ATOM_DEPTHWISE2D_ARGUMENTS
#define EDGEDYN_ATOM_DEPTHWISE2D_ARGUMENTS
namespace edgedyn {

template <typename T>
struct AtomArguments {
  AtomDepthwise2d p;
  const T* x;
  const float* alpha;
  const float* bases;
  T* y;
  Quantization of_x, of_y;
};

// The scratch of one strip: how many kernels and columns it may have to fit.
//
// A row of the tile holds its columns by their remainder modulo the stride (a phase): the pixels that a tap
// reads for neighbouring outputs then lie side by side, from offsets[t] on.
struct AtomStrip {
  static constexpr int64_t kFloats = 16384;  // 64 KiB per thread
  static constexpr int64_t kChannels = 4;    // of a tile
  static constexpr int64_t kKernels = 6;     // of a table
  static constexpr int64_t kColumns = 128;   // more only moves the table out of the first-level cache
  static constexpr int64_t kLanes = 16;      // of the widest instruction set

  explicit AtomStrip(const AtomDepthwise2d& p)
      : taps(p.side * p.side), phases(std::min(p.side, p.stride)), overhang((p.side - 1) / p.stride) {
    const int64_t rows = kChannels * p.side * phases;
    const int64_t room = kFloats - rows * overhang;
    const int64_t most = std::min({p.kernels, kKernels, (room / kLanes - rows - p.bases) / taps});
    if (most <= 0) return;
    blocks = (p.kernels + most - 1) / most;
    kernels = (p.kernels + blocks - 1) / blocks;
    const int64_t widest = std::min(kColumns, room / (kernels * taps + rows + p.bases) / kLanes * kLanes);
    strips = (p.out_width() + widest - 1) / widest;
    columns = ((p.out_width() + strips - 1) / strips + kLanes - 1) / kLanes * kLanes;
    phase_width = columns + overhang;
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t dy = t / p.side, dx = t % p.side;
      offsets[t] = (dy * phases + dx % p.stride) * phase_width + dx / p.stride;
    }
  }

  int64_t taps, phases, overhang;  // overhang: of a phase over the strip's columns
  int64_t blocks = 0, kernels = 0, strips = 0;
  int64_t columns = 0;  // 0: does not fit
  int64_t phase_width = 0;
  int64_t offsets[kFloats / kLanes];  // as many taps as can fit
};

using AtomPlace = int64_t[4];  // sample, output row, strip, block of kernels

}  // namespace edgedyn
#endif

HWY_BEFORE_NAMESPACE();
namespace edgedyn {
namespace HWY_NAMESPACE {

inline float ToFloat(float stored, const Quantization&) { return stored; }
inline float ToFloat(int8_t stored, const Quantization& q) {
  return static_cast<float>(stored - q.zero_point) * q.scale;
}

// As ReadPadded, every stride-th column from `left` on. kStride is the stride, or 0 where only the argument
// knows it.
template <int kStride, typename T>
void ReadStrided(const T* from, int64_t width, int64_t left, int64_t count, int64_t stride,
                 const Quantization& q, float* HWY_RESTRICT to) {
  if (kStride > 0) stride = kStride;
  const int64_t begin = from && left < 0 ? std::min((stride - 1 - left) / stride, count) : 0;
  const int64_t end =
      from && left < width ? std::clamp((width - left + stride - 1) / stride, begin, count) : begin;
  std::fill(to, to + begin, 0.0f);
  for (int64_t j = begin; j < end; ++j) to[j] = ToFloat(from[left + j * stride], q);
  std::fill(to + end, to + count, 0.0f);
}

// One strip of one row, one block of kernels.
template <typename T>
class AtomFilter {
 public:
  AtomFilter(const AtomArguments<T>& a, const AtomStrip& strip, const AtomPlace& at, float* scratch)
      : a_(a), p_(a.p), strip_(strip), b_(at[0]), h_(at[1]), left_(at[2] * strip.columns),
        first_(at[3] * strip.kernels), kernels_(std::min(strip.kernels, a.p.kernels - first_)),
        count_(std::min(strip.columns, a.p.out_width() - left_)),
        plane_size_(a.p.side * strip.phases * strip.phase_width) {
    table_ = scratch;
    alpha_ = table_ + strip.kernels * strip.taps * strip.columns;
    tile_ = alpha_ + a.p.bases * strip.columns;
  }

  void Filter() const {
    for (int64_t m = 0; m < kernels_; ++m) MixKernel(m);
    int64_t c = 0;
    for (; c + AtomStrip::kChannels <= p_.channels; c += AtomStrip::kChannels)
      FilterChannels<AtomStrip::kChannels>(c);
    for (; c < p_.channels; ++c) FilterChannels<1>(c);
  }

 private:
  void MixKernel(int64_t m) const {
    const int64_t width = p_.out_width(), pixels = p_.out_height() * width;
    const float* from = a_.alpha + (b_ * p_.kernels + first_ + m) * p_.bases * pixels + h_ * width;
    for (int64_t k = 0; k < p_.bases; ++k) {
      ReadPadded(from + k * pixels, width, left_, strip_.columns, {}, alpha_ + k * strip_.columns);
    }
    int64_t t = 0;
    for (; t + 4 <= strip_.taps; t += 4) MixTaps<4>(m, t);
    for (; t < strip_.taps; ++t) MixTaps<1>(m, t);
  }

  template <int kTaps>
  void MixTaps(int64_t m, int64_t t) const {
    const Floats d;
    float* HWY_RESTRICT to = table_ + (m * strip_.taps + t) * strip_.columns;
    for (int64_t j = 0; j < count_; j += hn::Lanes(d)) {
      Vector taps[kTaps];
      for (int i = 0; i < kTaps; ++i) taps[i] = hn::Zero(d);
      const float* bases = a_.bases + t;
      for (int64_t k = 0; k < p_.bases; ++k, bases += strip_.taps) {
        const Vector alpha = hn::LoadU(d, alpha_ + k * strip_.columns + j);
        for (int i = 0; i < kTaps; ++i) taps[i] = hn::MulAdd(alpha, hn::Set(d, bases[i]), taps[i]);
      }
      for (int i = 0; i < kTaps; ++i) hn::StoreU(taps[i], d, to + i * strip_.columns + j);
    }
  }

  template <int kChannels>
  void FilterChannels(int64_t c) const {
    for (int i = 0; i < kChannels; ++i) ReadPlane(c + i, tile_ + i * plane_size_);
    for (int64_t m = 0; m < kernels_;) {
      const int64_t rest = kernels_ - m;
      if (rest == 3 || rest > 4) {
        FilterBlock<kChannels, 3>(c, m), m += 3;
      } else if (rest > 1) {
        FilterBlock<kChannels, 2>(c, m), m += 2;
      } else {
        FilterBlock<kChannels, 1>(c, m), m += 1;
      }
    }
  }

  void ReadPlane(int64_t c, float* to) const {
    const T* plane = a_.x + (b_ * p_.channels + c) * p_.height * p_.width;
    for (int64_t dy = 0; dy < p_.side; ++dy) {
      const int64_t row = h_ * p_.stride + dy - p_.side / 2;
      const T* from = row >= 0 && row < p_.height ? plane + row * p_.width : nullptr;
      for (int64_t phase = 0; phase < strip_.phases; ++phase, to += strip_.phase_width) {
        const int64_t left = left_ * p_.stride + phase - p_.side / 2;
        if (p_.stride == 1) {
          ReadPadded(from, p_.width, left, strip_.phase_width, a_.of_x, to);
        } else if (p_.stride == 2) {
          ReadStrided<2>(from, p_.width, left, strip_.phase_width, 2, a_.of_x, to);
        } else {
          ReadStrided<0>(from, p_.width, left, strip_.phase_width, p_.stride, a_.of_x, to);
        }
      }
    }
  }

  template <int kChannels, int kKernels>
  void FilterBlock(int64_t c, int64_t m) const {
    const Floats d;
    // locals: a store of INT8 could change any member
    const int64_t taps = strip_.taps, columns = strip_.columns, count = count_, plane_size = plane_size_;
    const int64_t pixels = p_.out_height() * p_.out_width(), map_size = p_.channels * pixels;
    const Quantization of_y = a_.of_y;
    T* to = a_.y + ((b_ * p_.kernels + first_ + m) * p_.channels + c) * pixels + h_ * p_.out_width() + left_;
    for (int64_t j = 0; j < count; j += hn::Lanes(d)) {
      Vector y[kKernels][kChannels];
      for (auto& of_kernel : y) std::fill(of_kernel, of_kernel + kChannels, hn::Zero(d));
      const float* tap = table_ + m * taps * columns + j;
      for (int64_t t = 0; t < taps; ++t, tap += columns) {
        const float* x = tile_ + strip_.offsets[t] + j;
        Vector kernel[kKernels];
        for (int i = 0; i < kKernels; ++i) kernel[i] = hn::LoadU(d, tap + i * taps * columns);
        for (int n = 0; n < kChannels; ++n) {
          const Vector pixel = hn::LoadU(d, x + n * plane_size);
          for (int i = 0; i < kKernels; ++i) y[i][n] = hn::MulAdd(kernel[i], pixel, y[i][n]);
        }
      }
      for (int i = 0; i < kKernels; ++i) {
        for (int n = 0; n < kChannels; ++n)
          WriteLanes(y[i][n], count - j, of_y, to + i * map_size + n * pixels + j);
      }
    }
  }

  const AtomArguments<T>& a_;
  const AtomDepthwise2d& p_;
  const AtomStrip& strip_;
  const int64_t b_, h_, left_, first_, kernels_, count_, plane_size_;
  float *table_, *alpha_, *tile_;
};

template <typename T>
void FilterAtoms(const AtomArguments<T>& a, const AtomStrip& strip, const AtomPlace& at) {
  alignas(64) float scratch[AtomStrip::kFloats];
  AtomFilter<T>(a, strip, at, scratch).Filter();
}
EDGEDYN_PER_TYPE(FilterAtoms, AtomArguments, AtomStrip, AtomPlace)

}  // namespace HWY_NAMESPACE
}  // namespace edgedyn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace edgedyn {
namespace {

EDGEDYN_DISPATCH(FilterAtoms, AtomArguments, AtomStrip, AtomPlace)

template <typename T>
void Filter(const AtomArguments<T>& a, const AtomStrip& strip) {
  const int64_t rows = a.p.out_height();
  parallel_for(0, a.p.batch * rows * strip.strips * strip.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % strip.blocks, left = item / strip.blocks % strip.strips;
      const int64_t row = item / strip.blocks / strip.strips;
      FilterAtoms(a, strip, {row / rows, row % rows, left, block});
    }
  });
}

// Returns the error in the arguments, or null.
const char* Check(const Tensor& x, ScalarType type, const Tensor& alpha, const Tensor& bases,
                  int64_t kernel_size, int64_t stride) {
  if (!IsDense(x, 4, type)) return "expected x as a contiguous (B, C, H, W) of the op's type";
  if (!IsDense(alpha, 4, ScalarType::Float))
    return "expected alpha as a contiguous (B, M * K, h, w) of float";
  if (kernel_size < 1 || kernel_size % 2 == 0 || stride < 1)
    return "expected an odd kernel_size and stride >= 1";
  if (!IsDense(bases, 2, ScalarType::Float) || bases.size(0) < 1 || bases.size(1) % kernel_size ||
      bases.size(1) / kernel_size != kernel_size)
    return "expected bases as a contiguous (K, kernel_size ** 2) of float, K >= 1";
  if (alpha.size(0) != x.size(0) || alpha.size(1) < 1 || alpha.size(1) % bases.size(0))
    return "expected an alpha of M * K channels, and the batch of x";
  return nullptr;
}

template <typename T>
Tensor& Run(KernelRuntimeContext& context, const Tensor& x, const Tensor& alpha, const Tensor& bases,
            int64_t kernel_size, int64_t stride, Quantization of_x, Quantization of_y, Tensor& out) {
  const char* wrong = Check(x, kScalarType<T>, alpha, bases, kernel_size, stride);
  EDGEDYN_CHECK(context, !wrong, out, "atom_depthwise2d: %s", wrong);
  EDGEDYN_CHECK(context, IsInt8(of_x) && IsInt8(of_y), out,
                "atom_depthwise2d: expected scales > 0 and zero points in [-128, 127]");
  const AtomDepthwise2d p{x.size(0),     x.size(1),   x.size(2), x.size(3), alpha.size(1) / bases.size(0),
                          bases.size(0), kernel_size, stride};
  EDGEDYN_CHECK(
      context, alpha.size(2) == p.out_height() && alpha.size(3) == p.out_width(), out,
      "atom_depthwise2d: alpha has %ld x %ld pixels; expected one kernel per output pixel, %ld x %ld",
      static_cast<long>(alpha.size(2)), static_cast<long>(alpha.size(3)), static_cast<long>(p.out_height()),
      static_cast<long>(p.out_width()));
  EDGEDYN_CHECK(
      context,
      ResizeTo(out, kScalarType<T>, {p.batch, p.kernels * p.channels, p.out_height(), p.out_width()}), out,
      "atom_depthwise2d: out cannot hold y, expected (B, M * C, h, w) of the type of x");
  if (out.numel() == 0) return out;
  const AtomStrip strip(p);
  EDGEDYN_CHECK(
      context, strip.columns > 0, out,
      "atom_depthwise2d: %ld bases of kernel_size %ld at stride %ld need more than 64 KiB of scratch",
      static_cast<long>(p.bases), static_cast<long>(kernel_size), static_cast<long>(stride));
  Filter(AtomArguments<T>{p, x.const_data_ptr<T>(), alpha.const_data_ptr<float>(),
                          bases.const_data_ptr<float>(), out.mutable_data_ptr<T>(), of_x, of_y},
         strip);
  return out;
}

Tensor& atom_depthwise2d_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& alpha,
                             const Tensor& bases, int64_t kernel_size, int64_t stride, Tensor& out) {
  return Run<float>(context, x, alpha, bases, kernel_size, stride, {}, {}, out);
}

Tensor& atom_depthwise2d_int8_out(KernelRuntimeContext& context, const Tensor& x, double x_scale,
                                  int64_t x_zero_point, const Tensor& alpha, const Tensor& bases,
                                  int64_t kernel_size, int64_t stride, double y_scale, int64_t y_zero_point,
                                  Tensor& out) {
  return Run<int8_t>(context, x, alpha, bases, kernel_size, stride, Affine(x_scale, x_zero_point),
                     Affine(y_scale, y_zero_point), out);
}

EXECUTORCH_LIBRARY(edgedyn, "atom_depthwise2d.out", atom_depthwise2d_out);
EXECUTORCH_LIBRARY(edgedyn, "atom_depthwise2d_int8.out", atom_depthwise2d_int8_out);

}  // namespace
}  // namespace edgedyn
#endif
