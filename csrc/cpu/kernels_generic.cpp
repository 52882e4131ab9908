// The kernels for every CPU, with 128-bit vectors (SSE2, NEON). 3 x 4 of 16 registers, or 6 x 4 of NEON's 32, are
// accumulators.
#define BIRNN_ISA generic
#define BIRNN_ISA_BYTES 16
#if defined(__aarch64__)
#define BIRNN_ISA_ROWS 6
#else
#define BIRNN_ISA_ROWS 3
#endif
#include "recurrence_kernel.h"
