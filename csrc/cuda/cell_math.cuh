// What the CUDA kernels share: the cell's functions, and conversions between the tensors' type and the type in which
// the kernels compute.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../core/recurrence.h"

namespace birnn::cuda {

template <class A>
struct Math;

template <>
struct Math<float> {
  using Scalar = float;
  static __device__ float sigmoid(float x) { return __frcp_rn(1.f + expf(-x)); }
  static __device__ float tanh(float x) { return tanhf(x); }
};

template <>
struct Math<double> {
  using Scalar = double;
  static __device__ double sigmoid(double x) { return 1. / (1. + exp(-x)); }
  static __device__ double tanh(double x) { return ::tanh(x); }
};

inline __device__ double convert(double x, double) { return x; }
inline __device__ float convert(float x, float) { return x; }
inline __device__ float convert(__half x, float) { return __half2float(x); }
inline __device__ __half convert(float x, __half) { return __float2half(x); }
inline __device__ float convert(__nv_bfloat16 x, float) { return __bfloat162float(x); }
inline __device__ __nv_bfloat16 convert(float x, __nv_bfloat16) { return __float2bfloat16(x); }

}  // namespace birnn::cuda
