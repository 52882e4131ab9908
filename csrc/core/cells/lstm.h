// The LSTM cell, forward and backward. The equations stand only here: every kernel, CPU or CUDA, calls them with its
// own value type V (a scalar on the GPU, a SIMD vector on the CPU) and its own M::sigmoid and M::tanh.
//
// A cell is a type such as Lstm below or Gru, which cells.h lists. Its operators' names begin with kName. Kernels use
// the following of it:
// - A unit has kGates pre-activations, in the order of the rows of W_ih and W_hh. Each has an input part, W_ih x and
//   b_ih, and a recurrent part, W_hh h and b_hh, which go to the values input_value(gate) and recurrent_value(gate). If
//   both are one value, it is the sum of the parts, and a kernel may accumulate one onto the other.
// - Of the kValues values, the first kGates are the gates' input parts. The last gates may have recurrent parts of
//   their own behind them, as a GRU's candidate has: tanh(input + r * recurrent). So a GRU has one value more than
//   gates.
// - forward() turns these values, in place, into those that the backward pass needs; activate() does nothing else. A
//   step saves them, if kSavesValues, and the state c, which a unit carries from step to step in the accumulation type.
//   If kStateIsOutput, that is h, and the gradient of h_t comes in two parts, dh and dc.
// - backward() computes dz, the gradients of the kValues values: W_ih^T multiplies those of the input parts, W_hh^T
//   those of the recurrent parts.
#pragma once

#include "../inline.h"
#include "../recurrence.h"

namespace birnn {

struct Lstm {
  enum Gate : int { i, f, g, o };  // nn.LSTM's order
  static constexpr CellKind kKind = CellKind::lstm;
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4;
  static constexpr int kValues = 4;  // pre-activations z before the cell, activated gates after it
  static constexpr bool kStateIsOutput = false;
  static constexpr bool kSavesValues = true;

  static BIRNN_INLINE constexpr int input_value(int gate) { return gate; }
  static BIRNN_INLINE constexpr int recurrent_value(int gate) { return gate; }

  // --- a whole step

  // Turns c from c_{t-1} into c_t; returns h_t.
  template <class M, class V>
  static BIRNN_INLINE V forward(V (&values)[kValues], V& c) {
    activate<M>(values);
    c = state(values, c);
    return output<M>(values, c);
  }

  // dh is the gradient of h_t from all its uses. dc is the gradient of c_t from step t+1, and becomes that of c_{t-1}.
  // The forward pass saved values, c and c_prev.
  template <class M, class V>
  static BIRNN_INLINE void backward(const V (&values)[kValues], V c, V c_prev, V dh, V& dc, V (&dz)[kValues]) {
    V d_o, dc_of_h;
    output_backward<M>(values, c, dh, d_o, dc_of_h);
    dc = dc + dc_of_h;
    state_backward<M>(values, c_prev, d_o, dc, dz);
  }

  // --- its parts, between which the extended LSTM does more

  // Turns pre-activations z into activated gates.
  template <class M, class V>
  static BIRNN_INLINE void activate(V (&values)[kValues]) {
    values[i] = M::sigmoid(values[i]);
    values[f] = M::sigmoid(values[f]);
    values[g] = M::tanh(values[g]);
    values[o] = M::sigmoid(values[o]);
  }

  // Returns c_t from the activated gates and c_{t-1}.
  template <class V>
  static BIRNN_INLINE V state(const V (&values)[kValues], V c_prev) {
    return values[f] * c_prev + values[i] * values[g];
  }

  // Returns h_t from the gate o and c_t.
  template <class M, class V>
  static BIRNN_INLINE V output(const V (&values)[kValues], V c) {
    return values[o] * M::tanh(c);
  }

  // h_t = o tanh(c_t) has the gradient dh; this computes the gradients of o and of c_t.
  template <class M, class V>
  static BIRNN_INLINE void output_backward(const V (&values)[kValues], V c, V dh, V& d_o, V& dc) {
    using S = typename M::Scalar;
    const V tanh_c = M::tanh(c);
    d_o = dh * tanh_c;
    dc = dh * values[o] * (S(1) - tanh_c * tanh_c);
  }

  // d_o is the gradient of the gate o. dc is the gradient of c_t from all its uses, and becomes that of c_{t-1}.
  template <class M, class V>
  static BIRNN_INLINE void state_backward(const V (&values)[kValues], V c_prev, V d_o, V& dc, V (&dz)[kValues]) {
    using S = typename M::Scalar;
    dz[i] = dc * values[g] * (values[i] * (S(1) - values[i]));
    dz[f] = dc * c_prev * (values[f] * (S(1) - values[f]));
    dz[g] = dc * values[i] * (S(1) - values[g] * values[g]);
    dz[o] = d_o * (values[o] * (S(1) - values[o]));
    dc = dc * values[f];
  }
};

}  // namespace birnn
