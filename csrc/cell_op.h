// The operators of each cell for a Device, which has one implementation of all: with a state of h and c, as the LSTM
// has it. A GRU's c is its h (op_common.h). A Device has
//   run(Forward), run(Backward)   run the recurrence
//   layer(), layer_backward()     are lstm_layer and lstm_layer_backward, for any cell
#pragma once

#include <torch/library.h>

#include <vector>

#include "op_common.h"

namespace birnn {

using LayerGradients = std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor>;  // dx, d_weights, dh0, dc0

inline FourTensors without_c(const FiveTensors& results) {
  const auto& [y, h_n, c_n, gates, cells] = results;
  return {y, h_n, gates, cells};
}

template <class Device>
FiveTensors lstm_recurrence(const Tensor& gates_x, const Tensor& w_hh, const OptionalTensor& h0,
                            const OptionalTensor& c0, const OptionalTensor& lengths, c10::string_view save) {
  Forward call(CellKind::lstm, gates_x, w_hh, std::nullopt, h0, c0, lengths, save_named(save));
  Device::run(call, w_hh, h0, c0, lengths);
  return call.results();
}

template <class Device>
FourTensors gru_recurrence(const Tensor& gates_x, const Tensor& w_hh, const OptionalTensor& bias_hh,
                           const OptionalTensor& h0, const OptionalTensor& lengths, c10::string_view save) {
  Forward call(CellKind::gru, gates_x, w_hh, bias_hh, h0, h0, lengths, save_named(save));
  Device::run(call, w_hh, h0, h0, lengths);
  return without_c(call.results());
}

template <class Device>
ThreeTensors lstm_recurrence_backward(const Tensor& w_hh, const OptionalTensor& c0, const OptionalTensor& lengths,
                                      const Tensor& gates, const Tensor& cells, const OptionalTensor& dy,
                                      const OptionalTensor& dh_n, const OptionalTensor& dc_n, bool state_grads) {
  Backward call(CellKind::lstm, w_hh, std::nullopt, c0, lengths, std::nullopt, gates, cells, dy, dh_n, dc_n,
                state_grads);
  Device::run(call, w_hh, lengths, dh_n, dc_n);
  return {call.d_gates_x, call.dh0, call.dc0};
}

template <class Device>
ThreeTensors gru_recurrence_backward(const Tensor& w_hh, const OptionalTensor& h0, const OptionalTensor& lengths,
                                     const Tensor& y, const Tensor& gates, const Tensor& cells,
                                     const OptionalTensor& dy, const OptionalTensor& dh_n, bool state_grads) {
  Backward call(CellKind::gru, w_hh, h0, h0, lengths, y, gates, cells, dy, dh_n, std::nullopt, state_grads);
  Device::run(call, w_hh, lengths, dh_n, std::nullopt);
  return {call.d_gates_x, call.d_q, call.dh0};
}

template <class Device>
FiveTensors lstm_layer(const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                       const OptionalTensor& c0, const OptionalTensor& lengths, c10::string_view save) {
  return Device::layer(CellKind::lstm, x, weights, bias, h0, c0, lengths, save);
}

template <class Device>
FourTensors gru_layer(const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                      const OptionalTensor& lengths, c10::string_view save) {
  return without_c(Device::layer(CellKind::gru, x, weights, bias, h0, h0, lengths, save));
}

template <class Device>
LayerGradients lstm_layer_backward(const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                                   const OptionalTensor& c0, const OptionalTensor& lengths, const Tensor& y,
                                   const Tensor& gates, const Tensor& cells, const OptionalTensor& dy,
                                   const OptionalTensor& dh_n, const OptionalTensor& dc_n, bool x_grad,
                                   bool weight_grads, bool state_grads) {
  return Device::layer_backward(CellKind::lstm, x, weights, bias, h0, c0, lengths, y, gates, cells, dy, dh_n, dc_n,
                                x_grad, weight_grads, state_grads);
}

template <class Device>
std::tuple<Tensor, std::vector<Tensor>, Tensor> gru_layer_backward(const Tensor& x, at::TensorList weights, bool bias,
                                                                   const OptionalTensor& h0,
                                                                   const OptionalTensor& lengths, const Tensor& y,
                                                                   const Tensor& gates, const Tensor& cells,
                                                                   const OptionalTensor& dy, const OptionalTensor& dh_n,
                                                                   bool x_grad, bool weight_grads, bool state_grads) {
  auto [dx, d_weights, dh0, dc0] =
      Device::layer_backward(CellKind::gru, x, weights, bias, h0, h0, lengths, y, gates, cells, dy, dh_n, std::nullopt,
                             x_grad, weight_grads, state_grads);
  return {dx, d_weights, dh0};
}

template <class Device>
void register_cells(torch::Library& m) {
  m.impl("lstm_recurrence", lstm_recurrence<Device>);
  m.impl("lstm_recurrence_backward", lstm_recurrence_backward<Device>);
  m.impl("lstm_layer", lstm_layer<Device>);
  m.impl("lstm_layer_backward", lstm_layer_backward<Device>);
  m.impl("gru_recurrence", gru_recurrence<Device>);
  m.impl("gru_recurrence_backward", gru_recurrence_backward<Device>);
  m.impl("gru_layer", gru_layer<Device>);
  m.impl("gru_layer_backward", gru_layer_backward<Device>);
}

}  // namespace birnn
