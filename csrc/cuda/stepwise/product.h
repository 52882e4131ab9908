// The matrix products of `stepwise`, by cuBLAS.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/bmm.h>

namespace birnn::cuda {

// The weights as product() takes them: before compute capability 8.0 no bfloat16 product has a float32 result.
inline at::Tensor multiplied(const at::Tensor& w) {
  const bool widen = w.scalar_type() == at::kBFloat16 && at::cuda::getCurrentDeviceProperties()->major < 8;
  return widen ? w.to(at::kFloat) : w;
}

// out = a b. 16-bit products go to a float32 out unrounded.
inline void product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  if (out.scalar_type() == b.scalar_type())
    at::bmm_out(out, a.to(b.scalar_type()), b);
  else
    at::bmm_out(out, a, b, out.scalar_type());
}

}  // namespace birnn::cuda
