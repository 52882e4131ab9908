// The operators' schemas. Implementations: cpu/recurrence_op.cpp, cuda/recurrence_op.cpp; for every other device, and
// for fake tensors and autograd: birnn_ext/ops.py.
#include <torch/library.h>

TORCH_LIBRARY(birnn_ext, m) {
  // Shapes and meanings: core/recurrence.h. save=False leaves gates and cells empty.
  m.def(
      "lstm_recurrence(Tensor gates_x, Tensor w_hh, Tensor? h0, Tensor? c0, Tensor? lengths, bool save)"
      " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  // state_grads=False leaves dh0 and dc0 empty.
  m.def(
      "lstm_recurrence_backward(Tensor w_hh, Tensor? c0, Tensor? lengths, Tensor gates, Tensor cells, Tensor? dy,"
      " Tensor? dh_n, Tensor? dc_n, bool state_grads) -> (Tensor d_gates_x, Tensor dh0, Tensor dc0)");
}
