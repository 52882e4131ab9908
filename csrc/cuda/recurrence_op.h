// Runs a recurrence on CUDA, for the operators: by the algorithm that suits the layer and the GPU, on the current
// stream.
#pragma once

#include "../op_common.h"

namespace birnn::cuda {

// The caller has set all of call.params. w_hh: (D, gates * H, H), or (gates * H, H) of each direction.
void run(birnn::Forward& call, at::TensorList w_hh, const OptionalTensor& h0, const OptionalTensor& c0,
         const OptionalTensor& lengths);
void run(birnn::Backward& call, at::TensorList w_hh, const OptionalTensor& lengths, const OptionalTensor& dh_n,
         const OptionalTensor& dc_n);

}  // namespace birnn::cuda
