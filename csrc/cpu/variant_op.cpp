// The CPU implementation of lstm_variant. PyTorch multiplies, and the ISA's kernels run the passes over all rows.
#include "../variant_op.h"

#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <torch/library.h>

#include "isa.h"
#include "memory.h"

namespace birnn::cpu {
namespace {

struct Device {
  struct Guard {
    explicit Guard(at::Device) {}
  };
  static void ran(bool forward) { ++(forward ? op_calls.cpu_forward : op_calls.cpu_backward); }

  // Products run in the accumulation type.
  static at::ScalarType operand_type(at::ScalarType type) { return accumulate_type(type); }
  static Tensor multiplied(const Tensor& w) { return w.to(accumulate_type(w.scalar_type())); }
  static void product(Tensor& out, const Tensor& a, const Tensor& b) { at::bmm_out(out, a, b); }

  static Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    const Tensor t = at::empty(sizes, options);
    advise_huge_pages(t.mutable_data_ptr(), static_cast<int64_t>(t.nbytes()));
    return t;
  }

  static void check(const OptionalTensor& lengths, const RecurrenceSizes& sizes) {
    if (lengths) check_lengths(lengths->contiguous().const_data_ptr<int64_t>(), sizes);
  }

  template <class Params>
  static void over_rows(void (*pass)(DType, const Params&, int64_t, int64_t), DType dtype, const Params& p) {
    constexpr int64_t kUnitsOfThread = 2048;  // waking a thread takes as long
    at::parallel_for(0, p.D * p.B, std::max<int64_t>(1, kUnitsOfThread / p.H),
                     [&](int64_t begin, int64_t end) { pass(dtype, p, begin, end); });
  }
  static void forward(DType t, const VariantForward& p) { over_rows(chosen_kernels(t).variant_forward, t, p); }
  static void forward_projected(DType t, const VariantForward& p) {
    over_rows(chosen_kernels(t).variant_forward_projected, t, p);
  }
  static void backward_output(DType t, const VariantBackward& p) {
    over_rows(chosen_kernels(t).variant_backward_output, t, p);
  }
  static void backward(DType t, const VariantBackward& p) { over_rows(chosen_kernels(t).variant_backward, t, p); }
};

}  // namespace

TORCH_LIBRARY_IMPL(birnn_ext, CPU, m) {
  m.impl("lstm_variant", lstm_variant<Device>);
  m.impl("lstm_variant_backward", lstm_variant_backward<Device>);
}

}  // namespace birnn::cpu
