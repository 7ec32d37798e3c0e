// The interface between CUDA kernels and their callers: one C function per op, edgedyn_<op>(const Call*). A
// TensorRT plugin in C++, one in Python (ctypes) and a benchmark call the same function.
//
//   type      x and y          generated tensors (grids, filters, coefficients, masks), weights, biases
//   float32   float            float
//   float16   __half           __half; sums in float
//   int8      int8_t, affine   float
#pragma once

#include <cstdint>

#include "shared.h"

namespace edgedyn {

enum Type : int32_t { kFloat32 = 0, kFloat16 = 1, kInt8 = 2 };

// Plain data, so that ctypes can fill it in. Tensors are dense and in order, on the current device; the
// caller owns them.
struct Call {
  int32_t type;
  // tensors in the order of the op's schema; null for an absent optional one
  const void* inputs[4];
  int64_t shapes[4][4];
  // int, bool and str arguments in the order of the schema; a str is its index in the op's list of choices
  int64_t attributes[8];
  void* output;
  Quantization of_x, of_y;  // of int8
  void* stream;             // cudaStream_t
};

}  // namespace edgedyn
