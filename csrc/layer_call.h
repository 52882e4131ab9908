// The arguments of lstm_layer, gru_layer and so on that the CPU and CUDA check alike.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "layer_weights.h"
#include "op_common.h"

namespace birnn {

// Checks the arguments of a layer, and keeps them.
struct LayerCall {
  int64_t T, B, I, D, H, rows;  // rows of the weights: gates * H
  DType dtype;
  std::vector<Tensor> tensors;  // the parameters, contiguous
  LayerWeights weights;         // the same

  LayerCall(CellKind cell, const Tensor& x, const LayerWeights& given) {
    TORCH_CHECK_VALUE(x.dim() == 3, name_of(cell), "_layer: x must have shape (T, B, I), got ", x.sizes());
    TORCH_CHECK_VALUE(x.size(0) > 0 && x.size(2) > 0, name_of(cell),
                      "_layer: x must have at least one time step and one feature, got shape ", x.sizes());
    dtype = dtype_of(x, "x");
    given.check_count(cell);
    T = x.size(0), B = x.size(1), I = x.size(2), D = int64_t(given.directions()), H = given.w_hh(0).size(1);
    rows = gates_of(cell) * H;
    for (size_t d = 0; d < given.directions(); ++d) {
      hold(x, given.w_ih(d), "w_ih", {rows, I});
      hold(x, given.w_hh(d), "w_hh", {rows, H});
      if (given.bias) hold(x, given.bias_ih(d), "bias_ih", {rows});
      if (given.bias) hold(x, given.bias_hh(d), "bias_hh", {rows});
    }
    weights = {tensors, given.bias};
  }
  LayerCall(const LayerCall&) = delete;  // weights points into tensors

  RecurrenceSizes sizes() const { return {T, B, D, H}; }

  // Finds where each direction's W_hh and biases are.
  void point(const void* (&w_hh)[2], InputProjection& input) const {
    for (int64_t d = 0; d < D; ++d) {
      w_hh[d] = weights.w_hh(d).const_data_ptr();
      if (!weights.bias) continue;
      input.bias_ih[d] = weights.bias_ih(d).const_data_ptr();
      input.bias_hh[d] = weights.bias_hh(d).const_data_ptr();
    }
  }

 private:
  void hold(const Tensor& x, const Tensor& w, const char* name, at::IntArrayRef shape) {
    check(w, name, shape, x.scalar_type(), x.device());
    tensors.push_back(w.contiguous());
  }
};

}  // namespace birnn
