// The GRU cell, forward and backward; lstm.h tells what a cell is.
#pragma once

#include "../inline.h"
#include "../recurrence.h"

namespace birnn {

// PyTorch's equations: n = tanh(W_in x + b_in + r * q), where q = W_hn h + b_hn; h_t = (1 - z) n + z h_{t-1}.
struct Gru {
  enum Value : int { r, z, n, q };  // the gates are r, z and n, in nn.GRU's order
  static constexpr CellKind kKind = CellKind::gru;
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3;
  static constexpr int kValues = 4;
  static constexpr bool kStateIsOutput = true;
  static constexpr bool kSavesValues = true;

  static BIRNN_INLINE constexpr int input_value(int gate) { return gate; }
  static BIRNN_INLINE constexpr int recurrent_value(int gate) { return gate == n ? q : gate; }

  template <class M, class V>
  static BIRNN_INLINE void activate(V (&values)[kValues]) {
    values[r] = M::sigmoid(values[r]);
    values[z] = M::sigmoid(values[z]);
    values[n] = M::tanh(values[n] + values[r] * values[q]);
  }

  template <class M, class V>
  static BIRNN_INLINE V forward(V (&values)[kValues], V& c) {
    using S = typename M::Scalar;
    activate<M>(values);
    c = (S(1) - values[z]) * values[n] + values[z] * c;
    return c;
  }

  template <class M, class V>
  static BIRNN_INLINE void backward(const V (&values)[kValues], V, V c_prev, V dh, V& dc, V (&dz)[kValues]) {
    using S = typename M::Scalar;
    dh = dh + dc;
    dc = dh * values[z];
    dz[n] = dh * (S(1) - values[z]) * (S(1) - values[n] * values[n]);
    dz[q] = dz[n] * values[r];
    dz[r] = dz[n] * values[q] * (values[r] * (S(1) - values[r]));
    dz[z] = dh * (c_prev - values[n]) * (values[z] * (S(1) - values[z]));
  }
};

}  // namespace birnn
