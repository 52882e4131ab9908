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
  double us;      // what the model below says of a step forward and one back
  bool possible;  // whether this algorithm can run this layer at all
};

// The model: microseconds of a step forward and a step backward. It has been compared with no GPU; it only ranks the
// algorithms. Clock ticks are taken as 1/1500 us, and tensor cores as an A100's (8 ticks of a scheduler for an mma of
// either kind).
namespace model {
constexpr double kTicks = 1500;           // in a microsecond
constexpr double kMma = 8;                // ticks of one of four schedulers
constexpr double kBank = 128;             // bytes a tick from shared memory
constexpr double kCells = 900;            // ticks: the cells of a tile, one warp's
constexpr double kBarrier = 0.05;         // us: __syncthreads and what it keeps from overlapping
constexpr double kCluster = 0.8;          // us: stores to distributed shared memory and the cluster's barrier
constexpr double kGrid = 2.5;             // us: write, fence, count, poll and read back through the L2 cache
constexpr double kHanded = 64 * kTicks;   // bytes in a us that a CTA sends and receives
constexpr double kLaunches = 6;           // us: a GEMM and a cell kernel, one after the other
constexpr double kGemm[2] = {60e6, 8e6};  // multiply-adds in a microsecond: 16 bits, float32
}  // namespace model

// mma: instructions of the busiest warp; warps share four schedulers. memory: bytes read from shared memory in a step.
inline double step_us(double mma, int warps, double memory, double handing) {
  const double products = mma * double(divide_up(warps, 4)) * model::kMma;
  return (std::max(products, memory / model::kBank) + model::kCells) / model::kTicks + handing;
}

// A step forward and a step backward.
inline double persistent_us(const Layer& layer, const Gpu& gpu, const ForwardPlan& forward,
                            const BackwardPlan& backward) {
  const int terms = layer.dtype == DType::f32 ? 3 : 1;
  const double latency = forward.exchange == Exchange::cta       ? model::kBarrier
                         : forward.exchange == Exchange::cluster ? model::kCluster
                                                                 : model::kGrid;
  const double h = forward.chunks * double(kRows * kChunk);
  const double weights = std::max(0, forward.warp_chunks - kRegisterChunks) * 4096. * forward.warps();
  double us = step_us(forward.warp_chunks * 16. * terms, forward.warps(), 2 * forward.tiles * h + weights,
                      latency + (forward.ctas > 1 ? h / model::kHanded : 0));

  const double items = double(backward.warp_pairs) * backward.chunks;
  const double more_weights = std::max(0., items - kRegisterItems) * 1024. * backward.warps;
  const double parts = 1024. * (backward.pairs + double(backward.ctas) * backward.tiles);  // sent and received
  us += step_us(items * 4. * terms, backward.warps, items * 1024. * backward.warps + more_weights,
                latency + (backward.ctas > 1 ? parts / model::kHanded : 0));

  const int64_t ctas = layer.D * divide_up(layer.B, kRows) * forward.ctas;
  return double(divide_up(ctas, gpu.multiprocessors)) * us;
}

// The best way for an algorithm to run a layer. Clusters of more than 8 are at the device's discretion.
inline Choice best_of(Algorithm algorithm, const Layer& layer, const Gpu& gpu, int largest_cluster = kMaxCluster) {
  Choice best{algorithm, 0, 0, false};
  if (algorithm == Algorithm::stepwise) {
    const double products = double(layer.D) * double(layer.B) * 4. * double(layer.H) * double(layer.H);
    const double rate = model::kGemm[layer.dtype == DType::f32 || layer.dtype == DType::f64];
    return {algorithm, 0, 2 * (model::kLaunches + products / rate * 108 / gpu.multiprocessors), true};
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
    const double us = persistent_us(layer, gpu, forward, backward);
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
