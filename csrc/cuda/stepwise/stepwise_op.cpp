#include "stepwise_op.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>

#include "cell_kernels.h"
#include "product.h"

namespace birnn::cuda {

void stepwise_forward(birnn::Forward& call, const Tensor& w_hh, const OptionalTensor& h0, const OptionalTensor& c0,
                      cudaStream_t stream) {
  const auto [T, B, D, H] = static_cast<const RecurrenceSizes&>(call.params);
  const auto accumulate = call.y.options().dtype(accumulate_type(call.y.scalar_type()));
  // h_n is the running state; so is c_n, unless the cell state is kept in a wider type.
  h0 ? call.h_n.copy_(*h0) : call.h_n.zero_();
  c0 ? call.c_n.copy_(*c0) : call.c_n.zero_();
  Tensor c = call.c_n.to(accumulate);
  Tensor gates_h = at::empty({D, B, gates_of(call.cell) * H}, accumulate);
  const Tensor w_hh_t = multiplied(w_hh).transpose(1, 2);

  CellForward step{call.params};
  step.h = c.is_same(call.h_n) ? nullptr : call.h_n.mutable_data_ptr();
  step.c = c.mutable_data_ptr();
  for (step.s = 0; step.s < T; ++step.s) {
    if (step.s > 0 || h0) {
      product(gates_h, call.h_n, w_hh_t);
      step.gates_h = gates_h.const_data_ptr();
    }
    C10_CUDA_CHECK(cell_forward(call.cell, call.dtype, step, stream));
  }
  if (!c.is_same(call.c_n)) call.c_n.copy_(c);
}

void stepwise_backward(birnn::Backward& call, const Tensor& w_hh, const OptionalTensor& lengths,
                       const OptionalTensor& dh_n, const OptionalTensor& dc_n, cudaStream_t stream) {
  const auto [T, B, D, H] = static_cast<const RecurrenceSizes&>(call.params);
  const auto options = call.d_gates_x.options();
  const auto accumulate = options.dtype(accumulate_type(call.d_gates_x.scalar_type()));
  const Tensor w = multiplied(w_hh);
  Tensor dh = at::empty({D, B, H}, accumulate);
  Tensor dc = at::zeros({D, B, H}, accumulate);
  if (dc_n) dc.copy_(*dc_n);
  Tensor dz = at::zeros({D, B, gates_of(call.cell) * H}, options);  // sequences that begin later have had no dz yet

  CellBackward step{call.params};
  step.dc = dc.mutable_data_ptr();
  step.dz = dz.mutable_data_ptr();
  for (step.s = 0; step.s < T; ++step.s) {
    if (step.s > 0) {
      product(dh, dz, w);
      step.dh = dh.const_data_ptr();
    }
    C10_CUDA_CHECK(cell_backward(call.cell, call.dtype, step, stream));
  }
  if (call.params.dh0) {
    at::bmm_out(call.dh0, dz, w_hh);
    // a sequence without steps hands its gradient through
    if (lengths && dh_n) call.dh0.add_(*dh_n * (*lengths == 0).unsqueeze(-1));
    state_is_output(call.cell) ? call.dh0.add_(dc) : call.dc0.copy_(dc);
  }
}

}  // namespace birnn::cuda
