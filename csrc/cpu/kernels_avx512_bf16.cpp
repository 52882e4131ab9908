// The kernels for bfloat16 on AVX-512 with BF16, which multiplies pairs. 6 x 4 of the 32 registers are accumulators.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16,prefer-vector-width=512")
#endif
#define BIRNN_ISA avx512_bf16
#define BIRNN_ISA_BYTES 64
#define BIRNN_ISA_ROWS 6
#define BIRNN_ISA_BF16 1
#include "recurrence_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
