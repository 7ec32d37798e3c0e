// Evaluates each op's formula.h at every output, with a C++ compiler alone: run_formulas JOBS RESULTS
//
// A job's type is that of its x: float, double or half; the other tensors have the same, y is float.
#include "atom_depthwise2d/formula.h"
#include "decoupled_depthwise2d/formula.h"
#include "inverted_residual/formula.h"
#include "jobs.h"
#include "masked_conv2d/formula.h"
#include "sliced_depthwise2d/formula.h"

namespace {

using edgedyn::driver::Job;
using edgedyn::driver::JobTensor;
using edgedyn::driver::Value;

template <typename T>
const T* Data(const Value& value) {
  return value.tensor ? reinterpret_cast<const T*>(value.tensor->buffer.data()) : nullptr;
}

// Calls pixel(b, c, h, w) for every element of the output.
template <typename Pixel>
void ForEach(const Job& job, const Pixel& pixel) {
  const std::vector<int64_t>& n = job.out().sizes;
  float* y = reinterpret_cast<float*>(job.out().buffer.data());
  for (int64_t b = 0; b < n[0]; ++b)
    for (int64_t c = 0; c < n[1]; ++c)
      for (int64_t h = 0; h < n[2]; ++h)
        for (int64_t w = 0; w < n[3]; ++w) *y++ = pixel(b, c, h, w);
}

template <typename T>
void Sliced(const Job& job) {
  const auto& v = job.values;
  const auto &x = v[0].tensor->sizes, &grid = v[1].tensor->sizes;
  const int64_t side = v[3].integer;
  const edgedyn::SlicedDepthwise2d p{x[0],    x[1],    x[2], x[3],         grid[1] / (side * side),
                                     grid[2], grid[3], side, v[4].integer, v[5].integer != 0};
  ForEach(job, [&](int64_t b, int64_t c, int64_t h, int64_t w) {
    return edgedyn::filter_pixel(p, Data<T>(v[0]), Data<T>(v[1]), Data<T>(v[2]), b, c, h, w);
  });
}

template <typename T>
void Decoupled(const Job& job) {
  const auto& v = job.values;
  const auto &x = v[0].tensor->sizes, &y = job.out().sizes;
  const edgedyn::DecoupledDepthwise2d p{x[0], x[1],         x[2],         x[3],         v[6].integer,      y[2],
                                        y[3], v[3].integer, v[4].integer, v[5].integer, v[7].text == "mul"};
  ForEach(job, [&](int64_t b, int64_t c, int64_t h, int64_t w) {
    return edgedyn::filter_pixel(p, Data<T>(v[0]), Data<T>(v[1]), Data<T>(v[2]), b, c, h, w);
  });
}

template <typename T>
void Atoms(const Job& job) {
  const auto& v = job.values;
  const auto &x = v[0].tensor->sizes, &alpha = v[1].tensor->sizes, &bases = v[2].tensor->sizes;
  const edgedyn::AtomDepthwise2d p{x[0],     x[1],         x[2],        x[3], alpha[1] / bases[0],
                                   bases[0], v[3].integer, v[4].integer};
  ForEach(job, [&](int64_t b, int64_t o, int64_t h, int64_t w) {
    return edgedyn::filter_pixel(p, Data<T>(v[0]), Data<T>(v[1]), Data<T>(v[2]), b, o / x[1], o % x[1], h, w);
  });
}

template <typename T>
void Masked(const Job& job) {
  const auto& v = job.values;
  const auto &x = v[0].tensor->sizes, &y = job.out().sizes;
  const edgedyn::Activation bend = v[8].text == "relu6"  ? edgedyn::Activation::kRelu6
                                   : v[8].text == "relu" ? edgedyn::Activation::kRelu
                                                         : edgedyn::Activation::kNone;
  const edgedyn::MaskedConv2d p{x[0],         x[1],         x[2],         x[3],
                                y[1],         y[2],         y[3],         v[1].tensor->sizes[2],
                                v[4].integer, v[5].integer, v[6].integer, v[7].integer,
                                bend};
  ForEach(job, [&](int64_t b, int64_t o, int64_t h, int64_t w) {
    return edgedyn::convolve_pixel(p, Data<T>(v[0]), Data<T>(v[1]), Data<T>(v[2]), Data<T>(v[3]), b, o, h, w);
  });
}

edgedyn::BlockActivation ReadActivation(const std::string& text) {
  if (text == "relu") return edgedyn::BlockActivation::kRelu;
  if (text == "relu6") return edgedyn::BlockActivation::kRelu6;
  if (text == "prelu") return edgedyn::BlockActivation::kPrelu;
  if (text == "hardswish") return edgedyn::BlockActivation::kHardswish;
  return edgedyn::BlockActivation::kNone;
}

template <typename T>
void Inverted(const Job& job) {
  const auto& v = job.values;
  const auto &x = v[0].tensor->sizes, &y = job.out().sizes, &depthwise = v[4].tensor->sizes;
  const edgedyn::InvertedResidual p{x[0],
                                    x[1],
                                    x[2],
                                    x[3],
                                    depthwise[0],
                                    y[1],
                                    y[2],
                                    y[3],
                                    depthwise[2],
                                    v[14].integer,
                                    ReadActivation(v[11].text),
                                    ReadActivation(v[12].text),
                                    ReadActivation(v[13].text),
                                    v[15].integer != 0};
  const auto layer = [&](int k) {
    return edgedyn::BlockLayer<T>{Data<T>(v[k]), Data<T>(v[k + 1]), Data<T>(v[k + 2])};
  };
  ForEach(job, [&](int64_t b, int64_t o, int64_t h, int64_t w) {
    return edgedyn::BlockPixel(p, Data<T>(v[0]), layer(1), layer(4), layer(7), Data<T>(v[10]), b, o, h, w);
  });
}

template <typename T>
bool Evaluate(const Job& job) {
  if (job.name == "sliced_depthwise2d") return Sliced<T>(job), true;
  if (job.name == "decoupled_depthwise2d") return Decoupled<T>(job), true;
  if (job.name == "atom_depthwise2d") return Atoms<T>(job), true;
  if (job.name == "masked_conv2d") return Masked<T>(job), true;
  if (job.name == "inverted_residual") return Inverted<T>(job), true;
  return false;
}

bool Evaluate(const Job& job) {
  const char type = job.values[0].tensor->type;
  if (type == 'f') return Evaluate<float>(job);
  if (type == 'd') return Evaluate<double>(job);
#ifdef __FLT16_MAX__
  if (type == 'e') return Evaluate<_Float16>(job);
#endif
  return false;
}

}  // namespace

int main(int count, char** words) {
  if (count < 3) return 2;
  edgedyn::driver::JobFile jobs(words[1]);
  edgedyn::driver::ResultFile results(words[2]);
  for (Job job; jobs.Next(job);) {
    if (!Evaluate(job)) {
      results.Write(1, "no formula of " + job.name + " for this type", {}, "");
      continue;
    }
    const std::string damage = job.Damage();
    results.Write(damage.empty() ? 0 : -1, damage, job.out().sizes, job.out().buffer.bytes());
  }
  return 0;
}
