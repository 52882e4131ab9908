// The kernels of the `persistent` algorithms (plan.h), free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../../core/recurrence.h"
#include "plan.h"

namespace birnn::cuda {

// Where the CTAs of a grid's group hand things to each other: global memory, one region a group.
struct GridExchange {
  char* buffers;       // [groups][turns][2][bytes]
  unsigned* arrivals;  // [groups][turns], zeros, kCounter bytes apart
  int bytes;           // of a buffer
};

struct PersistentForward : ForwardParams {
  ForwardPlan plan;
  int groups;            // of CTAs, a multiple of D; in grid all are resident, and go through the batch in passes
  int access;            // bytes by which gates_x may be read: 16, 8, 4, or those of an element
  bool weights_aligned;  // rows of w_hh may be read by 8 bytes
  bool full_float32;     // float32: three TF32 products for one of float32 accuracy; else one
  GridExchange grid;     // buffers of h, h_stride() each
};

struct PersistentBackward : BackwardParams {
  BackwardPlan plan;
  int groups;
  int access;  // of gates, cells and dy
  bool full_float32;
  GridExchange grid;  // buffers of parts of sums, [owner][source][tile][eight][lane] x 16 bytes
};

// CTAs of the kernel that a multiprocessor can hold at once (cta, grid), or clusters that the device can (cluster).
// Must have been asked on this device before a launch, as it also allows the kernel what the plan takes.
cudaError_t persistent_resident(DType dtype, const ForwardPlan& plan, int* count);
cudaError_t persistent_resident(DType dtype, const BackwardPlan& plan, int* count);

cudaError_t persistent_forward(DType dtype, const PersistentForward& p, cudaStream_t stream);
cudaError_t persistent_backward(DType dtype, const PersistentBackward& p, cudaStream_t stream);

// The kernel of a row of the table, of each type.
template <class S>
const void* forward_kernel_of(int row);
template <class S>
const void* backward_kernel_of(int row);

}  // namespace birnn::cuda
