// The LSTM cell, forward and backward. These equations stand here and nowhere else: every kernel, CPU or CUDA, calls
// them with its own value type V (a scalar on the GPU, a SIMD vector on the CPU) and its own M::sigmoid and M::tanh.
#pragma once

#if defined(__CUDACC__)
#define BIRNN_INLINE __host__ __device__ __forceinline__
#else
#define BIRNN_INLINE inline __attribute__((always_inline))
#endif

namespace birnn {

// One value per gate, in nn.LSTM's order. Before the cell they are pre-activations z, after it activations.
template <class V>
struct Gates {
  V i, f, g, o;
};

// z -> activated gates (in place).
template <class M, class V>
BIRNN_INLINE void lstm_gates(Gates<V>& gates) {
  gates.i = M::sigmoid(gates.i);
  gates.f = M::sigmoid(gates.f);
  gates.g = M::tanh(gates.g);
  gates.o = M::sigmoid(gates.o);
}

// z -> activated gates (in place); c: c_{t-1} -> c_t (in place).
template <class M, class V>
BIRNN_INLINE void lstm_state(Gates<V>& gates, V& c) {
  lstm_gates<M>(gates);
  c = gates.f * c + gates.i * gates.g;
}

// h_t, of the activated gates and c_t.
template <class M, class V>
BIRNN_INLINE V lstm_output(const Gates<V>& gates, V c) {
  return gates.o * M::tanh(c);
}

// z -> activated gates (in place); c: c_{t-1} -> c_t (in place); returns h_t.
template <class M, class V>
BIRNN_INLINE V lstm_cell_forward(Gates<V>& gates, V& c) {
  lstm_state<M>(gates, c);
  return lstm_output<M>(gates, c);
}

// d_o: gradient of the gate o; dc: gradient of c_t from all its uses -> gradient of c_{t-1} (in place). Returns dz, the
// gradient of the pre-activations.
template <class M, class V>
BIRNN_INLINE Gates<V> lstm_state_backward(const Gates<V>& gates, V c_prev, V d_o, V& dc) {
  using S = typename M::Scalar;
  Gates<V> dz;
  dz.i = dc * gates.g * (gates.i * (S(1) - gates.i));
  dz.f = dc * c_prev * (gates.f * (S(1) - gates.f));
  dz.g = dc * gates.i * (S(1) - gates.g * gates.g);
  dz.o = d_o * (gates.o * (S(1) - gates.o));
  dc = dc * gates.f;
  return dz;
}

// Of h_t = o tanh(c_t) with gradient dh: the gradients of o and of c_t.
template <class M, class V>
BIRNN_INLINE void lstm_output_backward(const Gates<V>& gates, V c, V dh, V& d_o, V& dc) {
  using S = typename M::Scalar;
  const V tanh_c = M::tanh(c);
  d_o = dh * tanh_c;
  dc = dh * gates.o * (S(1) - tanh_c * tanh_c);
}

// dh: gradient of h_t from all its uses; dc: gradient of c_t from step t+1 -> gradient of c_{t-1} (in place).
// gates are the activations and c, c_prev the cell states that the forward pass saved. Returns dz.
template <class M, class V>
BIRNN_INLINE Gates<V> lstm_cell_backward(const Gates<V>& gates, V c, V c_prev, V dh, V& dc) {
  V d_o, dc_of_h;
  lstm_output_backward<M>(gates, c, dh, d_o, dc_of_h);
  dc = dc + dc_of_h;
  return lstm_state_backward<M>(gates, c_prev, d_o, dc);
}

}  // namespace birnn
