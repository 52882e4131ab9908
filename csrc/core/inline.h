// Macros that make the compiler inline functions and unroll loops in every kernel, on the CPU and on CUDA.
#pragma once

#if defined(__CUDACC__)
#define BIRNN_INLINE_HOST inline
#define BIRNN_INLINE __host__ __device__ __forceinline__
#define BIRNN_INLINE_LAMBDA
#define BIRNN_UNROLL _Pragma("unroll")
#else
#define BIRNN_INLINE inline __attribute__((always_inline))
#define BIRNN_INLINE_HOST BIRNN_INLINE
#define BIRNN_INLINE_LAMBDA __attribute__((always_inline))
#define BIRNN_UNROLL _Pragma("GCC unroll 8")
#endif
