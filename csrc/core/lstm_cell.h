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

// z -> activated gates (in place); c: c_{t-1} -> c_t (in place); returns h_t.
template <class M, class V>
BIRNN_INLINE V lstm_cell_forward(Gates<V>& gates, V& c) {
  lstm_gates<M>(gates);
  c = gates.f * c + gates.i * gates.g;
  return gates.o * M::tanh(c);
}

// dh: gradient of h_t from all its uses; dc: gradient of c_t from step t+1 -> gradient of c_{t-1} (in place).
// gates are the activations and c, c_prev the cell states that the forward pass saved. Returns dz, the gradient of the
// pre-activations.
template <class M, class V>
BIRNN_INLINE Gates<V> lstm_cell_backward(const Gates<V>& gates, V c, V c_prev, V dh, V& dc) {
  using S = typename M::Scalar;
  const V tanh_c = M::tanh(c);
  dc = dc + dh * gates.o * (S(1) - tanh_c * tanh_c);
  Gates<V> dz;
  dz.i = dc * gates.g * (gates.i * (S(1) - gates.i));
  dz.f = dc * c_prev * (gates.f * (S(1) - gates.f));
  dz.g = dc * gates.i * (S(1) - gates.g * gates.g);
  dz.o = dh * tanh_c * (gates.o * (S(1) - gates.o));
  dc = dc * gates.f;
  return dz;
}

}  // namespace birnn
