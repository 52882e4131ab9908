#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace birnn::cpu {

namespace generic {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct Compiled {
  const Kernels* kernels;
  bool supported;  // by this CPU
};

// The plainest first, the best last.
std::vector<Compiled> all_compiled() {
  std::vector<Compiled> all = {{&generic::kernels, true}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool v4 = v2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  all.push_back({&avx2::kernels, v2});
  all.push_back({&avx512::kernels, v4});
#endif
  return all;
}

const Kernels& choose() {
  const char* wanted = std::getenv("BIRNN_CPU_ISA");
  const Kernels* best = nullptr;
  std::string runnable;
  for (const Compiled& one : all_compiled()) {
    if (!one.supported) continue;
    if (wanted && *wanted && std::string(wanted) == one.kernels->isa) return *one.kernels;
    best = one.kernels;
    runnable += (runnable.empty() ? "" : ", ") + std::string(one.kernels->isa);
  }
  if (wanted && *wanted)
    throw std::runtime_error("BIRNN_CPU_ISA=" + std::string(wanted) + " is not available: this build and CPU run " +
                             runnable);
  return *best;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Compiled& one : all_compiled()) names.push_back(one.kernels->isa);
  return names;
}

const Kernels& chosen_kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace birnn::cpu
