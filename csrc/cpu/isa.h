// Chooses among the compiled kernels for the CPU that the process runs on.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace birnn::cpu {

// Returns the names of the instruction sets in this build, from the oldest to the newest.
std::vector<std::string> compiled_isas();

// Returns those that this CPU runs.
std::vector<std::string> runnable_isas();

// Returns the one in use: the environment variable BIRNN_CPU_ISA names it, otherwise it is the newest that runs and is
// not known to be slower than an older one. It is chosen once per process, and always the same on a CPU. Throws
// std::runtime_error if the variable names one that is not compiled or can't run here.
const std::string& chosen_isa();

// Returns its kernels for a type.
const Kernels& chosen_kernels(DType dtype);

// Tells whether it has kernels for DType::f32_high.
bool has_high_precision();

}  // namespace birnn::cpu
