// The plain cell, forward and backward; lstm.h tells what a cell is.
#pragma once

#include "../inline.h"
#include "../recurrence.h"

namespace birnn {

// PyTorch's equation: h_t = f(W_ih x + b_ih + W_hh h_{t-1} + b_hh), where f is tanh or relu.
template <CellKind kCell>
struct Rnn {
  static constexpr CellKind kKind = kCell;
  static constexpr const char* kName = kCell == CellKind::rnn_tanh ? "rnn_tanh" : "rnn_relu";
  static constexpr int kGates = 1;
  static constexpr int kValues = 1;
  static constexpr bool kStateIsOutput = true;
  static constexpr bool kSavesValues = false;

  static BIRNN_INLINE constexpr int input_value(int gate) { return gate; }
  static BIRNN_INLINE constexpr int recurrent_value(int gate) { return gate; }

  template <class M, class V>
  static BIRNN_INLINE void activate(V (&values)[kValues]) {
    if constexpr (kCell == CellKind::rnn_tanh)
      values[0] = M::tanh(values[0]);
    else
      values[0] = values[0] < V{} ? V{} : values[0];  // a NaN stays one, as in torch.relu
  }

  template <class M, class V>
  static BIRNN_INLINE V forward(V (&values)[kValues], V& c) {
    activate<M>(values);
    c = values[0];
    return c;
  }

  template <class M, class V>
  static BIRNN_INLINE void backward(const V (&)[kValues], V c, V, V dh, V& dc, V (&dz)[kValues]) {
    dh = dh + dc;
    dc = V{};
    if constexpr (kCell == CellKind::rnn_tanh)
      dz[0] = dh * (typename M::Scalar(1) - c * c);
    else
      dz[0] = c <= V{} ? V{} : dh;
  }
};

}  // namespace birnn
