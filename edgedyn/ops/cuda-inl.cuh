// Shared by the CUDA kernels: pixels between memory (float, half or INT8) and registers, checks, launch.
//
// Only nvcc includes this file. It uses little of CUDA (no warp intrinsics, one-dimensional blocks and
// grids), so that tests/ can emulate that part and run the kernels on the host.
#pragma once

#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda.h"
#include "shared.h"

#define EDGEDYN_DEVICE __device__ __forceinline__
#define EDGEDYN_EXPORT extern "C" __attribute__((visibility("default")))

namespace edgedyn {

// Shared memory of a block: the limit without an opt-in, and the dynamic part of it.
constexpr int64_t kMostSharedBytes = 48 * 1024, kSharedBytes = 40 * 1024;
extern __shared__ __align__(16) unsigned char shared_memory[];

// The type of generated tensors for pixels of type T.
template <typename T>
using Generated = std::conditional_t<std::is_same_v<T, int8_t>, float, T>;

// A pixel as a float: the real value, for INT8 still without the scale, which the caller multiplies once per
// sum.
EDGEDYN_DEVICE float Load(float stored, float) { return stored; }
EDGEDYN_DEVICE float Load(__half stored, float) { return __half2float(stored); }
EDGEDYN_DEVICE float Load(int8_t stored, float zero_point) { return static_cast<float>(stored) - zero_point; }

EDGEDYN_DEVICE void Store(float y, const Quantization&, float* to) { *to = y; }
EDGEDYN_DEVICE void Store(float y, const Quantization&, __half* to) { *to = __float2half_rn(y); }

// Rounds ties to even and saturates, as torch's quantize_per_tensor does. Clamps first, to integers: far
// outside of int32 the conversion is undefined.
EDGEDYN_DEVICE void Store(float y, const Quantization& q, int8_t* to) {
  const float lowest = static_cast<float>(-128 - q.zero_point),
              highest = static_cast<float>(127 - q.zero_point);
  *to = static_cast<int8_t>(__float2int_rn(fminf(fmaxf(y * q.inverse, lowest), highest)) + q.zero_point);
}

// Stored pixels, read as real ones: the x of the formulas.
template <typename T>
struct Pixels {
  const T* data;
  Quantization of;

  EDGEDYN_DEVICE float operator[](int64_t i) const {
    return Load(data[i], static_cast<float>(of.zero_point)) * of.scale;
  }
  EDGEDYN_DEVICE Pixels operator+(int64_t i) const { return {data + i, of}; }
  // The stored value of a real zero.
  EDGEDYN_DEVICE T Zero() const { return static_cast<T>(static_cast<float>(of.zero_point)); }
};

// Adjacent values, moved by one instruction.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Wide {
  T at[kCount];
};

// Reads up to kWide adjacent values; 0 where there is none.
template <int kWide, typename T>
EDGEDYN_DEVICE void ReadWide(const T* from, int64_t count, bool is_aligned, float (&values)[kWide]) {
  if (is_aligned && count >= kWide) {
    const auto wide = *reinterpret_cast<const Wide<T, kWide>*>(from);
#pragma unroll
    for (int j = 0; j < kWide; ++j) values[j] = Load(wide.at[j], 0);
    return;
  }
#pragma unroll
  for (int j = 0; j < kWide; ++j) values[j] = j < count ? Load(from[j], 0) : 0;
}

template <int kWide, typename T>
EDGEDYN_DEVICE void WriteWide(const float (&y)[kWide], int64_t count, bool is_aligned, const Quantization& q,
                              T* to) {
  Wide<T, kWide> wide;
#pragma unroll
  for (int j = 0; j < kWide; ++j) Store(y[j], q, &wide.at[j]);
  if (is_aligned && count >= kWide) {
    *reinterpret_cast<Wide<T, kWide>*>(to) = wide;
    return;
  }
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    if (j < count) to[j] = wide.at[j];
  }
}

inline bool IsAligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

template <typename Value>
EDGEDYN_HD Value CeilDiv(Value a, Value b) {
  return (a + b - 1) / b;
}

inline bool IsInt8(const Quantization& q) {
  return q.scale > 0 && q.zero_point >= -128 && q.zero_point <= 127;
}

// Whether a call has a known type and, for INT8, scales and zero points.
inline bool IsTyped(const Call& call) {
  if (call.type != kInt8) return call.type == kFloat32 || call.type == kFloat16;
  return IsInt8(call.of_x) && IsInt8(call.of_y) && call.of_y.inverse > 0;
}

inline bool HasShape(const Call& call, int input, int64_t a, int64_t b, int64_t c, int64_t d) {
  const int64_t* shape = call.shapes[input];
  return shape[0] == a && shape[1] == b && shape[2] == c && shape[3] == d;
}

template <typename T>
Pixels<T> PixelsOf(const Call& call) {
  return {static_cast<const T*>(call.inputs[0]), call.type == kInt8 ? call.of_x : Quantization{}};
}

template <typename T>
const Generated<T>* GeneratedOf(const Call& call, int input) {
  return static_cast<const Generated<T>*>(call.inputs[input]);
}

// Returns launch(T()) for the type T of x and y, which IsTyped has checked.
template <typename Function>
cudaError_t ForType(const Call& call, const Function& launch) {
  if (call.type == kFloat32) return launch(float());
  return call.type == kFloat16 ? launch(__half()) : launch(int8_t());
}

// The kernels' arguments are one struct; a grid is at most 2^31 - 1 blocks.
template <typename Arguments>
cudaError_t Launch(void (*kernel)(Arguments), int64_t blocks, int threads, int64_t shared_bytes,
                   const Call& call, const Arguments& arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(call.stream);
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace edgedyn
