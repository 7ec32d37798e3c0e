// A float tile of a block. Lanes are columns, and every weight is a broadcast; a register tile is four
// channels by the four rows of a quad.
#include <vector>

#include "hwy/highway.h"
#include "inverted_residual/tile-inl.h"

#if defined(EDGEDYN_OPS_BLOCK_FLOAT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EDGEDYN_OPS_BLOCK_FLOAT_INL_H_
#undef EDGEDYN_OPS_BLOCK_FLOAT_INL_H_
#else
#define EDGEDYN_OPS_BLOCK_FLOAT_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace edgedyn {
namespace HWY_NAMESPACE {

struct FloatLayer {
  std::vector<float> weight, bias, slopes;
  Finish finish;
};

class FloatWeights {
 public:
  explicit FloatWeights(const BlockArguments<float>& a) {
    const InvertedResidual& p = a.p;
    PackPoints(a.expand, p.expand, p.hidden, p.channels, expand);
    PackPoints(a.project, p.project, p.outputs, p.hidden, project);
    CopyChannels(a.depthwise, p.depthwise, p.hidden, depthwise);
    depthwise.weight.assign(a.depthwise.weight, a.depthwise.weight + p.hidden * p.side * p.side);
  }

  FloatLayer expand, depthwise, project;

 private:
  // [block of 4 outputs][input][output], as the register tile reads them
  static void PackPoints(const LayerTensors<float>& from, BlockActivation activation, int64_t outputs,
                         int64_t inputs, FloatLayer& to) {
    CopyChannels(from, activation, outputs, to);
    to.weight.resize(RoundUp(outputs, 4) * inputs);
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < inputs; ++i)
        to.weight[(o / 4 * inputs + i) * 4 + o % 4] = from.weight[o * inputs + i];
    }
  }

  static void CopyChannels(const LayerTensors<float>& from, BlockActivation activation, int64_t outputs,
                           FloatLayer& to) {
    to.bias.assign(RoundUp(outputs, 4), 0), to.slopes = to.bias;
    std::copy(from.bias, from.bias + outputs, to.bias.begin());
    if (from.slopes) std::copy(from.slopes, from.slopes + outputs, to.slopes.begin());
    to.finish = {activation, to.slopes.data(), 1, false};
  }
};

template <bool kMasked>
class FloatTile : public Tile<FloatTile<kMasked>, float, kMasked> {
  using Base = Tile<FloatTile<kMasked>, float, kMasked>;
  friend Base;

 public:
  static int64_t Words(const InvertedResidual& p) { return p.hidden * 2 * kQuad; }

  FloatTile(const BlockArguments<float>& a, const FloatWeights& weights, const BlockTile& tile,
            std::vector<float>& scratch)
      : Base(a, tile), w_(weights) {
    const int64_t in = vectors_ * p_.channels * kQuad * lanes_, maps = (p_.hidden + 3) * 2 * kQuad * pitch_;
    const int64_t out = p_.hidden * kQuad * lanes_;
    x_ = Carve(scratch, in + maps + out + this->OutputWords());
    maps_ = x_ + in, filtered_ = maps_ + maps, y_ = filtered_ + out;
  }

 private:
  using Base::a_, Base::p_, Base::tile_, Base::columns_, Base::needed_;
  using Base::lanes_, Base::vectors_, Base::pitch_, Base::y_pitch_, Base::y_;

  // x of a quad of rows: [vector][channel][row][lane]
  void PackInput(int64_t top, const Windows& windows) {
    const float* begin = a_.x + tile_.sample * p_.channels * p_.height * p_.width;
    const float* end = begin + p_.channels * p_.height * p_.width;
    for (int64_t c = 0; c < p_.channels; ++c) {
      for (int64_t r = 0; r < kQuad; ++r) {
        const int64_t row = std::clamp<int64_t>(top + r, 0, p_.height - 1);
        const float* from = begin + (c * p_.height + row) * p_.width + columns_.left + columns_.begin;
        for (int64_t v = 0; v < windows.size(); ++v) {
          const WindowAccess<Floats, kMasked> columns(windows[v]);
          hn::Store(columns.LoadWithin(from, begin, end), Floats(),
                    x_ + ((v * p_.channels + c) * kQuad + r) * lanes_);
        }
      }
    }
  }

  float* Map(int64_t e, int64_t quad) const { return maps_ + (e * 2 + quad % 2) * kQuad * pitch_; }

  // The hidden rows of a quad; 0 outside of the image.
  void Expand(int64_t quad) {
    const int64_t top = tile_.row * p_.stride - p_.side / 2 + quad * kQuad;
    const Windows windows = needed_.OfHidden(quad);
    PackInput(top, windows);
    for (int64_t v = 0; v < windows.size(); ++v) ExpandWindow(quad, v, windows[v]);
    for (int64_t e = 0; e < p_.hidden; ++e) {
      for (int64_t r = 0; r < kQuad; ++r) {
        float* row = Map(e, quad) + r * pitch_;
        const bool is_outside = top + r < 0 || top + r >= p_.height;
        std::fill(row, row + (is_outside ? columns_.width : columns_.begin), 0.0f);
        std::fill(row + columns_.end, row + columns_.width, 0.0f);
      }
    }
  }

  void ExpandWindow(int64_t quad, int64_t v, const Window& window) {
    const WindowAccess<Floats, kMasked> access(window);
    for (int64_t e = 0; e < p_.hidden; e += 4) {
      Vector sum[4][kQuad];
      Multiply(w_.expand, e, p_.channels, x_ + v * p_.channels * kQuad * lanes_, sum);
      EDGEDYN_UNROLL
      for (int c = 0; c < 4; ++c) {
        Activate(w_.expand.finish, e + c, sum[c]);
        EDGEDYN_UNROLL
        for (int r = 0; r < kQuad; ++r) {
          access.Store(sum[c][r], Map(e + c, quad) + r * pitch_ + columns_.begin);
        }
      }
    }
  }

  // A 1 x 1 convolution to the four channels from o on: from [input][row][lane].
  template <int kCount>
  HWY_INLINE void Multiply(const FloatLayer& layer, int64_t o, int64_t inputs, const float* HWY_RESTRICT from,
                           Vector (&sum)[4][kCount]) const {
    const Floats d;
    const float* HWY_RESTRICT weight = layer.weight.data() + o * inputs;
    EDGEDYN_UNROLL
    for (int c = 0; c < 4; ++c) {
      EDGEDYN_UNROLL
      for (int r = 0; r < kCount; ++r) sum[c][r] = hn::Set(d, layer.bias[o + c]);
    }
    for (int64_t k = 0; k < inputs; ++k, from += kCount * lanes_, weight += 4) {
      Vector x[kCount];
      EDGEDYN_UNROLL
      for (int r = 0; r < kCount; ++r) x[r] = hn::Load(d, from + r * lanes_);
      EDGEDYN_UNROLL
      for (int c = 0; c < 4; ++c) {
        const Vector w = hn::Set(d, weight[c]);
        EDGEDYN_UNROLL
        for (int r = 0; r < kCount; ++r) sum[c][r] = hn::MulAdd(x[r], w, sum[c][r]);
      }
    }
  }

  // One vector of all channels and rows of a step: [channel][row][lane]
  template <int kSide, int kStride>
  void Filter(int64_t step, const Window& window) {
    constexpr int kRows = kQuad / kStride;
    const Floats d;
    const WindowAccess<Floats, kMasked, kStride> access(window);
    const float* weight = w_.depthwise.weight.data();
    for (int64_t e = 0; e < p_.hidden; ++e, weight += kSide * kSide) {
      Vector sum[kRows];
      EDGEDYN_UNROLL
      for (int i = 0; i < kRows; ++i) sum[i] = hn::Set(d, w_.depthwise.bias[e]);
      EDGEDYN_UNROLL
      for (int row = 0; row < (kRows - 1) * kStride + kSide; ++row) {
        const float* from = Map(e, step + row / kQuad) + row % kQuad * pitch_;
        EDGEDYN_UNROLL
        for (int column = 0; column < kSide; ++column) {
          const Vector value = access.Load(from + column);
          EDGEDYN_UNROLL
          for (int i = 0; i < kRows; ++i) {
            const int tap = row - i * kStride;
            if (tap >= 0 && tap < kSide) {
              sum[i] = hn::MulAdd(value, hn::Set(d, weight[tap * kSide + column]), sum[i]);
            }
          }
        }
      }
      Activate(w_.depthwise.finish, e, sum);
      EDGEDYN_UNROLL
      for (int i = 0; i < kRows; ++i) hn::Store(sum[i], d, filtered_ + (e * kRows + i) * lanes_);
    }
  }

  template <int kRows>
  void Project(const Window& window) {
    const WindowAccess<Floats, kMasked> access(window);
    for (int64_t o = 0; o < p_.outputs; o += 4) {
      Vector sum[4][kRows];
      Multiply(w_.project, o, p_.hidden, filtered_, sum);
      EDGEDYN_UNROLL
      for (int c = 0; c < 4; ++c) {
        Activate(w_.project.finish, o + c, sum[c]);
        EDGEDYN_UNROLL
        for (int i = 0; i < kRows; ++i) access.Store(sum[c][i], y_ + ((o + c) * kRows + i) * y_pitch_);
      }
    }
  }

  const FloatWeights& w_;
  float *x_, *maps_, *filtered_;
};

}  // namespace HWY_NAMESPACE
}  // namespace edgedyn
HWY_AFTER_NAMESPACE();

#endif
