// Types, checks, dispatch and thread pool of all ExecuTorch kernels.
#pragma once

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <array>

#include "shared.h"

// Reports an error to the runtime, which fails the method, and returns.
#define EDGEDYN_CHECK(context, condition, out, ...) \
  ET_KERNEL_CHECK_MSG(context, condition, InvalidArgument, out, __VA_ARGS__)

// Dispatch of a template Function<T>(const Arguments<T>&, const Plan&, const Place&) by the type of x and by
// the instruction set. It takes two macros, because Highway exports only plain functions.
//
// Inside HWY_NAMESPACE: one plain function per type.
#define EDGEDYN_PER_TYPE(Function, Arguments, Plan, Place)                             \
  void Function##Float(const Arguments<float>& a, const Plan& plan, const Place& at) { \
    Function(a, plan, at);                                                             \
  }                                                                                    \
  void Function##Int8(const Arguments<int8_t>& a, const Plan& plan, const Place& at) { \
    Function(a, plan, at);                                                             \
  }

// Behind HWY_ONCE: one overload per type, which calls the plain function for this machine's instruction set.
#define EDGEDYN_DISPATCH(Function, Arguments, Plan, Place)                       \
  HWY_EXPORT(Function##Float);                                                   \
  HWY_EXPORT(Function##Int8);                                                    \
  void Function(const Arguments<float>& a, const Plan& plan, const Place& at) {  \
    HWY_DYNAMIC_DISPATCH(Function##Float)(a, plan, at);                          \
  }                                                                              \
  void Function(const Arguments<int8_t>& a, const Plan& plan, const Place& at) { \
    HWY_DYNAMIC_DISPATCH(Function##Int8)(a, plan, at);                           \
  }

namespace edgedyn {

using ::executorch::aten::ArrayRef;
using ::executorch::aten::optional;
using ::executorch::aten::ScalarType;
using ::executorch::aten::Tensor;
using ::executorch::extension::parallel_for;
using ::executorch::runtime::KernelRuntimeContext;

template <typename T>
constexpr ScalarType kScalarType = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<int8_t> = ScalarType::Char;

// Whether a tensor is dense and in order; to the runtime no empty tensor is contiguous.
inline bool IsDense(const Tensor& t, int64_t dims, ScalarType type) {
  return t.dim() == dims && t.scalar_type() == type &&
         (t.numel() == 0 || ::executorch::runtime::tensor_is_contiguous(t));
}

inline bool ResizeTo(Tensor& out, ScalarType type, const std::array<int64_t, 4>& sizes) {
  return IsDense(out, 4, type) &&
         ::executorch::runtime::resize_tensor(out, ArrayRef<int64_t>(sizes.data(), sizes.size())) ==
             ::executorch::runtime::Error::Ok;
}

// A zero point that INT8 does not hold stays one that IsInt8 refuses, although its type is narrower here.
inline Quantization Affine(double scale, int64_t zero_point) {
  const auto narrow = static_cast<int32_t>(std::clamp<int64_t>(zero_point, -129, 128));
  return {static_cast<float>(scale), narrow, static_cast<float>(1 / scale)};
}

inline bool IsInt8(const Quantization& q) {
  return q.scale > 0 && q.zero_point >= -128 && q.zero_point <= 127;
}

}  // namespace edgedyn
