// Half precision by the compiler's own type, which rounds as the GPU does.
#pragma once

using __half = _Float16;

inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
