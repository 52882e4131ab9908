// The CPU recurrence, free of torch: cuts the work into chains and runs them on threads that the caller provides.
#pragma once

#include <functional>

#include "../core/recurrence.h"

namespace birnn::cpu {

// Calls task(0) .. task(n-1), in any order, on any threads, and returns when all are done.
using ParallelFor = std::function<void(int64_t n, const std::function<void(int64_t)>& task)>;

// threads: how many parallel_for will use; results are bitwise the same for any number.
void recurrence_forward(DType dtype, const ForwardParams& params, int64_t threads, const ParallelFor& parallel_for);
void recurrence_backward(DType dtype, const BackwardParams& params, int64_t threads, const ParallelFor& parallel_for);

}  // namespace birnn::cpu
