// The CPU recurrence, without torch: it packs the weights, splits the work over threads and runs the chosen kernels.
#pragma once

#include <functional>

#include "../core/recurrence.h"

namespace birnn::cpu {

// Runs work(thread) at the same time on `threads` threads, numbered from 0, and returns their number. If there are only
// fewer, it does nothing and returns how many there are, at least one.
using Parallel = std::function<int64_t(int64_t threads, const std::function<void(int64_t thread)>& work)>;

void recurrence_forward(CellKind cell, DType dtype, const ForwardParams& params, int64_t threads,
                        const Parallel& parallel);
void recurrence_backward(CellKind cell, DType dtype, const BackwardParams& params, int64_t threads,
                         const Parallel& parallel);

}  // namespace birnn::cpu
