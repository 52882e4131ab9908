// The layers on CUDA: PyTorch's matrix products around the recurrence. They read each direction's weights where they
// are, and write into or read from its share of gates_x and d_gates_x. The recurrence adds the biases.
#include <ATen/ops/addmm.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "../cell_op.h"
#include "../layer_call.h"
#include "recurrence_op.h"

namespace birnn::cuda {
namespace {

std::vector<Tensor> each_w_hh(const LayerCall& layer) {
  std::vector<Tensor> w_hh;
  for (int64_t d = 0; d < layer.D; ++d) w_hh.push_back(layer.weights.w_hh(d));
  return w_hh;
}

// A direction's share (T * B, n) of a tensor (T, B, D, n).
Tensor share(const Tensor& t, int64_t d) { return t.flatten(0, 1).select(1, d); }

// dW_hh = sum over steps of dz_t h_{t-1}^T, for all rows of W_hh or some. dz and y: a direction's shares, 0 beyond a
// sequence's end; a step is B rows.
void w_hh_gradient(Tensor to, const LayerCall& layer, int64_t d, const Tensor& dz, const Tensor& y,
                   const OptionalTensor& h0, const OptionalTensor& lengths) {
  const int64_t rows = (layer.T - 1) * layer.B;
  at::mm_out(to, dz.narrow(0, d == 0 ? layer.B : 0, rows).t(), y.narrow(0, d == 0 ? 0 : layer.B, rows));
  if (!h0) return;
  Tensor first = dz.narrow(0, d == 0 ? 0 : rows, layer.B);
  if (d == 1 && lengths)  // each sequence begins at its own last step
    first = dz.index_select(0, (*lengths - 1).clamp_min(0) * layer.B + at::arange(layer.B, lengths->options()));
  to.addmm_(first.t(), h0->select(0, d));
}

struct Cuda {
  template <class... Arguments>
  static void run(Arguments&&... arguments) {
    cuda::run(arguments...);
  }

  static FiveTensors layer(CellKind cell, const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                           const OptionalTensor& c0, const OptionalTensor& lengths, c10::string_view save) {
    const LayerCall layer(cell, x, {weights, bias});
    const auto [T, B, D, H] = layer.sizes();
    birnn::Forward call(cell, layer.dtype, layer.sizes(), x.options(), h0, c0, lengths, save_named(save));
    layer.point(call.params.w_hh, call.params.input);
    const Tensor rows = x.reshape({T * B, layer.I}), gates_x = at::empty({T, B, D, layer.rows}, x.options());
    for (int64_t d = 0; d < D; ++d) {
      Tensor to = share(gates_x, d);
      at::mm_out(to, rows, layer.weights.w_ih(d).t());
    }
    call.params.gates_x = gates_x.const_data_ptr();
    cuda::run(call, each_w_hh(layer), h0, c0, lengths);
    return call.results();
  }

  static LayerGradients layer_backward(CellKind cell, const Tensor& x, at::TensorList weights, bool bias,
                                       const OptionalTensor& h0, const OptionalTensor& c0,
                                       const OptionalTensor& lengths, const Tensor& y, const Tensor& gates,
                                       const Tensor& cells, const OptionalTensor& dy, const OptionalTensor& dh_n,
                                       const OptionalTensor& dc_n, bool x_grad, bool weight_grads, bool state_grads) {
    const LayerCall layer(cell, x, {weights, bias});
    TORCH_CHECK_VALUE(!saves_values(cell) || gates.dim() == 4, name_of(cell),
                      "_layer_backward: on CUDA, gates must be those of a forward call with save=\"all\", got shape ",
                      gates.sizes());
    birnn::Backward call(cell, layer.dtype, layer.sizes(), x.options(), h0, c0, lengths, y, gates, cells, dy, dh_n,
                         dc_n, state_grads);
    layer.point(call.params.w_hh, call.params.input);
    call.allocate_gradients_of_gates(x.options());
    cuda::run(call, each_w_hh(layer), lengths, dh_n, dc_n);

    Tensor dx = at::empty(x_grad ? x.sizes() : at::IntArrayRef{0}, x.options());
    for (int64_t d = 0; x_grad && d < layer.D; ++d) {
      const Tensor dz = share(call.d_gates_x, d);
      Tensor to = dx.view({layer.T * layer.B, layer.I});
      d == 0 ? at::mm_out(to, dz, layer.weights.w_ih(d)) : at::addmm_out(to, to, dz, layer.weights.w_ih(d));
    }
    std::vector<Tensor> d_weights;
    if (weight_grads)
      d_weights = weight_gradients(call, layer, without_padding(x, lengths), h0, lengths, y);
    else
      d_weights.assign(weights.size(), at::empty({0}, x.options()));
    return {dx, d_weights, call.dh0, call.dc0};
  }

  static std::vector<Tensor> weight_gradients(const birnn::Backward& call, const LayerCall& layer, const Tensor& x,
                                              const OptionalTensor& h0, const OptionalTensor& lengths,
                                              const Tensor& y) {
    // Both directions' dW_ih are one product, and their biases' gradients one sum: parts of one tensor.
    const Tensor dz = call.d_gates_x.flatten(0, 1).flatten(1);  // (T * B, D * gates * H)
    const Tensor d_w_ih = at::mm(dz.t(), x.reshape({layer.T * layer.B, layer.I}));
    const bool bias = layer.weights.bias;
    const int64_t rows = layer.rows, H = layer.H, added = call.d_q.defined() ? rows - H : rows;
    Tensor d_bias_ih, d_bias_hh;
    if (bias) {
      d_bias_ih = dz.sum(0);
      d_bias_hh = d_bias_ih.clone();
      if (call.d_q.defined()) d_bias_hh.view({layer.D, rows}).narrow(1, added, H).copy_(call.d_q.sum({0, 1}));
    }
    const auto own = [&](const Tensor& t, int64_t d) { return t.narrow(0, d * rows, rows); };
    // Kernels that torch.compile makes take an operator's results for aligned to 16 bytes.
    const auto aligned = [](const Tensor& t) { return t.storage_offset() * t.element_size() % 16 ? t.clone() : t; };
    std::vector<Tensor> d_weights;
    for (int64_t d = 0; d < layer.D; ++d) {
      d_weights.push_back(aligned(own(d_w_ih, d)));
      const Tensor d_w_hh = at::empty({rows, H}, y.options());
      d_weights.push_back(d_w_hh);
      const Tensor own_dz = share(call.d_gates_x, d);
      w_hh_gradient(d_w_hh.narrow(0, 0, added), layer, d, own_dz.narrow(1, 0, added), share(y, d), h0, lengths);
      if (call.d_q.defined())
        w_hh_gradient(d_w_hh.narrow(0, added, H), layer, d, share(call.d_q, d), share(y, d), h0, lengths);
      if (!bias) continue;
      d_weights.push_back(aligned(own(d_bias_ih, d)));
      d_weights.push_back(aligned(own(d_bias_hh, d)));
    }
    return d_weights;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(birnn_ext, CUDA, m) { register_cells<Cuda>(m); }

}  // namespace birnn::cuda
