// A stand-in for CUDA's header, so that g++ compiles the kernels as they are and they run on the host.
//
// It has the part of CUDA that edgedyn/ops uses; run.cpp is the machine: one block at a time, its threads as
// fibers.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorIllegalAddress = 700,
              cudaErrorLaunchFailure = 719;
using cudaStream_t = struct Stream*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyint(value)); }
using std::fabs;
using std::fmax;
using std::fmin;

void __syncthreads();
int __syncthreads_or(int predicate);

// Runs a kernel: returns cudaErrorIllegalAddress for an access outside of mapped memory,
// cudaErrorLaunchFailure for threads that do not meet at a barrier or writes behind the shared memory that
// was asked for.
cudaError_t RunOnHost(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

template <typename Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments),
                               const Arguments& a) {
  return RunOnHost(*config, [=] { kernel(a); });
}
