// A thread owns kUnits neighbouring hidden units of one sequence and direction, for all four gates: 16 bytes of every
// tensor of type S when H allows it, else one unit. Memory-bound: per unit and step 4 gates_x + 4 gates_h in, and
// y + h + c (+ 4 gates + c saved) out.
#include <initializer_list>

#include "cell_kernels.h"
#include "cell_math.cuh"

namespace birnn::cuda {
namespace {

constexpr int kThreads = 256;

// N neighbouring values, moved in accesses of 16 bytes where they fill them.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Packet {
  T values[N];
};

// base[offset ..] of type T, as A; zeros if there is no such tensor.
template <class T, int N, class A>
__device__ void load(A (&to)[N], const void* base, int64_t offset) {
  if (!base) {
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = A(0);
    return;
  }
  const auto packet = *reinterpret_cast<const Packet<T, N>*>(static_cast<const T*>(base) + offset);
#pragma unroll
  for (int k = 0; k < N; ++k) to[k] = convert(packet.values[k], A());
}

template <class T, int N, class A>
__device__ void store(void* base, int64_t offset, const A (&from)[N]) {
  if (!base) return;
  Packet<T, N> packet;
#pragma unroll
  for (int k = 0; k < N; ++k) packet.values[k] = convert(from[k], T());
  *reinterpret_cast<Packet<T, N>*>(static_cast<T*>(base) + offset) = packet;
}

// Where a thread works.
struct Place {
  int64_t d, b, unit;
  bool valid;
};

template <int N>
__device__ Place place(const RecurrenceSizes& sizes) {
  const int64_t units = sizes.H / N;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / units;
  return {row / sizes.B, row % sizes.B, index % units * N, row < sizes.D * sizes.B};
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads) forward_kernel(const CellForward p) {
  using A = Accumulate<S>;
  const auto [d, b, unit, valid] = place<N>(p);
  if (!valid) return;
  const int64_t t = d == 0 ? p.s : p.T - 1 - p.s;
  const int64_t state = (d * p.B + b) * p.H + unit;     // in (D, B, H)
  const int64_t gate = (d * p.B + b) * 4 * p.H + unit;  // in (D, B, 4H)
  const int64_t row = (t * p.B + b) * p.D + d;          // of (T, B, D)
  A z[4][N], z_h[N], c[N], h[N];
  if (p.lengths && t >= p.lengths[b]) {
#pragma unroll
    for (int k = 0; k < N; ++k) h[k] = A(0);
    store<S, N>(p.y, row * p.H + unit, h);
#pragma unroll
    for (int g = 0; g < 4; ++g) store<S, N>(p.gates, row * 4 * p.H + g * p.H + unit, h);
    store<A, N>(p.cells, row * p.H + unit, h);
    return;
  }
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    load<S, N>(z[g], p.gates_x, row * 4 * p.H + g * p.H + unit);
    load<A, N>(z_h, p.gates_h, gate + g * p.H);
#pragma unroll
    for (int k = 0; k < N; ++k) z[g][k] += z_h[k];
  }
  load<A, N>(c, p.c, state);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    Gates<A> gates{z[0][k], z[1][k], z[2][k], z[3][k]};
    h[k] = lstm_cell_forward<Math<A>>(gates, c[k]);
    z[0][k] = gates.i;
    z[1][k] = gates.f;
    z[2][k] = gates.g;
    z[3][k] = gates.o;
  }
  store<A, N>(p.c, state, c);
  store<S, N>(p.h, state, h);
  store<S, N>(p.y, row * p.H + unit, h);
#pragma unroll
  for (int g = 0; g < 4; ++g) store<S, N>(p.gates, row * 4 * p.H + g * p.H + unit, z[g]);
  store<A, N>(p.cells, row * p.H + unit, c);
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads) backward_kernel(const CellBackward p) {
  using A = Accumulate<S>;
  const auto [d, b, unit, valid] = place<N>(p);
  if (!valid) return;
  const int64_t t = d == 0 ? p.T - 1 - p.s : p.s;
  const int64_t length = p.lengths ? p.lengths[b] : p.T;
  const int64_t state = (d * p.B + b) * p.H + unit;
  const int64_t gate = (d * p.B + b) * 4 * p.H + unit;
  const int64_t row = (t * p.B + b) * p.D + d;
  A dz[4][N];
  if (t >= length) {
#pragma unroll
    for (int k = 0; k < N; ++k) dz[0][k] = A(0);
#pragma unroll
    for (int g = 0; g < 4; ++g) store<S, N>(p.d_gates_x, row * 4 * p.H + g * p.H + unit, dz[0]);
    return;
  }
  const bool last = t == (d == 0 ? length - 1 : 0);   // the sequence's last step: dh_n arrives
  const bool begin = t == (d == 0 ? 0 : length - 1);  // its first: the cell came from c0
  A dh[N], more[N], dc[N], c[N], c_prev[N];
  load<A, N>(dh, p.dh, state);
  load<S, N>(more, p.dy, row * p.H + unit);
#pragma unroll
  for (int k = 0; k < N; ++k) dh[k] += more[k];
  if (last) {
    load<S, N>(more, p.dh_n, state);
#pragma unroll
    for (int k = 0; k < N; ++k) dh[k] += more[k];
  }
  if (begin)
    load<S, N>(c_prev, p.c0, state);
  else
    load<A, N>(c_prev, p.cells, (d == 0 ? row - p.B * p.D : row + p.B * p.D) * p.H + unit);
  load<A, N>(c, p.cells, row * p.H + unit);
  load<A, N>(dc, p.dc, state);
#pragma unroll
  for (int g = 0; g < 4; ++g) load<S, N>(dz[g], p.gates, row * 4 * p.H + g * p.H + unit);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const Gates<A> gates{dz[0][k], dz[1][k], dz[2][k], dz[3][k]};
    const Gates<A> result = lstm_cell_backward<Math<A>>(gates, c[k], c_prev[k], dh[k], dc[k]);
    dz[0][k] = result.i;
    dz[1][k] = result.f;
    dz[2][k] = result.g;
    dz[3][k] = result.o;
  }
  store<A, N>(p.dc, state, dc);
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    store<S, N>(p.dz, gate + g * p.H, dz[g]);
    store<S, N>(p.d_gates_x, row * 4 * p.H + g * p.H + unit, dz[g]);
  }
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  return true;
}

template <class S, int N>
void launch(const CellForward& p, unsigned blocks, cudaStream_t stream) {
  forward_kernel<S, N><<<blocks, kThreads, 0, stream>>>(p);
}

template <class S, int N>
void launch(const CellBackward& p, unsigned blocks, cudaStream_t stream) {
  backward_kernel<S, N><<<blocks, kThreads, 0, stream>>>(p);
}

template <class S, class Params>
cudaError_t launch(const Params& p, bool all_aligned, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(S);
  const bool wide = all_aligned && p.H % N == 0;
  const int64_t blocks = (p.D * p.B * (wide ? p.H / N : p.H) + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (wide)
    launch<S, N>(p, unsigned(blocks), stream);
  else
    launch<S, 1>(p, unsigned(blocks), stream);
  return cudaGetLastError();
}

template <class Params>
cudaError_t launch(DType dtype, const Params& p, bool all_aligned, cudaStream_t stream) {
  switch (dtype) {
    case DType::f64:
      return launch<double>(p, all_aligned, stream);
    case DType::f32:
      return launch<float>(p, all_aligned, stream);
    case DType::f16:
      return launch<__half>(p, all_aligned, stream);
    case DType::bf16:
      return launch<__nv_bfloat16>(p, all_aligned, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t cell_forward(DType dtype, const CellForward& p, cudaStream_t stream) {
  return launch(dtype, p, aligned({p.gates_x, p.gates_h, p.y, p.h, p.c, p.gates, p.cells}), stream);
}

cudaError_t cell_backward(DType dtype, const CellBackward& p, cudaStream_t stream) {
  return launch(dtype, p, aligned({p.c0, p.gates, p.cells, p.dy, p.dh_n, p.d_gates_x, p.dh, p.dc, p.dz}), stream);
}

}  // namespace birnn::cuda
