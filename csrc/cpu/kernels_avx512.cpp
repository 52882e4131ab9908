// The kernels for AVX-512 (F, BW, DQ, VL). 6 x 4 of the 32 registers are accumulators.
#if defined(__x86_64__)
#include <cstdint>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define BIRNN_ISA avx512
#define BIRNN_ISA_BYTES 64
#define BIRNN_ISA_ROWS 6
#include "recurrence_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
