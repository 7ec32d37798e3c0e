// Shared by all formulas, on host and device: the affine INT8 of a tensor, real = (stored - zero_point) *
// scale.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define EDGEDYN_HD __host__ __device__ __forceinline__
#else
#define EDGEDYN_HD inline
#endif

namespace edgedyn {

struct Quantization {
  float scale = 1;
  int32_t zero_point = 0;
  float inverse = 1;  // 1 / scale, because kernels do not divide
};

}  // namespace edgedyn
