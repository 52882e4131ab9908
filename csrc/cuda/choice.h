// Which algorithm runs a layer: one function of its sizes and the GPU's, free of torch and CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../core/recurrence.h"
#include "persistent_plan.h"

namespace birnn::cuda {

enum class Algorithm : int { stepwise, persistent_cta, persistent_grid, persistent_cluster };
constexpr int kAlgorithms = 4;
constexpr const char* kAlgorithmNames[kAlgorithms] = {"stepwise", "persistent-cta", "persistent-grid",
                                                      "persistent-cluster"};

inline std::vector<Algorithm> all_algorithms() {
  std::vector<Algorithm> all;
  for (int k = 0; k < kAlgorithms; ++k) all.push_back(Algorithm(k));
  return all;
}

inline std::optional<Algorithm> algorithm_named(const std::string& name) {
  for (int k = 0; k < kAlgorithms; ++k)
    if (name == kAlgorithmNames[k]) return Algorithm(k);
  return std::nullopt;
}

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
  int64_t T, B, D, H;
};

struct Choice {
  Algorithm algorithm;
  bool possible;        // whether this algorithm can run this layer at all
  double us;            // what the model below says of a step forward and one back
  ForwardPlan forward;  // persistent
  BackwardPlan backward;
};

// The model: microseconds of a step forward and a step backward, as an eager call takes them. It only ranks the
// algorithms. Its constants are fitted to what one card was measured to take, an H100 at 1.98 GHz
// (benchmarks/results/cuda_h100.json, and steps of single kernels), and are right within 30 % there, as a root of mean
// squares. Other cards are taken to differ in their number of multiprocessors alone, as clocks hardly do.
namespace model {
constexpr double kTicks = 1980;          // in a microsecond
constexpr double kMma = 38;              // ticks of one of four schedulers, with all that goes with an mma
constexpr double kBank = 128;            // bytes a tick from shared memory
constexpr double kCells = 2000;          // ticks: the cells of a tile, one warp's
constexpr double kBarrier = 2.0;         // us: __syncthreads and what it keeps from overlapping
constexpr double kCluster = 3.2;         // us: stores to distributed shared memory and the cluster's barrier
constexpr double kGrid = 2.3;            // us: write, fence, count, poll and read back through the L2 cache
constexpr double kHandedCluster = 9500;  // bytes in a us that a CTA sends and receives
constexpr double kHandedGrid = 5400;     // the same
constexpr int kGpc = 18;                 // multiprocessors that a cluster can't reach beyond: 7 of 16 CTAs run at once
constexpr double kLaunches = 20;         // us of the host: a GEMM and a cell kernel
constexpr double kGemm[2] = {270e6, 14e6};  // multiply-adds in a microsecond on 132 multiprocessors: 16 bits, float32
}  // namespace model

// mma: instructions of the busiest warp; warps share four schedulers. memory: bytes read from shared memory in a step.
inline double step_us(double mma, int warps, double memory, double handing) {
  const double products = mma * double(divide_up(warps, 4)) * model::kMma;
  return (std::max(products, memory / model::kBank) + model::kCells) / model::kTicks + handing;
}

// Bytes that a CTA reads from shared memory for the products of a step: h or dz, which each warp reads for itself, and
// the weights that are not in registers.
inline double memory_of(const ForwardPlan& plan) {
  const double h = plan.chunks * double(kRows * kChunk);
  return 2 * plan.tiles * h + std::max(0, plan.warp_chunks - kRegisterChunks) * 4096. * plan.warps();
}
inline double memory_of(const BackwardPlan& plan) {
  const double items = double(plan.warp_pairs) * plan.chunks;
  return (items + std::max(0., items - kRegisterItems)) * 1024. * plan.warps;
}

inline double latency_of(Exchange exchange) {
  return exchange == Exchange::cta ? model::kBarrier : exchange == Exchange::cluster ? model::kCluster : model::kGrid;
}

// Groups of CTAs that run at once, a CTA to a multiprocessor.
inline int64_t groups_at_once(const Layer& layer, const Gpu& gpu, const ForwardPlan& plan) {
  if (plan.exchange == Exchange::cluster)
    return std::max(gpu.multiprocessors / model::kGpc * (model::kGpc / plan.ctas), 1);
  const int64_t groups = gpu.multiprocessors / plan.ctas;
  return std::max<int64_t>(plan.exchange == Exchange::grid ? groups / layer.D * layer.D : groups, 1);
}

// A step forward and a step backward.
inline double persistent_us(const Layer& layer, const Gpu& gpu, const ForwardPlan& forward,
                            const BackwardPlan& backward) {
  const int terms = layer.dtype == DType::f32 ? 3 : 1;
  const double latency = latency_of(forward.exchange);
  const double handed = forward.exchange == Exchange::grid ? model::kHandedGrid : model::kHandedCluster;
  const double h = forward.chunks * double(kRows * kChunk);
  const double parts = 1024. * (backward.pairs + double(backward.ctas) * backward.tiles);  // sent and received
  double us = step_us(forward.warp_chunks * 16. * terms, forward.warps(), memory_of(forward),
                      latency + (forward.ctas > 1 ? h / handed : 0));
  us += step_us(backward.warp_pairs * 4. * backward.chunks * terms, backward.warps, memory_of(backward),
                latency + (backward.ctas > 1 ? parts / handed : 0));

  const int64_t groups = layer.D * divide_up(layer.B, kRows);
  return double(divide_up(groups, groups_at_once(layer, gpu, forward))) * us;
}

// Lets every plan pass.
struct AnyPlan {
  bool operator()(const Choice&) const { return true; }
};

// Types that the persistent kernels are compiled for (kernel() in persistent_*.cu); any other is stepwise's alone.
constexpr bool is_persistent(DType type) { return type == DType::f32 || type == DType::f16 || type == DType::bf16; }

// The best way for an algorithm to run a layer, of those that `fits` lets pass.
template <class Fits = AnyPlan>
Choice best_of(Algorithm algorithm, const Layer& layer, const Gpu& gpu, Fits fits = {}) {
  Choice best{algorithm};
  if (algorithm == Algorithm::stepwise) {
    // the choice depends on the batch only as far as the number of groups does
    const double products = double(layer.D) * double(divide_up(layer.B, kRows) * kRows) * 4. * layer.H * layer.H;
    const double rate = model::kGemm[layer.dtype == DType::f32 || layer.dtype == DType::f64];
    best.possible = true;
    best.us = 2 * (model::kLaunches + products / rate * 132 / gpu.multiprocessors);
    return best;
  }
  const Exchange exchange = exchange_of(algorithm);
  if (!is_persistent(layer.dtype) || gpu.capability < 80 || layer.T > kMostSteps || layer.B > kMostSequences ||
      layer.H > kMostUnits)
    return best;
  if (exchange == Exchange::cluster && gpu.capability < 90) return best;
  // A group's CTAs are resident together; in grid those of both directions, as it takes one of each to go on.
  const int most = exchange == Exchange::cta       ? 1
                   : exchange == Exchange::cluster ? kMaxCluster
                                                   : gpu.multiprocessors / int(layer.D);
  for (int ctas = 1; ctas <= most; ++ctas) {
    if (ctas_of(layer.H, ctas) != ctas) continue;
    const int size = size_of(layer.dtype);
    Choice choice{algorithm, true};
    choice.forward = forward_plan(size, layer.H, exchange, ctas, gpu.shared_memory);
    choice.backward = backward_plan(size, layer.H, exchange, ctas);
    if (choice.forward.warps() > kMaxWarps || choice.forward.bytes > gpu.shared_memory) continue;
    if (choice.backward.bytes > gpu.shared_memory) continue;
    choice.us = persistent_us(layer, gpu, choice.forward, choice.backward);
    if ((!best.possible || choice.us < best.us) && fits(choice)) best = choice;
  }
  return best;
}

// The best of several algorithms; not possible if none of them is.
template <class Fits = AnyPlan>
Choice choose(const Layer& layer, const Gpu& gpu, const std::vector<Algorithm>& among, Fits fits = {}) {
  Choice best{};
  for (const Algorithm algorithm : among) {
    const Choice choice = best_of(algorithm, layer, gpu, fits);
    if (choice.possible && (!best.possible || choice.us < best.us)) best = choice;
  }
  return best;
}

}  // namespace birnn::cuda
