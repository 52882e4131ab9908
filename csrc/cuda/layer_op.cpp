// lstm_layer on CUDA: PyTorch's matrix products around the recurrence. They read each direction's weights where they
// are, and write into or read from its share of gates_x and d_gates_x. The recurrence adds the biases.
#include <ATen/ops/addmm.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <vector>

#include "../layer_call.h"
#include "recurrence_op.h"

namespace birnn::cuda {
namespace {

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

std::vector<Tensor> each_w_hh(const LayerCall& layer) {
  std::vector<Tensor> w_hh;
  for (int64_t d = 0; d < layer.D; ++d) w_hh.push_back(layer.weights.w_hh(d));
  return w_hh;
}

// A direction's share (T * B, n) of a tensor (T, B, D, n).
Tensor share(const Tensor& t, int64_t d) { return t.flatten(0, 1).select(1, d); }

FiveTensors lstm_layer(const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                       const OptionalTensor& c0, const OptionalTensor& lengths, c10::string_view save) {
  const LayerCall layer(x, {weights, bias});
  const c10::cuda::CUDAGuard guard(x.device());
  const auto [T, B, D, H] = layer.sizes();
  birnn::Forward call(layer.dtype, layer.sizes(), x.options(), h0, c0, lengths, save_named(save));
  layer.point(call.params.w_hh, call.params.input);
  const Tensor rows = x.reshape({T * B, layer.I}), gates_x = at::empty({T, B, D, 4 * H}, x.options());
  for (int64_t d = 0; d < D; ++d) {
    Tensor to = share(gates_x, d);
    at::mm_out(to, rows, layer.weights.w_ih(d).t());
  }
  call.params.gates_x = gates_x.const_data_ptr();
  run(call, each_w_hh(layer), h0, c0, lengths);
  return call.results();
}

// dW_hh = sum over steps of dz_t h_{t-1}^T. dz and y: a direction's shares, 0 beyond a sequence's end; a step is B
// rows.
void w_hh_gradient(Tensor& to, const LayerCall& layer, int64_t d, const Tensor& dz, const Tensor& y,
                   const OptionalTensor& h0, const OptionalTensor& lengths) {
  const int64_t rows = (layer.T - 1) * layer.B;
  at::mm_out(to, dz.narrow(0, d == 0 ? layer.B : 0, rows).t(), y.narrow(0, d == 0 ? 0 : layer.B, rows));
  if (!h0) return;
  Tensor first = dz.narrow(0, d == 0 ? 0 : rows, layer.B);
  if (d == 1 && lengths)  // each sequence begins at its own last step
    first = dz.index_select(0, (*lengths - 1).clamp_min(0) * layer.B + at::arange(layer.B, lengths->options()));
  to.addmm_(first.t(), h0->select(0, d));
}

std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor> lstm_layer_backward(
    const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0, const OptionalTensor& c0,
    const OptionalTensor& lengths, const Tensor& y, const Tensor& gates, const Tensor& cells, const OptionalTensor& dy,
    const OptionalTensor& dh_n, const OptionalTensor& dc_n, bool x_grad, bool weight_grads, bool state_grads) {
  const LayerCall layer(x, {weights, bias});
  const c10::cuda::CUDAGuard guard(x.device());
  const auto [T, B, D, H] = layer.sizes();
  check(y, "y", {T, B, D, H}, x.scalar_type(), x.device());
  check(h0, "h0", {D, B, H}, x.scalar_type(), x.device());
  TORCH_CHECK_VALUE(gates.dim() == 4,
                    "lstm_layer_backward: on CUDA, gates must be those of a forward call with "
                    "save=\"all\", got shape ",
                    gates.sizes());
  birnn::Backward call(layer.dtype, layer.sizes(), x.options(), c0, lengths, gates, cells, dy, dh_n, dc_n, state_grads);
  layer.point(call.params.w_hh, call.params.input);
  call.d_gates_x = at::empty({T, B, D, 4 * H}, x.options());
  call.params.d_gates_x = call.d_gates_x.mutable_data_ptr();
  run(call, each_w_hh(layer), lengths, dh_n, dc_n);

  const Tensor dz = call.d_gates_x.view({T * B, D * 4 * H});
  const auto own = [&](const Tensor& t, int64_t d) { return t.narrow(-1, d * 4 * H, 4 * H); };
  Tensor dx = at::empty(x_grad ? x.sizes() : at::IntArrayRef{0}, x.options());
  for (int64_t d = 0; x_grad && d < D; ++d) {
    Tensor to = dx.view({T * B, layer.I});
    d == 0 ? at::mm_out(to, own(dz, d), layer.weights.w_ih(d))
           : at::addmm_out(to, to, own(dz, d), layer.weights.w_ih(d));
  }
  std::vector<Tensor> d_weights;
  if (!weight_grads) {
    d_weights.assign(weights.size(), at::empty({0}, x.options()));
    return {dx, d_weights, call.dh0, call.dc0};
  }
  // Both directions' dW_ih are one product, and their biases' gradients one sum: parts of one tensor.
  const Tensor d_w_ih = at::mm(dz.t(), without_padding(x, lengths).reshape({T * B, layer.I}));
  const Tensor d_bias_ih = bias ? dz.sum(0) : Tensor(), d_bias_hh = bias ? d_bias_ih.clone() : Tensor();
  // Kernels that torch.compile makes take an operator's results for aligned to 16 bytes.
  const auto aligned = [](const Tensor& t) { return t.storage_offset() * t.element_size() % 16 ? t.clone() : t; };
  for (int64_t d = 0; d < D; ++d) {
    d_weights.push_back(aligned(d_w_ih.narrow(0, d * 4 * H, 4 * H)));
    d_weights.push_back(at::empty({4 * H, H}, x.options()));
    w_hh_gradient(d_weights.back(), layer, d, own(dz, d), share(y, d), h0, lengths);
    if (!bias) continue;
    d_weights.push_back(aligned(own(d_bias_ih, d)));
    d_weights.push_back(aligned(own(d_bias_hh, d)));
  }
  return {dx, d_weights, call.dh0, call.dc0};
}

}  // namespace

TORCH_LIBRARY_IMPL(birnn_ext, CUDA, m) {
  m.impl("lstm_layer", lstm_layer);
  m.impl("lstm_layer_backward", lstm_layer_backward);
}

}  // namespace birnn::cuda
