// Parameters of the recurrence kernels, as raw pointers and sizes: T steps, B sequences, D directions (1 or 2), H
// hidden units, I input features.
//
// Direction 0 runs t = 0 .. T-1, direction 1 runs t = T-1 .. 0. With lengths, sequence b consists of its first
// lengths[b] steps only: direction 1 starts at lengths[b]-1, and steps beyond are skipped.
//
// Shapes are the LSTM's. A GRU has 3H rows of weights, and its state is its output: c0 is h0, c_n is h_n, dc_n and dc0
// are null, no cells are saved, and the backward pass reads y, of type S, as cells. A plain cell has H rows, and no
// gates are saved either.
//
// All tensors are contiguous and distinct, unless strides are given. Element types: S is the tensors' type (double,
// float, half, bfloat16); A is the type in which the kernels accumulate and keep the cell state (double for double,
// else float).
#pragma once

#include <cstdint>
#include <type_traits>

namespace birnn {

// f32_high is float32 whose products keep 16 bits: PyTorch's matmul precision "high" (CPU with AMX).
enum class DType : int { f64, f32, f16, bf16, f32_high };

// Bytes of an element.
constexpr int size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f16 || type == DType::bf16 ? 2 : 4; }

enum class CellKind : int { lstm, gru, rnn_tanh, rnn_relu };  // cells.h

template <class S>
using Accumulate = std::conditional_t<std::is_same_v<S, double>, double, float>;

struct RecurrenceSizes {
  int64_t T, B, D, H;
};

// Parameters of the input projection, where the kernels do it themselves (CPU). Otherwise only its biases are used.
// Weights have an entry per direction.
struct InputProjection {
  const void* x;  // S (T, B, I), element (t, b, k) at t * stride_t + b * stride_b + k; null: no projection
  int64_t I;
  int64_t stride_t, stride_b;  // in elements
  const void* w_ih[2];         // S (4H, I)
  const void* bias_ih[2];      // S (4H), or null: zeros
  const void* bias_hh[2];      // S (4H), or null: zeros
};

struct ForwardParams : RecurrenceSizes {
  InputProjection input;  // x and w_ih are used if gates_x is null
  const void* gates_x;  // S (T, B, D, 4H): input projection, gate order i, f, g, o, with both biases added; for others,
                        // and on CUDA, without those that `input` has
  const void* w_hh[2];  // S (4H, H), one per direction
  const void* h0;       // S (D, B, H), or null: zeros
  const void* c0;       // S (D, B, H), or null: zeros
  const int64_t* lengths;  // (B), each in 0..T, or null: all T
  void* y;                 // S (T, B, D, H): h of every step; 0 beyond a sequence's end
  void* h_n;               // S (D, B, H): h after each sequence's own last step (h0 if it has none)
  void* c_n;               // S (D, B, H): c after that step
  void* gates;             // S (T, B, D, 4H), or null: not wanted; activated gates for the backward pass, 0 beyond ends
  void* cells;             // A (T, B, D, H), or null: not wanted; c of every step, 0 beyond ends
};

struct BackwardParams : RecurrenceSizes {
  const void* w_hh[2];  // these three as in the forward pass
  const void* c0;
  const int64_t* lengths;
  const void* gates;    // saved by the forward pass; null: recomputed from input, h0 and y
  const void* cells;    // saved by the forward pass
  const void* dy;       // S (T, B, D, H), or null: zeros; element (t, b, d, u) at t * dy_stride_t + b * dy_stride_b
  int64_t dy_stride_t;  //   + d * H + u
  int64_t dy_stride_b;
  const void* dh_n;  // S (D, B, H), or null: zeros
  const void* dc_n;  // S (D, B, H), or null: zeros
  void* d_gates_x;   // S (T, B, D, 4H): 0 beyond a sequence's end; null where the gradients below are wanted
  void* d_q;         // S (T, B, D, H), with d_gates_x: gradient of a GRU's q = W_hn h + b_hn; null for the LSTM
  void* dh0;         // S (D, B, H), or null: not wanted
  void* dc0;         // S (D, B, H), or null with dh0

  // A layer with its input projection (CPU) has these gradients in place of d_gates_x.
  InputProjection input;
  const void* h0;      // S (D, B, H), or null: zeros
  const void* y;       // S (T, B, D, H), output of the forward pass
  void* dx;            // S (T, B, I), filled with zeros; or null: not wanted
  void* dw_ih[2];      // S (4H, I), one per direction; or null: not wanted
  void* dw_hh[2];      // S (4H, H), null with dw_ih
  void* d_bias_ih[2];  // S (4H), or null: not wanted
  void* d_bias_hh[2];  // S (4H), or null: not wanted
};

}  // namespace birnn
