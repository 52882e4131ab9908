// The kernels for AVX2 + FMA + F16C. 3 x 4 of the 16 registers are accumulators.
#if defined(__x86_64__)
#include <cstdint>

#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define BIRNN_ISA avx2
#define BIRNN_ISA_BYTES 32
#define BIRNN_ISA_ROWS 3
#include "recurrence_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
