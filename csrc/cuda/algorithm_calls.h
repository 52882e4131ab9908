// How often each CUDA algorithm has run in this process, forward and backward together; birnn_ext.op_calls() reads it,
// in a build without CUDA, too.
#pragma once

#include <atomic>

#include "choice.h"

namespace birnn::cuda {

inline std::atomic<int64_t> algorithm_calls[kAlgorithms] = {};

inline void count(Algorithm algorithm) { ++algorithm_calls[int(algorithm)]; }

}  // namespace birnn::cuda
