// A job's tensors as ExecuTorch holds them.
#pragma once

#include <executorch/runtime/core/exec_aten/exec_aten.h>

#include <numeric>

#include "jobs.h"

namespace edgedyn::driver {

using ::executorch::aten::ScalarType;
using ::executorch::aten::TensorImpl;

inline ScalarType TypeOf(char letter) {
  switch (letter) {
    case 'd': return ScalarType::Double;
    case 'e': return ScalarType::Half;
    case 'b': return ScalarType::Char;
    default: return ScalarType::Float;
  }
}

// A tensor and the lists that it points to.
struct Held {
  explicit Held(const JobTensor& t)
      : sizes(t.sizes.begin(), t.sizes.end()), strides(t.strides.begin(), t.strides.end()), order(t.sizes.size()) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return strides[a] > strides[b]; });
    impl = std::make_unique<TensorImpl>(TypeOf(t.type), sizes.size(), sizes.data(), t.buffer.data(), order.data(),
                                        strides.data(), executorch::aten::TensorShapeDynamism::DYNAMIC_BOUND);
  }

  std::vector<TensorImpl::SizesType> sizes;
  std::vector<TensorImpl::StridesType> strides;
  std::vector<TensorImpl::DimOrderType> order;
  std::unique_ptr<TensorImpl> impl;
};

}  // namespace edgedyn::driver
