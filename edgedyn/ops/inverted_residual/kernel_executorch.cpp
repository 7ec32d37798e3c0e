// inverted_residual for ExecuTorch: the whole block tile by tile, so that hidden maps stay in a core's cache.
//
// A tile takes four hidden rows at a time (a quad): x of these rows is packed, the first convolution writes
// the quad beside the one before it, and the two of them give 4 / stride rows of y: one vector of columns at
// a time is filtered for all channels and projected at once. Both kernels hold a register tile of four
// channels by four rows. Float: float-inl.h. INT8, four bytes per 32-bit lane: int8-inl.h.
//
// Scratch per thread: two quads of all hidden channels, at most half of the second-level cache (1 MiB at
// most) by narrower tiles, beside x and y of a quad. Threads keep it from call to call: as fresh pages it
// would cost as much as the block of a small image.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "inverted_residual/kernel_executorch.cpp"
// Highway leaves it out by default; the only x86 instruction set here with a dot product of bytes
#define HWY_WANT_AVX3_DL
// without AVX2 and SSE4: the scalar one
#ifndef HWY_DISABLED_TARGETS  // on ARM64 CMake leaves out SVE
#define HWY_DISABLED_TARGETS HWY_SSSE3
#endif
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// after foreach_target.h
#include "executorch.h"
#include "hwy/highway.h"
#include "inverted_residual/float-inl.h"
#include "inverted_residual/int8-inl.h"

HWY_BEFORE_NAMESPACE();
namespace edgedyn {
namespace HWY_NAMESPACE {

template <typename Tile, typename Word, typename Weights, typename T>
void RunTiles(const BlockArguments<T>& a, const Weights& weights, int64_t budget) {
  const BlockGrid grid(a.p, Tile::Words(a.p), hn::Lanes(Floats()), budget);
  parallel_for(0, grid.count(), 1, [&](int64_t begin, int64_t end) HWY_ATTR {
    thread_local std::vector<Word> scratch;
    for (int64_t item = begin; item < end; ++item) Tile(a, weights, grid.tile(item), scratch).Run();
  });
}

// Columns are left out in the one shape that gated blocks have; others compute all of y, and mask it.
template <template <bool> class Tile, typename Word, typename Weights, typename T>
void RunBlock(const BlockArguments<T>& a, int64_t budget) {
  const Weights weights(a);
  if (a.mask && a.p.side == 3 && a.p.stride == 1) return RunTiles<Tile<true>, Word>(a, weights, budget);
  RunTiles<Tile<false>, Word>(a, weights, budget);
}

void RunFloat(const BlockArguments<float>& a, int64_t budget) {
  RunBlock<FloatTile, float, FloatWeights>(a, budget);
}

void RunInt8(const BlockArguments<int8_t>& a, int64_t budget) {
  RunBlock<Int8Tile, int32_t, Int8Weights>(a, budget);
}

}  // namespace HWY_NAMESPACE
}  // namespace edgedyn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <unistd.h>

#include <cstring>

namespace edgedyn {
namespace {

HWY_EXPORT(RunFloat);
HWY_EXPORT(RunInt8);

// Bytes of hidden maps per thread.
int64_t Budget() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr int64_t cache = 0;
#endif
  return std::clamp<int64_t>(cache > 0 ? cache / 2 : 256 << 10, 64 << 10, 1 << 20);
}

void Run(const BlockArguments<float>& a) { HWY_DYNAMIC_DISPATCH(RunFloat)(a, Budget()); }
void Run(const BlockArguments<int8_t>& a) { HWY_DYNAMIC_DISPATCH(RunInt8)(a, Budget()); }

// One layer as the runtime hands it over; scales are absent in float.
struct Layer {
  const Tensor& weight;
  const Tensor* scales;
  const Tensor& bias;
  const optional<Tensor>& slopes;
  std::string_view activation;
};

bool ReadActivation(std::string_view name, BlockActivation& activation) {
  static constexpr std::pair<std::string_view, BlockActivation> kNames[] = {
      {"none", BlockActivation::kNone},
      {"relu", BlockActivation::kRelu},
      {"relu6", BlockActivation::kRelu6},
      {"prelu", BlockActivation::kPrelu},
      {"hardswish", BlockActivation::kHardswish}};
  for (const auto& [known, value] : kNames) {
    if (name == known) return activation = value, true;
  }
  return false;
}

bool IsVector(const Tensor& t, int64_t size) { return IsDense(t, 1, ScalarType::Float) && t.size(0) == size; }

// Returns the error in a layer with weight (outputs, inputs, side, side), or null.
const char* CheckLayer(const Layer& layer, ScalarType type, BlockActivation& activation, int64_t inputs) {
  if (!ReadActivation(layer.activation, activation))
    return "expected activations none, relu, relu6, prelu or hardswish";
  if (!IsDense(layer.weight, 4, type) || layer.weight.size(1) != inputs || layer.weight.size(0) < 1)
    return "expected weights as contiguous (outputs, inputs, R, R) of the op's type, on the channels before";
  if (type == ScalarType::Char &&
      std::memchr(layer.weight.const_data_ptr<int8_t>(), 0x80, layer.weight.numel()))
    return "expected int8 weights from -127 to 127";  // two products of -128 overflow 16 bits on NEON
  const int64_t outputs = layer.weight.size(0);
  if (!IsVector(layer.bias, outputs) || (layer.scales && !IsVector(*layer.scales, outputs)))
    return "expected biases and scales as one float per output channel";
  if (layer.slopes.has_value() != (activation == BlockActivation::kPrelu) ||
      (layer.slopes.has_value() && !IsVector(*layer.slopes, outputs)))
    return "expected slopes of a prelu, and of nothing else, as one float per output channel";
  return nullptr;
}

const char* CheckMask(const optional<Tensor>& mask, const InvertedResidual& p) {
  if (!mask.has_value()) return nullptr;
  if (!IsDense(*mask, 4, ScalarType::Float) || mask->size(0) != p.batch || mask->size(1) != 1 ||
      mask->size(2) != p.out_height || mask->size(3) != p.out_width)
    return "expected mask as a contiguous (B, 1, h, w) of float, one value per position of y";
  const float* begin = mask->const_data_ptr<float>();
  const bool is_binary = std::all_of(begin, begin + mask->numel(), [](float m) { return m == 0 || m == 1; });
  return is_binary ? nullptr : "expected a mask of 0 and 1 only";
}

// Returns the error in the tensors, or null; fills the sizes of p, whose other arguments are set.
const char* Check(const Tensor& x, ScalarType type, const Layer& expand, const Layer& depthwise,
                  const Layer& project, const optional<Tensor>& mask, InvertedResidual& p) {
  if (p.stride != 1 && p.stride != 2) return "expected stride 1 or 2";
  if (!IsDense(x, 4, ScalarType::Float) || (x.numel() == 0 && x.size(0) > 0))
    return "expected x as a contiguous (B, C, H, W) of float, at least one channel and pixel";
  p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  if (const char* wrong = CheckLayer(expand, type, p.expand, p.channels)) return wrong;
  p.hidden = expand.weight.size(0), p.outputs = project.weight.dim() ? project.weight.size(0) : 0;
  if (const char* wrong = CheckLayer(depthwise, type, p.depthwise, 1)) return wrong;
  if (const char* wrong = CheckLayer(project, type, p.project, p.hidden)) return wrong;
  p.side = depthwise.weight.size(2);
  const auto is_square = [](const Tensor& t, int64_t side) { return t.size(2) == side && t.size(3) == side; };
  if (!is_square(expand.weight, 1) || !is_square(project.weight, 1) || !is_square(depthwise.weight, p.side) ||
      (p.side != 3 && p.side != 5) || depthwise.weight.size(0) != p.hidden)
    return "expected 1 x 1 weights around a depthwise one of 3 x 3 or 5 x 5, one kernel per hidden channel";
  if (p.residual && (p.stride != 1 || p.outputs != p.channels))
    return "expected a residual only where y has the shape of x";
  p.out_height = (p.height - 1) / p.stride + 1, p.out_width = (p.width - 1) / p.stride + 1;
  return CheckMask(mask, p);
}

template <typename T>
LayerTensors<T> Read(const Layer& layer) {
  return {layer.weight.const_data_ptr<T>(), layer.scales ? layer.scales->const_data_ptr<float>() : nullptr,
          layer.bias.const_data_ptr<float>(),
          layer.slopes.has_value() ? layer.slopes->const_data_ptr<float>() : nullptr};
}

template <typename T>
Tensor& Compute(KernelRuntimeContext& context, const Tensor& x, const Layer& expand, const Layer& depthwise,
                const Layer& project, const optional<Tensor>& mask, InvertedResidual p,
                const std::array<Quantization, 3>& q, Tensor& out) {
  const char* wrong = Check(x, kScalarType<T>, expand, depthwise, project, mask, p);
  EDGEDYN_CHECK(context, !wrong, out, "inverted_residual: %s", wrong);
  EDGEDYN_CHECK(context, std::all_of(q.begin(), q.end(), IsInt8), out,
                "inverted_residual: expected scales > 0 and zero points in [-128, 127]");
  EDGEDYN_CHECK(context, ResizeTo(out, ScalarType::Float, {p.batch, p.outputs, p.out_height, p.out_width}),
                out, "inverted_residual: out cannot hold y");
  if (out.numel() == 0) return out;
  Run(BlockArguments<T>{p, x.const_data_ptr<float>(), Read<T>(expand), Read<T>(depthwise), Read<T>(project),
                        mask.has_value() ? mask->const_data_ptr<float>() : nullptr,
                        out.mutable_data_ptr<float>(), q[0], q[1], q[2]});
  return out;
}

Tensor& inverted_residual_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& expand,
                              const Tensor& expand_bias, const optional<Tensor>& expand_slopes,
                              const Tensor& depthwise, const Tensor& depthwise_bias,
                              const optional<Tensor>& depthwise_slopes, const Tensor& project,
                              const Tensor& project_bias, const optional<Tensor>& project_slopes,
                              const optional<Tensor>& mask, std::string_view expand_activation,
                              std::string_view depthwise_activation, std::string_view project_activation,
                              int64_t stride, bool residual, Tensor& out) {
  InvertedResidual p{};
  p.stride = stride, p.residual = residual;
  return Compute<float>(context, x, {expand, nullptr, expand_bias, expand_slopes, expand_activation},
                        {depthwise, nullptr, depthwise_bias, depthwise_slopes, depthwise_activation},
                        {project, nullptr, project_bias, project_slopes, project_activation}, mask, p, {},
                        out);
}

Tensor& inverted_residual_int8_out(KernelRuntimeContext& context, const Tensor& x, double x_scale,
                                   int64_t x_zero_point, const Tensor& expand, const Tensor& expand_scales,
                                   const Tensor& expand_bias, const optional<Tensor>& expand_slopes,
                                   double hidden_scale, int64_t hidden_zero_point, const Tensor& depthwise,
                                   const Tensor& depthwise_scales, const Tensor& depthwise_bias,
                                   const optional<Tensor>& depthwise_slopes, double filtered_scale,
                                   int64_t filtered_zero_point, const Tensor& project,
                                   const Tensor& project_scales, const Tensor& project_bias,
                                   const optional<Tensor>& project_slopes, const optional<Tensor>& mask,
                                   std::string_view expand_activation, std::string_view depthwise_activation,
                                   std::string_view project_activation, int64_t stride, bool residual,
                                   Tensor& out) {
  InvertedResidual p{};
  p.stride = stride, p.residual = residual;
  return Compute<int8_t>(
      context, x, {expand, &expand_scales, expand_bias, expand_slopes, expand_activation},
      {depthwise, &depthwise_scales, depthwise_bias, depthwise_slopes, depthwise_activation},
      {project, &project_scales, project_bias, project_slopes, project_activation}, mask, p,
      {Affine(x_scale, x_zero_point), Affine(hidden_scale, hidden_zero_point),
       Affine(filtered_scale, filtered_zero_point)},
      out);
}

EXECUTORCH_LIBRARY(edgedyn, "inverted_residual.out", inverted_residual_out);
EXECUTORCH_LIBRARY(edgedyn, "inverted_residual_int8.out", inverted_residual_int8_out);

}  // namespace
}  // namespace edgedyn
#endif
