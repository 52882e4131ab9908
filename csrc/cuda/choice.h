// Which algorithm runs a layer: one function of its sizes and the GPU's, free of torch and CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../core/recurrence.h"
#include "persistent_plan.h"

namespace birnn::cuda {

enum class Algorithm : int { stepwise, persistent_cta, persistent_grid, persistent_cluster };
constexpr int kAlgorithms = 4;
constexpr const char* kAlgorithmNames[kAlgorithms] = {"stepwise", "persistent-cta", "persistent-grid",
                                                      "persistent-cluster"};

inline Exchange exchange_of(Algorithm persistent) {
  return persistent == Algorithm::persistent_cta    ? Exchange::cta
         : persistent == Algorithm::persistent_grid ? Exchange::grid
                                                    : Exchange::cluster;
}

struct Gpu {
  int multiprocessors;
  int shared_memory;  // bytes that a CTA may have at most
  int capability;     // 80 for 8.0
};

struct Layer {
  DType dtype;
  int64_t B, D, H;
};

struct Choice {
  Algorithm algorithm;
  int ctas;       // P of a group; 0 for stepwise
  double us;      // what the model below says of a forward step
  bool possible;  // whether this algorithm can run this layer at all
};

// The model: microseconds of a forward step. It has been compared with no GPU; it only ranks the algorithms. Clock
// ticks are taken as 1/1500 us, and tensor cores as an A100's (8 ticks of a scheduler for an mma of either kind).
namespace model {
constexpr double kTicks = 1500;           // in a microsecond
constexpr double kMma = 8;                // ticks of one of four schedulers
constexpr double kBank = 128;             // bytes a tick from shared memory
constexpr double kCells = 900;            // ticks: the cells of a tile, one warp's
constexpr double kBarrier = 0.05;         // us: __syncthreads and what it keeps from overlapping
constexpr double kCluster = 0.8;          // us: stores to distributed shared memory and the cluster's barrier
constexpr double kGrid = 2.5;             // us: write, fence, count, poll and read back through the L2 cache
constexpr double kLaunches = 6;           // us: a GEMM and a cell kernel, one after the other
constexpr double kGemm[2] = {60e6, 8e6};  // multiply-adds in a microsecond: 16 bits, float32
}  // namespace model

inline double persistent_us(const Layer& layer, const Gpu& gpu, Exchange exchange, const ForwardPlan& plan) {
  const int size = layer.dtype == DType::f32 ? 4 : 2;
  const double mma = double(plan.tiles) * 8 * plan.chunks * 2 * (size == 4 ? 3 : 1);
  const double in_memory = std::max(0, plan.warp_chunks - kRegisterChunks) * 4096. * plan.warps();
  const double h = 2. * plan.warps() * plan.warp_chunks * kRows * kChunk;
  const double ticks =
      std::max(mma * model::kMma / std::min(4, plan.warps()), (in_memory + h) / model::kBank) + model::kCells;
  const double handing = exchange == Exchange::cta       ? model::kBarrier
                         : exchange == Exchange::cluster ? model::kCluster
                                                         : model::kGrid;
  const int64_t ctas = layer.D * divide_up(layer.B, kRows) * plan.ctas;
  return double(divide_up(ctas, gpu.multiprocessors)) * (ticks / model::kTicks + handing);
}

// The best way for an algorithm to run a layer. Clusters of more than 8 are at the device's discretion.
inline Choice best_of(Algorithm algorithm, const Layer& layer, const Gpu& gpu, int largest_cluster = kMaxCluster) {
  Choice best{algorithm, 0, 0, false};
  if (algorithm == Algorithm::stepwise) {
    const double products = double(layer.D) * double(layer.B) * 4. * double(layer.H) * double(layer.H);
    const double rate = model::kGemm[layer.dtype == DType::f32 || layer.dtype == DType::f64];
    return {algorithm, 0, model::kLaunches + products / rate * 108 / gpu.multiprocessors, true};
  }
  const Exchange exchange = exchange_of(algorithm);
  const int size = layer.dtype == DType::f32 ? 4 : 2;
  if (layer.dtype == DType::f64 || gpu.capability < 80 || layer.B > (1ll << 30) || layer.H > 1 << 15) return best;
  if (exchange == Exchange::cluster && gpu.capability < 90) return best;
  // A group's CTAs are resident together; in grid those of both directions, as it takes one of each to go on.
  const int most = exchange == Exchange::cta       ? 1
                   : exchange == Exchange::cluster ? largest_cluster
                                                   : gpu.multiprocessors / int(layer.D);
  for (int ctas = 1; ctas <= most; ++ctas) {
    if (ctas_of(layer.H, ctas) != ctas) continue;
    const ForwardPlan forward = forward_plan(size, layer.H, exchange, ctas, gpu.shared_memory);
    if (forward.warps() > kMaxWarps || forward.bytes > gpu.shared_memory) continue;
    const BackwardPlan backward = backward_plan(size, layer.H, exchange, ctas);
    if (backward.bytes > gpu.shared_memory) continue;
    const double us = persistent_us(layer, gpu, exchange, forward);
    if (!best.possible || us < best.us) best = {algorithm, ctas, us, true};
  }
  return best;
}

// The best of the given algorithms; not possible if none of them is.
inline Choice choose(const Layer& layer, const Gpu& gpu,
                     std::initializer_list<Algorithm> among = {Algorithm::stepwise, Algorithm::persistent_cta,
                                                               Algorithm::persistent_grid,
                                                               Algorithm::persistent_cluster}) {
  Choice best{Algorithm::stepwise, 0, 0, false};
  for (const Algorithm algorithm : among) {
    const Choice choice = best_of(algorithm, layer, gpu);
    if (choice.possible && (!best.possible || choice.us < best.us)) best = choice;
  }
  return best;
}

}  // namespace birnn::cuda
