// The parameters of a layer in one list, as lstm_layer takes them and returns their gradients: those of direction 0,
// then those of direction 1, each w_ih (4H, I), w_hh (4H, H) and, if there are biases, bias_ih and bias_hh (4H); other
// cells have gates * H for 4H.
// birnn_ext.layer.LayerWeights makes the list.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <c10/util/Exception.h>

#include <optional>
#include <vector>

#include "op_common.h"

namespace birnn {

// Returns x (T, B, I) with zeros beyond the sequences' ends: what lies there must not reach the weights' gradients.
inline at::Tensor without_padding(const at::Tensor& x, const std::optional<at::Tensor>& lengths) {
  if (!lengths) return x;
  return x.masked_fill((at::arange(x.size(0), lengths->options()).unsqueeze(1) >= *lengths).unsqueeze(-1), 0);
}

struct LayerWeights {
  at::TensorList tensors;
  bool bias;

  size_t per_direction() const { return bias ? 4 : 2; }
  size_t directions() const { return tensors.size() / per_direction(); }

  const at::Tensor& w_ih(size_t d) const { return tensors[d * per_direction()]; }
  const at::Tensor& w_hh(size_t d) const { return tensors[d * per_direction() + 1]; }
  const at::Tensor& bias_ih(size_t d) const { return tensors[d * per_direction() + 2]; }
  const at::Tensor& bias_hh(size_t d) const { return tensors[d * per_direction() + 3]; }

  // Checks that there are the parameters of one or two directions, and that H can be read from them.
  void check_count(CellKind cell) const {
    const size_t count = tensors.size(), stride = per_direction();
    TORCH_CHECK_VALUE(count == stride || count == 2 * stride, name_of(cell), "_layer: weights must be ", stride, " or ",
                      2 * stride, " tensors, got ", count);
    TORCH_CHECK_VALUE(w_hh(0).dim() == 2 && w_hh(0).size(1) > 0, name_of(cell), "_layer: w_hh must have shape (",
                      gates_of(cell), "H, H), got ", w_hh(0).sizes());
  }
};

}  // namespace birnn
