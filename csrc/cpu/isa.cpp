#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

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
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#endif

namespace {

struct Isa {
  std::string name;
  bool runs;  // on this CPU
  const Kernels* kernels;
  const Kernels* bf16_kernels;
  const Kernels* high_kernels = nullptr;  // for DType::f32_high
  bool (*request)() = nullptr;            // asks the system for permission, which it may refuse
  bool only_if_named = false;             // an older one is faster on this CPU
};

#if defined(__x86_64__)
// Tells whether the CPU and the system have AMX's tiles for bfloat16.
bool has_amx() {
#if BIRNN_EMULATE_AMX
  return true;
#elif defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kSupported = 0x1021, kTileData = 18;  // ARCH_GET_XCOMP_SUPP, XFEATURE_XTILEDATA
  uint64_t features = 0;
  return (d & kBf16) && (d & kTile) && syscall(SYS_arch_prctl, kSupported, &features) == 0 &&
         (features >> kTileData & 1);
#else
  return false;
#endif
}

// Asks the system to let this process use the tiles. Without that the first use would kill the process.
bool request_amx() {
#if defined(__linux__) && !BIRNN_EMULATE_AMX
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return true;
#endif
}
#endif

// The order is from the oldest to the newest.
const std::vector<Isa>& all_isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> isas = {{"generic", true, &generic::kernels, &generic::kernels}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool v4 = v2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = v4 && __builtin_cpu_supports("avx512bf16");
    isas.push_back({"avx2", v2, &avx2::kernels, &avx2::kernels});
    isas.push_back({"avx512", v4, &avx512::kernels, &avx512::kernels});
    // Pairs of bfloat16 gain on AMD's Zen 5 (a recurrence 1.6 to 1.9 times as fast), while a Xeon with AMX took 4.2 ms
    // with them and 3.9 without in a forward pass, and 3.9 against 2.8 in a backward one. A rule decides rather than a
    // measurement at first use, as instruction sets differ in the last bits of results, and two processes on one
    // machine must not.
    isas.push_back({"avx512_bf16", bf16, &avx512::kernels, &avx512_bf16::kernels, nullptr, nullptr,
                    bool(__builtin_cpu_is("intel"))});
    isas.push_back({"amx", bf16 && has_amx(), &avx512::kernels, &amx::kernels, &amx::kernels, request_amx});
#endif
    return isas;
  }();
  return all;
}

const Isa& choose() {
  const char* value = std::getenv("BIRNN_CPU_ISA");
  const std::string wanted = value ? value : "";
  const std::vector<Isa>& isas = all_isas();
  for (auto isa = isas.rbegin(); isa != isas.rend(); ++isa)
    if (isa->runs && (wanted.empty() ? !isa->only_if_named : wanted == isa->name) && (!isa->request || isa->request()))
      return *isa;
  std::string runnable;
  for (const std::string& name : runnable_isas()) runnable += (runnable.empty() ? "" : ", ") + name;
  throw std::runtime_error("BIRNN_CPU_ISA=" + wanted + " is not available: this build and CPU run " + runnable);
}

const Isa& chosen() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : all_isas()) names.push_back(isa.name);
  return names;
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : all_isas())
    if (isa.runs) names.push_back(isa.name);
  return names;
}

const std::string& chosen_isa() { return chosen().name; }

const Kernels& chosen_kernels(DType dtype) {
  const Isa& isa = chosen();
  return dtype == DType::bf16 ? *isa.bf16_kernels : dtype == DType::f32_high ? *isa.high_kernels : *isa.kernels;
}

bool has_high_precision() { return chosen().high_kernels != nullptr; }

}  // namespace birnn::cpu
