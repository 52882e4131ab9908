// The operators' schemas. cpu/*_op.cpp and cuda/*_op.cpp implement them; birnn_ext/without_kernels.py does so for every
// other device and for fake tensors, and birnn_ext/gradients.py and stack_autograd.cpp have their gradients.
//
// `save` says what an operator keeps for its backward pass, and means the same in all:
//   "none"   nothing: cells, gates, and whatever follows them are empty
//   "cells"  the cell states of all steps, if y does not have them; a layer's backward pass can compute the gates from
//            these, x and y
//   "all"    all that the backward pass reads
#include <torch/library.h>

#include <string>

#include "cell_op.h"

TORCH_LIBRARY(birnn_ext, m) {
  // core/recurrence.h has shapes and meanings.
  m.def(
      "lstm_recurrence(Tensor gates_x, Tensor w_hh, Tensor? h0, Tensor? c0, Tensor? lengths, str save)"
      " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  // state_grads=False leaves dh0 and dc0 empty.
  m.def(
      "lstm_recurrence_backward(Tensor w_hh, Tensor? c0, Tensor? lengths, Tensor gates, Tensor cells, Tensor? dy,"
      " Tensor? dh_n, Tensor? dc_n, bool state_grads) -> (Tensor d_gates_x, Tensor dh0, Tensor dc0)");

  // A layer with its input projection: x (T, B, I), and weights as layer_weights.h orders them. On CUDA its
  // backward pass wants all saved.
  m.def(
      "lstm_layer(Tensor x, Tensor[] weights, bool bias, Tensor? h0, Tensor? c0, Tensor? lengths, str save)"
      " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  // Gradients that are not wanted stay empty.
  m.def(
      "lstm_layer_backward(Tensor x, Tensor[] weights, bool bias, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor y,"
      " Tensor gates, Tensor cells, Tensor? dy, Tensor? dh_n, Tensor? dc_n, bool x_grad, bool weight_grads,"
      " bool state_grads) -> (Tensor dx, Tensor[] d_weights, Tensor dh0, Tensor dc0)");

  // A stack of layers: weights are those of layer 0, then those of layer 1 and so on; h0 and c0 (layers * D, B, H). It
  // calls lstm_layer, and differentiates as one operator. If x has a 16-bit type, it converts weights of others. With
  // last, y is the final layer's output at each sequence's last step, (B, D * H); with two directions h_n and c_n are
  // then empty. recompute: a backward pass computes the gates again.
  m.def(
      "lstm(Tensor x, Tensor[] weights, bool bias, Tensor? h0, Tensor? c0, Tensor? lengths, int layers, bool last,"
      " bool recompute) -> (Tensor y, Tensor h_n, Tensor c_n)");

  // The same of the cells whose state is their output. gates_x is W_ih x + b_ih alone; bias_hh (D, gates * H). Of a GRU
  // (gate order r, z, n), gates (T, B, D, 4H) are r, z, n, and q = W_hn h + b_hn; d_q (T, B, D, H) is the gradient of
  // q, so that W_hh h + b_hh has the gradient (d_gates_x[..., :2H], d_q). Of a plain cell gates and d_q are empty.
  birnn::for_each_h_cell([&](auto of) {
    const auto define = [&](const std::string& of_a_cell) { m.def((decltype(of)::kName + of_a_cell).c_str()); };
    define(
        "_recurrence(Tensor gates_x, Tensor w_hh, Tensor? bias_hh, Tensor? h0, Tensor? lengths, str save)"
        " -> (Tensor y, Tensor h_n, Tensor gates)");
    define(
        "_recurrence_backward(Tensor w_hh, Tensor? h0, Tensor? lengths, Tensor y, Tensor gates, Tensor? dy,"
        " Tensor? dh_n, bool state_grads) -> (Tensor d_gates_x, Tensor d_q, Tensor dh0)");
    define(
        "_layer(Tensor x, Tensor[] weights, bool bias, Tensor? h0, Tensor? lengths, str save)"
        " -> (Tensor y, Tensor h_n, Tensor gates)");
    define(
        "_layer_backward(Tensor x, Tensor[] weights, bool bias, Tensor? h0, Tensor? lengths, Tensor y, Tensor gates,"
        " Tensor? dy, Tensor? dh_n, bool x_grad, bool weight_grads, bool state_grads)"
        " -> (Tensor dx, Tensor[] d_weights, Tensor dh0)");
    define(
        "(Tensor x, Tensor[] weights, bool bias, Tensor? h0, Tensor? lengths, int layers, bool last, bool recompute)"
        " -> (Tensor y, Tensor h_n)");
  });

  // The recurrence of the extended LSTM; core/variant.h has shapes and meanings.
  m.def(
      "lstm_variant(Tensor gates_x, Tensor w_hh, Tensor? w_hr, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? reset,"
      " Tensor? h_mask, Tensor? zoneout_h, Tensor? zoneout_c, float zoneout_h_mean, float zoneout_c_mean,"
      " Tensor? ln_hh, Tensor? ln_c, float eps, str save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor cells,"
      " Tensor gates, Tensor normed, Tensor rstd)");
  // dh0 and dc0 stay empty with state_grads=False, d_products if it equals d_gates_x, and every gradient whose w_hr,
  // ln_hh or ln_c is missing. The caller sums d_ln_hh (D, B, 4H) and d_ln_c (D, B, 2, H) over B.
  m.def(
      "lstm_variant_backward(Tensor w_hh, Tensor? w_hr, Tensor? c0, Tensor? lengths, Tensor? reset, Tensor? h_mask,"
      " Tensor? zoneout_h, Tensor? zoneout_c, float zoneout_h_mean, float zoneout_c_mean, Tensor? ln_hh, Tensor? ln_c,"
      " float eps, Tensor cells, Tensor gates, Tensor normed, Tensor rstd, Tensor? dy, Tensor? dh_n, Tensor? dc_n,"
      " Tensor? d_cells, bool state_grads) -> (Tensor d_gates_x, Tensor d_products, Tensor dh0, Tensor dc0,"
      " Tensor d_projected, Tensor hidden, Tensor d_ln_hh, Tensor d_ln_c)");
}
