// The LSTM cell, forward and backward. These equations stand here and nowhere else: every kernel, CPU or CUDA, calls
// them with its own value type V (a scalar on the GPU, a SIMD vector on the CPU) and its own M::sigmoid and M::tanh.
//
// A cell is a type, as Lstm below. What kernels know of it, whatever the cell:
// - A unit has kGates pre-activations, in the order of the rows of W_ih and W_hh. Each has an input part, W_ih x and
// the
//   biases, and a recurrent part, W_hh h. combine() puts both among the kValues values with which the cell begins.
//   Where kAddsParts, each value is the sum of a gate's parts, and a kernel may begin a sum with the one and gather the
//   other; a gate that sees them apart (a GRU's candidate, tanh(input + r * recurrent)) takes a value more.
// - forward() turns these values, in place, into those that the backward pass wants, which is all that is saved of a
// step
//   beside the state: what a unit carries from step to step and keeps in the accumulation type (a GRU's is its h).
// - backward() makes dz, the gradients of the input parts, which go to d_gates_x. recurrent() makes of them the
// gradient
//   of a gate's recurrent part, which is what W_hh^T multiplies: the same where kAddsParts, another for a GRU's
//   candidate.
#pragma once

#include "../inline.h"

namespace birnn {

struct Lstm {
  enum Gate : int { i, f, g, o };  // nn.LSTM's order
  static constexpr int kGates = 4;
  static constexpr int kValues = 4;  // before the cell pre-activations z, after it the activated gates
  static constexpr bool kAddsParts = true;

  template <class V>
  static BIRNN_INLINE void combine(V (&values)[kValues], int gate, V input, V recurrent) {
    values[gate] = input + recurrent;
  }

  // --- all of a step

  // c: c_{t-1} -> c_t (in place); returns h_t.
  template <class M, class V>
  static BIRNN_INLINE V forward(V (&values)[kValues], V& c) {
    activate<M>(values);
    c = state(values, c);
    return output<M>(values, c);
  }

  // dh: gradient of h_t from all its uses; dc: gradient of c_t from step t+1 -> gradient of c_{t-1} (in place).
  // values, c and c_prev are what the forward pass saved.
  template <class M, class V>
  static BIRNN_INLINE void backward(const V (&values)[kValues], V c, V c_prev, V dh, V& dc, V (&dz)[kGates]) {
    V d_o, dc_of_h;
    output_backward<M>(values, c, dh, d_o, dc_of_h);
    dc = dc + dc_of_h;
    state_backward<M>(values, c_prev, d_o, dc, dz);
  }

  // Both parts of a gate have the same gradient.
  template <class V>
  static BIRNN_INLINE V recurrent(const V (&)[kValues], const V (&dz)[kGates], int gate) {
    return dz[gate];
  }

  // --- its parts, between which variants do more

  // z -> activated gates (in place).
  template <class M, class V>
  static BIRNN_INLINE void activate(V (&values)[kValues]) {
    values[i] = M::sigmoid(values[i]);
    values[f] = M::sigmoid(values[f]);
    values[g] = M::tanh(values[g]);
    values[o] = M::sigmoid(values[o]);
  }

  // c_t, of the activated gates and c_{t-1}.
  template <class V>
  static BIRNN_INLINE V state(const V (&values)[kValues], V c_prev) {
    return values[f] * c_prev + values[i] * values[g];
  }

  // h_t, of the gate o and c_t.
  template <class M, class V>
  static BIRNN_INLINE V output(const V (&values)[kValues], V c) {
    return values[o] * M::tanh(c);
  }

  // Of h_t = o tanh(c_t) with gradient dh: the gradients of o and of c_t.
  template <class M, class V>
  static BIRNN_INLINE void output_backward(const V (&values)[kValues], V c, V dh, V& d_o, V& dc) {
    using S = typename M::Scalar;
    const V tanh_c = M::tanh(c);
    d_o = dh * tanh_c;
    dc = dh * values[o] * (S(1) - tanh_c * tanh_c);
  }

  // d_o: gradient of the gate o; dc: gradient of c_t from all its uses -> gradient of c_{t-1} (in place).
  template <class M, class V>
  static BIRNN_INLINE void state_backward(const V (&values)[kValues], V c_prev, V d_o, V& dc, V (&dz)[kGates]) {
    using S = typename M::Scalar;
    dz[i] = dc * values[g] * (values[i] * (S(1) - values[i]));
    dz[f] = dc * c_prev * (values[f] * (S(1) - values[f]));
    dz[g] = dc * values[i] * (S(1) - values[g] * values[g]);
    dz[o] = d_o * (values[o] * (S(1) - values[o]));
    dc = dc * values[f];
  }
};

}  // namespace birnn
