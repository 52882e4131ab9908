// The algorithm `stepwise`: T times one batched GEMM for both directions and one fused cell kernel. It serves every
// size, type and GPU, and only launches, so that it can be captured into a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include "../../op_common.h"

namespace birnn::cuda {

void stepwise_forward(birnn::Forward& call, const Tensor& w_hh, const OptionalTensor& h0, const OptionalTensor& c0,
                      cudaStream_t stream);

void stepwise_backward(birnn::Backward& call, const Tensor& w_hh, const OptionalTensor& lengths,
                       const OptionalTensor& dh_n, const OptionalTensor& dc_n, cudaStream_t stream);

}  // namespace birnn::cuda
