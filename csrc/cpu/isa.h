// Which of the compiled kernels this machine runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace birnn::cpu {

// Names of the kernels in this build, the plainest first.
std::vector<std::string> compiled_isas();

// The kernels named by the environment variable BIRNN_CPU_ISA, else the best that the CPU supports. Chosen once per
// process. Throws std::runtime_error if the variable names kernels that are not compiled or that the CPU can't run.
const Kernels& chosen_kernels();

}  // namespace birnn::cpu
