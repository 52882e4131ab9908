// Which of the compiled kernels this machine runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace birnn::cpu {

// Names of the instruction sets in this build, the plainest first.
std::vector<std::string> compiled_isas();

// Those that this CPU runs.
std::vector<std::string> runnable_isas();

// The one in use: named by the environment variable BIRNN_CPU_ISA, else the best that runs. Chosen once per process.
// Throws std::runtime_error if the variable names one that is not compiled or that the CPU can't run.
const std::string& chosen_isa();

// Its kernels for a type.
const Kernels& chosen_kernels(DType dtype);

// Whether it has kernels for DType::f32_high.
bool has_high_precision();

}  // namespace birnn::cpu
