// The kernels of the `persistent` algorithm (persistent_plan.h), free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/recurrence.h"
#include "persistent_plan.h"

namespace birnn::cuda {

struct PersistentForward : ForwardParams {
  ForwardPlan plan;
  int groups;          // a multiple of D; in grid, where all are resident at once, they take the batch in turns
  bool wide;           // rows and addresses are multiples of 16 bytes
  bool exact;          // float32: three TF32 products for one of float32 accuracy; else one
  void* handed;        // grid: S [groups][2][16][chunks * 64 bytes], h on its way
  unsigned* arrivals;  // grid: [groups], zeros, kCounter bytes apart
};

struct PersistentBackward : BackwardParams {
  BackwardPlan plan;
  int groups;
  bool wide;
  bool exact;
  float* handed;       // grid: [groups][2][pairs][P][2][32][4], parts of sums on their way
  unsigned* arrivals;  // grid: [groups], zeros, kCounter bytes apart
};

// CTAs of the kernel that a multiprocessor can hold at once (cta, grid), or clusters that the device can (cluster).
// Must have been asked on this device before a launch, as it also allows the kernel what the plan takes.
cudaError_t persistent_resident(DType dtype, const ForwardPlan& plan, int* count);
cudaError_t persistent_resident(DType dtype, const BackwardPlan& plan, int* count);

cudaError_t persistent_forward(DType dtype, const PersistentForward& p, cudaStream_t stream);
cudaError_t persistent_backward(DType dtype, const PersistentBackward& p, cudaStream_t stream);

}  // namespace birnn::cuda
