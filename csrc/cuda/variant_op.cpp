// The operator lstm_variant on CUDA: cuBLAS' batched products, and a kernel for each pass. It only launches, so it can
// be captured into a CUDA graph.
#include "../variant_op.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "algorithm_calls.h"
#include "stepwise/product.h"
#include "stepwise/variant_kernels.h"

namespace birnn::cuda {
namespace {

struct Device {
  using Guard = c10::cuda::CUDAGuard;
  static void ran(bool forward) {
    ++(forward ? op_calls.cuda_forward : op_calls.cuda_backward);
    count(Algorithm::stepwise);
  }

  static at::ScalarType operand_type(at::ScalarType type) { return type; }
  static Tensor multiplied(const Tensor& w) { return cuda::multiplied(w); }
  static void product(Tensor& out, const Tensor& a, const Tensor& b) { cuda::product(out, a, b); }
  static Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }

  static void check(const OptionalTensor& lengths, const RecurrenceSizes& sizes) {
    check_lengths_on_device(lengths, sizes);
  }

  static void forward(DType dtype, const VariantForward& p) {
    C10_CUDA_CHECK(variant_forward(dtype, p, c10::cuda::getCurrentCUDAStream()));
  }
  static void forward_projected(DType dtype, const VariantForward& p) {
    C10_CUDA_CHECK(variant_forward_projected(dtype, p, c10::cuda::getCurrentCUDAStream()));
  }
  static void backward_output(DType dtype, const VariantBackward& p) {
    C10_CUDA_CHECK(variant_backward_output(dtype, p, c10::cuda::getCurrentCUDAStream()));
  }
  static void backward(DType dtype, const VariantBackward& p) {
    C10_CUDA_CHECK(variant_backward(dtype, p, c10::cuda::getCurrentCUDAStream()));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(birnn_ext, CUDA, m) {
  m.impl("lstm_variant", lstm_variant<Device>);
  m.impl("lstm_variant_backward", lstm_variant_backward<Device>);
}

}  // namespace birnn::cuda
