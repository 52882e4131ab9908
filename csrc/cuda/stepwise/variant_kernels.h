// The passes of lstm_variant over all rows, free of torch: one launch does one pass of a step. See core/variant.h.
#pragma once

#include <cuda_runtime_api.h>

#include "../../core/variant.h"

namespace birnn::cuda {

cudaError_t variant_forward(DType dtype, const VariantForward& params, cudaStream_t stream);
cudaError_t variant_forward_projected(DType dtype, const VariantForward& params, cudaStream_t stream);
cudaError_t variant_backward_output(DType dtype, const VariantBackward& params, cudaStream_t stream);
cudaError_t variant_backward(DType dtype, const VariantBackward& params, cudaStream_t stream);

}  // namespace birnn::cuda
