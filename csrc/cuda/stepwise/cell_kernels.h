// The fused cell kernels of the `stepwise` algorithm, free of torch: one launch does one step of both directions, after
// a GEMM (stepwise_op.cpp) has made W_hh h_{t-1} or W_hh^T dz. Types S and A as in core/recurrence.h.
#pragma once

#include <cuda_runtime_api.h>

#include "../../core/recurrence.h"

namespace birnn::cuda {

// Iteration s (0 .. T-1) of the forward pass: each direction is at its own step (core/step_order.h).
struct CellForward : ForwardParams {
  int64_t s;
  const void* gates_h;  // A (D, B, gates * H): W_hh h_{t-1}, or null: zeros
  void* h;              // S (D, B, H), or null if c is it: h_t is written here; sequences without this step keep theirs
  void* c;              // A (D, B, H): c_{t-1} -> c_t, likewise
};

// Iteration s of the backward pass.
struct CellBackward : BackwardParams {
  int64_t s;
  const void* dh;  // A (D, B, H): W_hh^T dz of the step before, or null: zeros
  void* dc;        // A (D, B, H): gradient of c_t -> of c_{t-1}; sequences without this step keep theirs
  void* dz;        // S (D, B, gates * H): gradient of W_hh h_{t-1}, which for the LSTM is d_gates_x, too; likewise
};

cudaError_t cell_forward(CellKind cell, DType dtype, const CellForward& params, cudaStream_t stream);
cudaError_t cell_backward(CellKind cell, DType dtype, const CellBackward& params, cudaStream_t stream);

}  // namespace birnn::cuda
