// Asynchronous copies that arrive as late as they may: when a thread waits for them. Until then the
// destination holds NaN, so that tests see a read that is too early, or a write over values that others still
// read.
#pragma once

#include <cstddef>

void __pipeline_memcpy_async(void* to, const void* from, size_t bytes);
void __pipeline_commit();
void __pipeline_wait_prior(size_t groups);
