// The CUDA implementation of the operators, algorithm `stepwise`: T times one batched GEMM for both directions and one
// fused cell kernel. Serves every size and type; launches only, so it can be captured into a CUDA graph.
#include <ATen/TensorOperators.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../op_common.h"
#include "cell_kernels.h"

namespace birnn::cuda {
namespace {

// The weights as product() takes them: before compute capability 8.0 no bfloat16 product has a float32 result.
Tensor multiplied(const Tensor& w) {
  const bool widen = w.scalar_type() == at::kBFloat16 && at::cuda::getCurrentDeviceProperties()->major < 8;
  return widen ? w.to(at::kFloat) : w;
}

// out = a b. 16-bit products go to a float32 out unrounded.
void product(Tensor& out, const Tensor& a, const Tensor& b) {
  if (out.scalar_type() == b.scalar_type())
    at::bmm_out(out, a.to(b.scalar_type()), b);
  else
    at::bmm_out(out, a, b, out.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_recurrence(const Tensor& gates_x, const Tensor& w_hh,
                                                                   const OptionalTensor& h0, const OptionalTensor& c0,
                                                                   const OptionalTensor& lengths, bool save) {
  birnn::Forward call(gates_x, w_hh, h0, c0, lengths, save);
  const c10::cuda::CUDAGuard guard(gates_x.device());
  const auto [T, B, D, H] = static_cast<const RecurrenceSizes&>(call.params);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto accumulate = gates_x.options().dtype(accumulate_type(gates_x.scalar_type()));

  if (lengths)  // checked on the device: no wait for it
    at::_assert_async(((*lengths >= 0) & (*lengths <= T)).all(), "lstm_recurrence: lengths must be between 0 and T");

  // h_n is the running state; so is c_n, unless the cell state is kept in a wider type.
  h0 ? call.h_n.copy_(*h0) : call.h_n.zero_();
  c0 ? call.c_n.copy_(*c0) : call.c_n.zero_();
  Tensor c = call.c_n.to(accumulate);
  Tensor gates_h = at::empty({D, B, 4 * H}, accumulate);
  const Tensor w_hh_t = multiplied(w_hh).transpose(1, 2);

  CellForward step{call.params};
  step.h = call.h_n.mutable_data_ptr();
  step.c = c.mutable_data_ptr();
  for (step.s = 0; step.s < T; ++step.s) {
    if (step.s > 0 || h0) {
      product(gates_h, call.h_n, w_hh_t);
      step.gates_h = gates_h.const_data_ptr();
    }
    C10_CUDA_CHECK(cell_forward(call.dtype, step, stream));
  }
  if (!c.is_same(call.c_n)) call.c_n.copy_(c);
  ++op_calls.cuda_forward;
  return call.results();
}

std::tuple<Tensor, Tensor, Tensor> lstm_recurrence_backward(const Tensor& w_hh, const OptionalTensor& c0,
                                                            const OptionalTensor& lengths, const Tensor& gates,
                                                            const Tensor& cells, const OptionalTensor& dy,
                                                            const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                                            bool state_grads) {
  birnn::Backward call(w_hh, c0, lengths, gates, cells, dy, dh_n, dc_n, state_grads);
  const c10::cuda::CUDAGuard guard(gates.device());
  const auto [T, B, D, H] = static_cast<const RecurrenceSizes&>(call.params);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto accumulate = cells.options();

  const Tensor w = multiplied(w_hh);
  Tensor dh = at::empty({D, B, H}, accumulate);
  Tensor dc = at::zeros({D, B, H}, accumulate);
  if (dc_n) dc.copy_(*dc_n);
  Tensor dz = at::zeros({D, B, 4 * H}, gates.options());  // sequences that begin later have had no dz yet

  CellBackward step{call.params};
  step.dc = dc.mutable_data_ptr();
  step.dz = dz.mutable_data_ptr();
  for (step.s = 0; step.s < T; ++step.s) {
    if (step.s > 0) {
      product(dh, dz, w);
      step.dh = dh.const_data_ptr();
    }
    C10_CUDA_CHECK(cell_backward(call.dtype, step, stream));
  }
  if (state_grads) {
    at::bmm_out(call.dh0, dz, w_hh);
    // a sequence without steps hands its gradient through
    if (lengths && dh_n) call.dh0.add_(*dh_n * (*lengths == 0).unsqueeze(-1));
    call.dc0.copy_(dc);
  }
  ++op_calls.cuda_backward;
  return call.results();
}

}  // namespace

TORCH_LIBRARY_IMPL(birnn_ext, CUDA, m) {
  m.impl("lstm_recurrence", lstm_recurrence);
  m.impl("lstm_recurrence_backward", lstm_recurrence_backward);
}

}  // namespace birnn::cuda
