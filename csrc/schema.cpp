// The operators' schemas. cpu/*_op.cpp and cuda/*_op.cpp implement them; birnn_ext/without_kernels.py does so for every
// other device and for fake tensors, and birnn_ext/gradients.py and stack_autograd.cpp have their gradients.
//
// `save` says what an operator keeps for its backward pass, and means the same in all:
//   "none"   nothing: cells, gates, and whatever follows them are empty
//   "cells"  the cell states of all steps; a layer's backward pass can compute the gates from them, x and y
//   "all"    all that the backward pass reads
#include <torch/library.h>

TORCH_LIBRARY(birnn_ext, m) {
  // core/recurrence.h has shapes and meanings.
  m.def(
      "lstm_recurrence(Tensor gates_x, Tensor w_hh, Tensor? h0, Tensor? c0, Tensor? lengths, str save)"
      " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  // state_grads=False leaves dh0 and dc0 empty.
  m.def(
      "lstm_recurrence_backward(Tensor w_hh, Tensor? c0, Tensor? lengths, Tensor gates, Tensor cells, Tensor? dy,"
      " Tensor? dh_n, Tensor? dc_n, bool state_grads) -> (Tensor d_gates_x, Tensor dh0, Tensor dc0)");

  // gates_x (T, B, D, 3H): W_ih x + b_ih alone, gate order r, z, n; bias_hh (D, 3H). gates (T, B, D, 4H): r, z, n, and
  // q = W_hn h + b_hn. cells are h before it is rounded, so they are empty if y has their type.
  m.def(
      "gru_recurrence(Tensor gates_x, Tensor w_hh, Tensor? bias_hh, Tensor? h0, Tensor? lengths, str save)"
      " -> (Tensor y, Tensor h_n, Tensor gates, Tensor cells)");
  // d_q (T, B, D, H): W_hh h + b_hh has the gradient (d_gates_x[..., :2H], d_q).
  m.def(
      "gru_recurrence_backward(Tensor w_hh, Tensor? h0, Tensor? lengths, Tensor y, Tensor gates, Tensor cells,"
      " Tensor? dy, Tensor? dh_n, bool state_grads) -> (Tensor d_gates_x, Tensor d_q, Tensor dh0)");

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
  m.def(
      "gru_layer(Tensor x, Tensor[] weights, bool bias, Tensor? h0, Tensor? lengths, str save)"
      " -> (Tensor y, Tensor h_n, Tensor gates, Tensor cells)");
  m.def(
      "gru_layer_backward(Tensor x, Tensor[] weights, bool bias, Tensor? h0, Tensor? lengths, Tensor y, Tensor gates,"
      " Tensor cells, Tensor? dy, Tensor? dh_n, bool x_grad, bool weight_grads, bool state_grads)"
      " -> (Tensor dx, Tensor[] d_weights, Tensor dh0)");

  // A stack of layers: weights are those of layer 0, then those of layer 1 and so on; h0 and c0 (layers * D, B, H). It
  // calls lstm_layer, and differentiates as one operator. If x has a 16-bit type, it converts weights of others. With
  // last, y is the final layer's output at each sequence's last step, (B, D * H); with two directions h_n and c_n are
  // then empty. recompute: a backward pass computes the gates again.
  m.def(
      "lstm(Tensor x, Tensor[] weights, bool bias, Tensor? h0, Tensor? c0, Tensor? lengths, int layers, bool last,"
      " bool recompute) -> (Tensor y, Tensor h_n, Tensor c_n)");
  m.def(
      "gru(Tensor x, Tensor[] weights, bool bias, Tensor? h0, Tensor? lengths, int layers, bool last, bool recompute)"
      " -> (Tensor y, Tensor h_n)");

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
