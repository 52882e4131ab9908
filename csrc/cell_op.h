// The operators of each cell for a Device, which has one implementation of all: with a state of h and c, as the LSTM
// has it. The operators of cells whose state is their output, h, are templates of the cell, and their c is h
// (op_common.h). A Device has
//   run(Forward), run(Backward)   run the recurrence
//   layer(), layer_backward()     are lstm_layer and lstm_layer_backward, for any cell
#pragma once

#include <torch/library.h>

#include <string>
#include <vector>

#include "op_common.h"

namespace birnn {

using LayerGradients = std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor>;  // dx, d_weights, dh0, dc0

// Calls f with an object of the type of each cell whose state is its output.
template <class F>
void for_each_h_cell(const F& f) {
  for (const CellKind cell : kCells)
    with_cell(cell, [&](auto of) {
      if constexpr (decltype(of)::kStateIsOutput) f(of);
    });
}

inline ThreeTensors without_c(const FiveTensors& results) {
  const auto& [y, h_n, c_n, gates, cells] = results;
  return {y, h_n, gates};
}

template <class Device>
FiveTensors lstm_recurrence(const Tensor& gates_x, const Tensor& w_hh, const OptionalTensor& h0,
                            const OptionalTensor& c0, const OptionalTensor& lengths, c10::string_view save) {
  Forward call(CellKind::lstm, gates_x, w_hh, std::nullopt, h0, c0, lengths, save_named(save));
  Device::run(call, w_hh, h0, c0, lengths);
  return call.results();
}

template <class Device, CellKind kCell>
ThreeTensors h_recurrence(const Tensor& gates_x, const Tensor& w_hh, const OptionalTensor& bias_hh,
                          const OptionalTensor& h0, const OptionalTensor& lengths, c10::string_view save) {
  Forward call(kCell, gates_x, w_hh, bias_hh, h0, h0, lengths, save_named(save));
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

template <class Device, CellKind kCell>
ThreeTensors h_recurrence_backward(const Tensor& w_hh, const OptionalTensor& h0, const OptionalTensor& lengths,
                                   const Tensor& y, const Tensor& gates, const OptionalTensor& dy,
                                   const OptionalTensor& dh_n, bool state_grads) {
  Backward call(kCell, w_hh, h0, h0, lengths, y, gates, Tensor(), dy, dh_n, std::nullopt, state_grads);
  Device::run(call, w_hh, lengths, dh_n, std::nullopt);
  return {call.d_gates_x, call.d_q.defined() ? call.d_q : at::empty({0}, call.d_gates_x.options()), call.dh0};
}

template <class Device>
FiveTensors lstm_layer(const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                       const OptionalTensor& c0, const OptionalTensor& lengths, c10::string_view save) {
  return Device::layer(CellKind::lstm, x, weights, bias, h0, c0, lengths, save);
}

template <class Device, CellKind kCell>
ThreeTensors h_layer(const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                     const OptionalTensor& lengths, c10::string_view save) {
  return without_c(Device::layer(kCell, x, weights, bias, h0, h0, lengths, save));
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

template <class Device, CellKind kCell>
std::tuple<Tensor, std::vector<Tensor>, Tensor> h_layer_backward(const Tensor& x, at::TensorList weights, bool bias,
                                                                 const OptionalTensor& h0,
                                                                 const OptionalTensor& lengths, const Tensor& y,
                                                                 const Tensor& gates, const OptionalTensor& dy,
                                                                 const OptionalTensor& dh_n, bool x_grad,
                                                                 bool weight_grads, bool state_grads) {
  auto [dx, d_weights, dh0, dc0] = Device::layer_backward(kCell, x, weights, bias, h0, h0, lengths, y, gates, Tensor(),
                                                          dy, dh_n, std::nullopt, x_grad, weight_grads, state_grads);
  return {dx, d_weights, dh0};
}

template <class Device>
void register_cells(torch::Library& m) {
  m.impl("lstm_recurrence", lstm_recurrence<Device>);
  m.impl("lstm_recurrence_backward", lstm_recurrence_backward<Device>);
  m.impl("lstm_layer", lstm_layer<Device>);
  m.impl("lstm_layer_backward", lstm_layer_backward<Device>);
  for_each_h_cell([&](auto of) {
    constexpr CellKind kCell = decltype(of)::kKind;
    const std::string name = name_of(kCell);
    m.impl((name + "_recurrence").c_str(), h_recurrence<Device, kCell>);
    m.impl((name + "_recurrence_backward").c_str(), h_recurrence_backward<Device, kCell>);
    m.impl((name + "_layer").c_str(), h_layer<Device, kCell>);
    m.impl((name + "_layer_backward").c_str(), h_layer_backward<Device, kCell>);
  });
}

}  // namespace birnn
