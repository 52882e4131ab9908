// A thread does one step of N neighbouring hidden units of one sequence and direction, all gates. N values of type S
// fill 16 bytes where H is a multiple of N and all tensors begin at multiples of 16 bytes; else N is 1. Tensors of type
// A (gates_h, c, cells, dh, dc) then take one or two such accesses.
//
// Memory bounds the time. For each unit and step the forward kernel reads the gates' two parts and c, and writes y, h
// and c and, if they are saved, the cell's values and c once more. The backward kernel reads dy, dh, dc, the saved
// values, c and the c before, and writes dc and the gates' gradients twice: for the next product, and as d_gates_x.
#include <initializer_list>

#include "../../core/cells.h"
#include "../../core/step_order.h"
#include "../cell_math.cuh"
#include "cell_kernels.h"

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

// The place at which a thread works.
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

// Value v of N units, which hold their values side by side.
template <class T, int N, int values, class A>
__device__ void add_value(A (&to)[N][values], int v, const void* base, int64_t offset) {
  A units[N];
  load<T, N>(units, base, offset);
#pragma unroll
  for (int k = 0; k < N; ++k) to[k][v] += units[k];
}

template <class T, int N, int values, class A>
__device__ void store_value(void* base, int64_t offset, const A (&from)[N][values], int v) {
  A units[N];
#pragma unroll
  for (int k = 0; k < N; ++k) units[k] = from[k][v];
  store<T, N>(base, offset, units);
}

template <class Cell, class S, int N>
__global__ void __launch_bounds__(kThreads) forward_kernel(const CellForward p) {
  using A = Accumulate<S>;
  constexpr int kGates = Cell::kGates, kValues = Cell::kValues;
  const auto [d, b, unit, valid] = place<N>(p);
  if (!valid) return;
  const StepOrder order{d, p.T};
  const int64_t t = order.forward(p.s);
  const int64_t state = (d * p.B + b) * p.H + unit;          // in (D, B, H)
  const int64_t gate = (d * p.B + b) * kGates * p.H + unit;  // in (D, B, kGates * H)
  const int64_t row = (t * p.B + b) * p.D + d;               // of (T, B, D)
  A values[N][kValues] = {}, c[N], h[N];
  if (p.lengths && !order.active(t, p.lengths[b])) {
#pragma unroll
    for (int k = 0; k < N; ++k) h[k] = A(0);
    store<S, N>(p.y, row * p.H + unit, h);
#pragma unroll
    for (int v = 0; v < kValues; ++v) store<S, N>(p.gates, (row * kValues + v) * p.H + unit, h);
    store<A, N>(p.cells, row * p.H + unit, h);
    return;
  }
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    add_value<S>(values, Cell::input_value(g), p.gates_x, (row * kGates + g) * p.H + unit);
    add_value<S>(values, Cell::input_value(g), p.input.bias_ih[d], g * p.H + unit);
    add_value<S>(values, Cell::recurrent_value(g), p.input.bias_hh[d], g * p.H + unit);
    add_value<A>(values, Cell::recurrent_value(g), p.gates_h, gate + g * p.H);
  }
  load<A, N>(c, p.c, state);
#pragma unroll
  for (int k = 0; k < N; ++k) h[k] = Cell::template forward<Math<A>>(values[k], c[k]);
  store<A, N>(p.c, state, c);
  store<S, N>(p.h, state, h);
  store<S, N>(p.y, row * p.H + unit, h);
#pragma unroll
  for (int v = 0; v < kValues; ++v) store_value<S>(p.gates, (row * kValues + v) * p.H + unit, values, v);
  store<A, N>(p.cells, row * p.H + unit, c);
}

template <class Cell, class S, int N>
__global__ void __launch_bounds__(kThreads) backward_kernel(const CellBackward p) {
  using A = Accumulate<S>;
  using State = SavedState<Cell, S>;
  constexpr int kGates = Cell::kGates, kValues = Cell::kValues;
  const auto [d, b, unit, valid] = place<N>(p);
  if (!valid) return;
  const StepOrder order{d, p.T};
  const int64_t t = order.backward(p.s), length = length_of(p.lengths, b, p.T);
  const int64_t state = (d * p.B + b) * p.H + unit;
  const int64_t gate = (d * p.B + b) * kGates * p.H + unit;
  const int64_t row = (t * p.B + b) * p.D + d, row_before = (order.before(t) * p.B + b) * p.D + d;
  if (!order.active(t, length)) {
    const A zeros[N] = {};
#pragma unroll
    for (int g = 0; g < kGates; ++g) store<S, N>(p.d_gates_x, (row * kGates + g) * p.H + unit, zeros);
    store<S, N>(p.d_q, row * p.H + unit, zeros);
    return;
  }
  A values[N][kValues] = {}, dz[N][kValues];
  A dh[N], more[N], dc[N], c[N], c_prev[N];
  load<A, N>(dh, p.dh, state);
  load<S, N>(more, p.dy, t * p.dy_stride_t + b * p.dy_stride_b + d * p.H + unit);
#pragma unroll
  for (int k = 0; k < N; ++k) dh[k] += more[k];
  if (t == order.last(length)) {  // dh_n arrives
    load<S, N>(more, p.dh_n, state);
#pragma unroll
    for (int k = 0; k < N; ++k) dh[k] += more[k];
  }
  if (t == order.first(length))
    load<S, N>(c_prev, p.c0, state);
  else
    load<State, N>(c_prev, p.cells, row_before * p.H + unit);
  load<State, N>(c, p.cells, row * p.H + unit);
  load<A, N>(dc, p.dc, state);
#pragma unroll
  for (int v = 0; v < kValues; ++v) add_value<S>(values, v, p.gates, (row * kValues + v) * p.H + unit);
#pragma unroll
  for (int k = 0; k < N; ++k) Cell::template backward<Math<A>>(values[k], c[k], c_prev[k], dh[k], dc[k], dz[k]);
  store<A, N>(p.dc, state, dc);
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    store_value<S>(p.dz, gate + g * p.H, dz, Cell::recurrent_value(g));
    store_value<S>(p.d_gates_x, (row * kGates + g) * p.H + unit, dz, Cell::input_value(g));
  }
  store_value<S>(p.d_q, row * p.H + unit, dz, Cell::recurrent_value(kGates - 1));
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  return true;
}

template <class Cell, class S, int N>
void launch(const CellForward& p, unsigned blocks, cudaStream_t stream) {
  forward_kernel<Cell, S, N><<<blocks, kThreads, 0, stream>>>(p);
}

template <class Cell, class S, int N>
void launch(const CellBackward& p, unsigned blocks, cudaStream_t stream) {
  backward_kernel<Cell, S, N><<<blocks, kThreads, 0, stream>>>(p);
}

template <class Cell, class S, class Params>
cudaError_t launch(const Params& p, bool all_aligned, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(S);
  const bool vector_aligned = all_aligned && p.H % N == 0;
  const int64_t blocks = (p.D * p.B * (vector_aligned ? p.H / N : p.H) + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (vector_aligned)
    launch<Cell, S, N>(p, unsigned(blocks), stream);
  else
    launch<Cell, S, 1>(p, unsigned(blocks), stream);
  return cudaGetLastError();
}

template <class Cell, class Params>
cudaError_t launch(DType dtype, const Params& p, bool all_aligned, cudaStream_t stream) {
  switch (dtype) {
    case DType::f64:
      return launch<Cell, double>(p, all_aligned, stream);
    case DType::f32:
      return launch<Cell, float>(p, all_aligned, stream);
    case DType::f16:
      return launch<Cell, __half>(p, all_aligned, stream);
    case DType::bf16:
      return launch<Cell, __nv_bfloat16>(p, all_aligned, stream);
  }
  return cudaErrorInvalidValue;
}

template <class Params>
cudaError_t launch(CellKind cell, DType dtype, const Params& p, bool all_aligned, cudaStream_t stream) {
  return with_cell(cell, [&](auto of) { return launch<decltype(of)>(dtype, p, all_aligned, stream); });
}

}  // namespace

cudaError_t cell_forward(CellKind cell, DType dtype, const CellForward& p, cudaStream_t stream) {
  const bool all_aligned = aligned({p.gates_x, p.gates_h, p.y, p.h, p.c, p.gates, p.cells}) &&
                           aligned({p.input.bias_ih[0], p.input.bias_ih[1], p.input.bias_hh[0], p.input.bias_hh[1]});
  return launch(cell, dtype, p, all_aligned, stream);
}

cudaError_t cell_backward(CellKind cell, DType dtype, const CellBackward& p, cudaStream_t stream) {
  const bool rows_aligned = (p.dy_stride_t | p.dy_stride_b) * size_of(dtype) % 16 == 0;
  const bool all_aligned = aligned({p.c0, p.gates, p.cells, p.dy, p.dh_n, p.d_gates_x, p.d_q, p.dh, p.dc, p.dz});
  return launch(cell, dtype, p, all_aligned && rows_aligned, stream);
}

}  // namespace birnn::cuda
