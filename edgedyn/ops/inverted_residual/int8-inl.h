// A tile of an INT8 block. Four bytes share a 32-bit lane: four channels of x, four rows of a hidden column,
// four channels of a filtered pixel. So each of the three convolutions is a dot product of four bytes per
// lane, lanes are columns, and every constant of a channel is a broadcast.
//
//   hidden word (e, j)     rows 4q .. 4q + 3 of hidden channel e at column j
//   output row i           uses rows s i .. s i + R - 1 of the quads q and q + 1: at most two words per
//   column
#include <cstdlib>
#include <vector>

#include "hwy/highway.h"
#include "inverted_residual/bytes-inl.h"
#include "inverted_residual/tile-inl.h"

#if defined(EDGEDYN_OPS_BLOCK_INT8_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EDGEDYN_OPS_BLOCK_INT8_INL_H_
#undef EDGEDYN_OPS_BLOCK_INT8_INL_H_
#else
#define EDGEDYN_OPS_BLOCK_INT8_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace edgedyn {
namespace HWY_NAMESPACE {

// A layer's constants: weights as words of four bytes; per output channel the sum that cancels the zero point
// of the input, and factor and offset from a sum to its output's unit.
struct Int8Layer {
  std::vector<int32_t> weight, start;
  std::vector<float> factor, offset, slopes;
  Finish finish;
};

class Int8Weights {
 public:
  explicit Int8Weights(const BlockArguments<int8_t>& a) : a_(a), p_(a.p) {
    hidden_ = RoundUp(p_.hidden, 4), outputs_ = RoundUp(p_.outputs, 4), depth_ = RoundUp(p_.channels, 4) / 4;
    expand.weight.resize(hidden_ * depth_ * kTapWords);
    PackPoints(a.expand.weight, p_.hidden, p_.channels, expand.weight);
    PackFilters();
    project.weight.resize(outputs_ * hidden_ / 4 * kTapWords);
    PackPoints(a.project.weight, p_.outputs, p_.hidden, project.weight);
    Scale(a.expand, p_.expand, p_.hidden, p_.channels, a.of_x, a.of_hidden.scale, expand);
    Scale(a.depthwise, p_.depthwise, p_.hidden, p_.side * p_.side, a.of_hidden, a.of_filtered.scale,
          depthwise);
    Scale(a.project, p_.project, p_.outputs, p_.hidden, a.of_filtered, 1, project);
  }

  Int8Layer expand, depthwise, project;

 private:
  static void PutTaps(const int8_t (&taps)[4], int32_t* to) {
    if constexpr (kTapWords == 1) {
      std::memcpy(to, taps, 4);
    } else {
      const int16_t split[4] = {taps[0], taps[2], taps[1], taps[3]};
      std::memcpy(to, split, 8);
    }
  }

  // [block of 4 outputs][word of 4 inputs][output], as the register tile reads them
  static void PackPoints(const int8_t* from, int64_t outputs, int64_t inputs, std::vector<int32_t>& to) {
    const int64_t words = RoundUp(inputs, 4) / 4;
    for (int64_t o = 0; o < RoundUp(outputs, 4); ++o) {
      for (int64_t k = 0; k < words; ++k) {
        int8_t taps[4] = {};
        for (int64_t i = 4 * k; i < std::min(inputs, 4 * k + 4) && o < outputs; ++i)
          taps[i % 4] = from[o * inputs + i];
        PutTaps(taps, &to[((o / 4 * words + k) * 4 + o % 4) * kTapWords]);
      }
    }
  }

  // [channel][output row][column][quad]; R = 3 needs the first half of a step's rows and the first quad only
  void PackFilters() {
    const int64_t side = p_.side, quads = side > 3 ? 2 : 1, rows = kQuad / p_.stride * quads / 2;
    depthwise.weight.resize(hidden_ * rows * side * quads * kTapWords);
    int32_t* to = depthwise.weight.data();
    for (int64_t e = 0; e < hidden_; ++e) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t column = 0; column < side; ++column) {
          int8_t taps[2][4] = {};
          for (int64_t row = 0; row < side && e < p_.hidden; ++row) {
            const int64_t at = i * p_.stride + row;
            taps[at / 4][at % 4] = a_.depthwise.weight[(e * side + row) * side + column];
          }
          for (int64_t quad = 0; quad < quads; ++quad, to += kTapWords) PutTaps(taps[quad], to);
        }
      }
    }
  }

  // real = scale of input * scale of weight * sum + bias, divided by the unit of the output
  void Scale(const LayerTensors<int8_t>& from, BlockActivation activation, int64_t outputs, int64_t inputs,
             const Quantization& of_input, float unit, Int8Layer& to) {
    const int64_t rounded = RoundUp(outputs, 4);
    to.start.resize(rounded), to.factor.resize(rounded), to.offset.resize(rounded), to.slopes.resize(rounded);
    bool bounds = false;
    for (int64_t o = 0; o < outputs; ++o) {
      int64_t sum = 0, most = 0;
      for (int64_t i = 0; i < inputs; ++i) {
        sum += from.weight[o * inputs + i], most += std::abs(from.weight[o * inputs + i]);
      }
      to.start[o] = static_cast<int32_t>(-(of_input.zero_point + kOffset) * sum);
      to.factor[o] = of_input.scale * from.scales[o] / unit;
      to.offset[o] = from.bias[o] / unit;
      if (from.slopes) to.slopes[o] = from.slopes[o];
      const float slope = from.slopes ? std::max(1.0f, std::abs(from.slopes[o])) : 1;
      bounds |= !((255.0f * most * to.factor[o] + std::abs(to.offset[o])) * slope < 1e9f);
    }
    to.finish = {activation, to.slopes.data(), unit, bounds};
  }

  const BlockArguments<int8_t>& a_;
  const InvertedResidual& p_;
  int64_t hidden_, outputs_, depth_;
};

template <bool kMasked>
class Int8Tile : public Tile<Int8Tile<kMasked>, int8_t, kMasked> {
  using Base = Tile<Int8Tile<kMasked>, int8_t, kMasked>;
  friend Base;

 public:
  static int64_t Words(const InvertedResidual& p) { return RoundUp(p.hidden, 4) * 2; }

  Int8Tile(const BlockArguments<int8_t>& a, const Int8Weights& weights, const BlockTile& tile,
           std::vector<int32_t>& scratch)
      : Base(a, tile), w_(weights), hidden_(RoundUp(p_.hidden, 4)), depth_(RoundUp(p_.channels, 4) / 4) {
    const int64_t in = vectors_ * depth_ * kQuad * lanes_, maps = hidden_ * 2 * pitch_,
                  out = hidden_ * lanes_;
    x_ = Carve(scratch, in + maps + out + this->OutputWords());
    maps_ = x_ + in, filtered_ = maps_ + maps, y_ = reinterpret_cast<float*>(filtered_ + out);
  }

 private:
  using Base::a_, Base::p_, Base::tile_, Base::columns_, Base::needed_;
  using Base::lanes_, Base::vectors_, Base::pitch_, Base::y_pitch_, Base::y_;

  // x of a quad of rows, quantized: [vector][word of channels][row][lane]
  void PackInput(int64_t top, const Windows& windows) {
    const Floats d;
    const float* begin = a_.x + tile_.sample * p_.channels * p_.height * p_.width;
    const float* end = begin + p_.channels * p_.height * p_.width;
    const auto zero_point = MakeZeroPoint(a_.of_x);
    const Vector inverse = hn::Set(d, a_.of_x.inverse);
    const Vector most = hn::Set(d, 1e9f), least = hn::Set(d, -1e9f);
    for (int64_t k = 0; k < depth_; ++k) {
      for (int64_t r = 0; r < kQuad; ++r) {
        const int64_t row = std::clamp<int64_t>(top + r, 0, p_.height - 1);
        const float* from[4];
        for (int64_t c = 0; c < 4; ++c) {
          from[c] = begin + (std::min(4 * k + c, p_.channels - 1) * p_.height + row) * p_.width +
                    columns_.left + columns_.begin;
        }
        for (int64_t v = 0; v < windows.size(); ++v) {
          const WindowAccess<Floats, kMasked> columns(windows[v]);
          IntVector steps[4];
          EDGEDYN_UNROLL
          for (int c = 0; c < 4; ++c) {
            const Vector value = columns.LoadWithin(from[c], begin, end);
            steps[c] = RoundedInts(hn::Min(most, hn::Max(least, hn::Mul(value, inverse))));
          }
          hn::Store(Pack(steps[0], steps[1], steps[2], steps[3], zero_point), Ints(),
                    x_ + ((v * depth_ + k) * kQuad + r) * lanes_);
        }
      }
    }
  }

  int32_t* Map(int64_t e, int64_t quad) const { return maps_ + (e * 2 + quad % 2) * pitch_; }

  // The hidden rows of a quad.
  void Expand(int64_t quad) {
    const int64_t top = tile_.row * p_.stride - p_.side / 2 + quad * kQuad;
    const Windows windows = needed_.OfHidden(quad);
    PackInput(top, windows);
    const uint32_t stored = (a_.of_hidden.zero_point + kOffset) & 0xFF;
    const auto fill = static_cast<int32_t>(stored * 0x01010101u);
    uint32_t outside = 0;  // bytes of rows outside of the image
    for (int64_t r = 0; r < kQuad; ++r) {
      if (top + r < 0 || top + r >= p_.height) outside |= 0xFFu << (8 * r);
    }
    for (int64_t v = 0; v < windows.size(); ++v) ExpandWindow(quad, v, windows[v], outside, fill);
    for (int64_t e = 0; e < hidden_; ++e) {
      std::fill(Map(e, quad), Map(e, quad) + columns_.begin, fill);
      std::fill(Map(e, quad) + columns_.end, Map(e, quad) + columns_.width, fill);
    }
  }

  void ExpandWindow(int64_t quad, int64_t v, const Window& window, uint32_t outside, int32_t fill) {
    const WindowAccess<Ints, kMasked> access(window);
    const Ints d;
    const auto zero_point = MakeZeroPoint(a_.of_hidden);
    const IntVector keep = hn::Set(d, static_cast<int32_t>(~outside));
    const IntVector padding = hn::Set(d, fill & static_cast<int32_t>(outside));
    for (int64_t e = 0; e < hidden_; e += 4) {
      IntVector sum[4][kQuad];
      Multiply(w_.expand, e, depth_, x_ + v * depth_ * kQuad * lanes_, sum);
      EDGEDYN_UNROLL
      for (int c = 0; c < 4; ++c) {
        ToSteps(w_.expand, e + c, sum[c]);
        IntVector word = Pack(sum[c][0], sum[c][1], sum[c][2], sum[c][3], zero_point);
        if (outside) word = hn::Or(hn::And(word, keep), padding);
        access.Store(word, Map(e + c, quad) + columns_.begin);
      }
    }
  }

  // A 1 x 1 convolution to the four channels from o on: from [word of inputs][row][lane].
  template <int kCount>
  HWY_INLINE void Multiply(const Int8Layer& layer, int64_t o, int64_t words, const int32_t* from,
                           IntVector (&sum)[4][kCount]) const {
    const Ints d;
    const int32_t* weight = layer.weight.data() + o * words * kTapWords;
    EDGEDYN_UNROLL
    for (int c = 0; c < 4; ++c) {
      EDGEDYN_UNROLL
      for (auto& value : sum[c]) value = hn::Set(d, layer.start[o + c]);
    }
    for (int64_t k = 0; k < words; ++k, from += kCount * lanes_, weight += 4 * kTapWords) {
      Quads values[kCount];
      EDGEDYN_UNROLL
      for (int r = 0; r < kCount; ++r) values[r] = MakeQuads(hn::Load(d, from + r * lanes_));
      EDGEDYN_UNROLL
      for (int c = 0; c < 4; ++c) {
        const Taps taps = LoadTaps(weight + c * kTapWords);
        EDGEDYN_UNROLL
        for (int r = 0; r < kCount; ++r) sum[c][r] = Dot(sum[c][r], values[r], taps);
      }
    }
  }

  template <int kCount>
  static HWY_INLINE void ToSteps(const Int8Layer& layer, int64_t channel, IntVector (&sum)[kCount]) {
    const Floats d;
    const Vector factor = hn::Set(d, layer.factor[channel]), offset = hn::Set(d, layer.offset[channel]);
    Vector v[kCount];
    EDGEDYN_UNROLL
    for (int r = 0; r < kCount; ++r) v[r] = hn::MulAdd(hn::ConvertTo(d, sum[r]), factor, offset);
    Activate(layer.finish, channel, v);
    EDGEDYN_UNROLL
    for (int r = 0; r < kCount; ++r) sum[r] = RoundedInts(v[r]);
  }

  // One vector of all channels and rows of a step: [row][word of channels][lane]
  template <int kSide, int kStride>
  void Filter(int64_t step, const Window& window) {
    constexpr int kRows = kQuad / kStride;
    const WindowAccess<Ints, kMasked, kStride> access(window);
    constexpr int64_t kWords = kSide * kRows * (kSide > 3 ? 2 : 1) * kTapWords / (kSide > 3 ? 1 : 2);
    const Ints d;
    const auto zero_point = MakeZeroPoint(a_.of_filtered);
    const int32_t* weight = w_.depthwise.weight.data();
    for (int64_t e = 0; e < hidden_; e += 4) {
      IntVector sum[4][kRows];
      EDGEDYN_UNROLL
      for (int c = 0; c < 4; ++c, weight += kWords) {
        FilterChannel<kSide, kStride>(step, e + c, access, weight, sum[c]);
        ToSteps(w_.depthwise, e + c, sum[c]);
      }
      EDGEDYN_UNROLL
      for (int i = 0; i < kRows; ++i) {
        hn::Store(Pack(sum[0][i], sum[1][i], sum[2][i], sum[3][i], zero_point), d,
                  filtered_ + (e / 4 * kRows + i) * lanes_);
      }
    }
  }

  template <int kSide, int kStride, int kRows = kQuad / kStride>
  HWY_INLINE void FilterChannel(int64_t step, int64_t e, const WindowAccess<Ints, kMasked, kStride>& access,
                                const int32_t* weight, IntVector (&sum)[kRows]) {
    const Ints d;
    const int32_t* maps[2] = {Map(e, step), Map(e, step + 1)};
    for (auto& value : sum) value = hn::Set(d, w_.depthwise.start[e]);
    EDGEDYN_UNROLL
    for (int column = 0; column < kSide; ++column) {
      const IntVector first = access.Load(maps[0] + column);
      const IntVector second = access.Load(maps[1] + column);
      if constexpr (kSide == 3) {
        // the second half of the rows is the first half two hidden rows further down
        const Quads upper = MakeQuads(first), lower = MakeQuads(Funnel(first, second));
        EDGEDYN_UNROLL
        for (int i = 0; i < kRows / 2; ++i) {
          const Taps taps = LoadTaps(weight + (i * kSide + column) * kTapWords);
          sum[i] = Dot(sum[i], upper, taps);
          sum[i + kRows / 2] = Dot(sum[i + kRows / 2], lower, taps);
        }
      } else {
        const Quads quads[2] = {MakeQuads(first), MakeQuads(second)};
        EDGEDYN_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const int32_t* taps = weight + (i * kSide + column) * 2 * kTapWords;
          if (i * kStride < kQuad) sum[i] = Dot(sum[i], quads[0], LoadTaps(taps));
          if (i * kStride + kSide > kQuad) sum[i] = Dot(sum[i], quads[1], LoadTaps(taps + kTapWords));
        }
      }
    }
  }

  template <int kRows>
  void Project(const Window& window) {
    const WindowAccess<Floats, kMasked> access(window);
    const Floats df;
    for (int64_t o = 0; o < p_.outputs; o += 4) {
      IntVector sum[4][kRows];
      Multiply(w_.project, o, hidden_ / 4, filtered_, sum);
      EDGEDYN_UNROLL
      for (int c = 0; c < 4; ++c) {
        const Vector factor = hn::Set(df, w_.project.factor[o + c]),
                     offset = hn::Set(df, w_.project.offset[o + c]);
        Vector y[kRows];
        EDGEDYN_UNROLL
        for (int i = 0; i < kRows; ++i) y[i] = hn::MulAdd(hn::ConvertTo(df, sum[c][i]), factor, offset);
        Activate(w_.project.finish, o + c, y);
        EDGEDYN_UNROLL
        for (int i = 0; i < kRows; ++i) access.Store(y[i], y_ + ((o + c) * kRows + i) * y_pitch_);
      }
    }
  }

  const Int8Weights& w_;
  const int64_t hidden_, depth_;
  int32_t *x_, *maps_, *filtered_;
};

}  // namespace HWY_NAMESPACE
}  // namespace edgedyn
HWY_AFTER_NAMESPACE();

#endif
