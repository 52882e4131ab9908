// Compares the choice of a plan with all plans that could run a layer, over many layers and GPUs. Each argument is a
// GPU: multiprocessors,bytes,capability. It prints the passes in which the choice is slower than the model's error
// excuses, and those that it leaves although a plan exists; tests/test_cuda_persistent.py runs it.
#include "cuda/choice.h"

#include <cstdio>
#include <utility>

using namespace birnn;
using namespace birnn::cuda;

template <class Plan>
bool is_near_fastest(const Layer& layer, const Gpu& gpu, const Plan& plan, const Candidates<Plan>& all) {
  double fastest = all.front().ticks;
  for (const auto& candidate : all) fastest = std::min(fastest, candidate.ticks);
  const double ticks = all_ticks(layer, gpu, row_of(size_of(layer.dtype), plan).ctas, plan);
  return ticks <= model::kClear * fastest;
}

int main(int count, char** arguments) {
  for (int k = 1; k < count; ++k) {
    Gpu gpu;
    if (std::sscanf(arguments[k], "%d,%d,%d", &gpu.multiprocessors, &gpu.shared_memory, &gpu.capability) != 3) return 2;
    for (const auto& [cell, dtype] : {std::pair{CellKind::lstm, DType::f32},
                                      {CellKind::lstm, DType::f16},
                                      {CellKind::gru, DType::f32},
                                      {CellKind::gru, DType::f16}})
      for (const int64_t D : {1, 2})
        for (const int64_t B : {1, 16, 33, 100, 200, 300, 1000})
          for (int64_t H = 1; H <= 1040; H += 11)
            for (const auto algorithm :
                 {Algorithm::persistent_cta, Algorithm::persistent_grid, Algorithm::persistent_cluster}) {
              const Layer layer{cell, dtype, 1, B, D, H};
              const Choice choice = best_of(algorithm, layer, gpu);
              if (gpu.capability < (algorithm == Algorithm::persistent_cluster ? 90 : 80)) continue;
              const auto forward = forward_candidates(exchange_of(algorithm), layer, gpu);
              const auto backward = backward_candidates(exchange_of(algorithm), layer, gpu);
              const bool right = forward.empty() || backward.empty()
                                     ? !choice.possible
                                     : choice.possible && is_near_fastest(layer, gpu, choice.forward, forward) &&
                                           is_near_fastest(layer, gpu, choice.backward, backward);
              if (!right)
                std::printf("cell %d, %s, %d bytes, H %lld, B %lld, D %lld, %s\n", int(cell),
                            kAlgorithmNames[int(algorithm)], size_of(dtype), (long long)H, (long long)B, (long long)D,
                            arguments[k]);
            }
  }
}
