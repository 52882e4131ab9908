// Which algorithm runs a layer: one function of its sizes and the GPU's, free of torch and CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../core/cells.h"
#include "persistent/plan.h"

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
  CellKind cell;
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

// The model: the time of a step, in clock ticks. Its constants were fitted to ten steps of the kernels' design,
// measured on an H100 (docs/cuda.md): all within 15 %. Other GPUs are taken to take as many ticks, of a slower clock: a
// guess.
namespace model {
constexpr double kMma = 6.1;                       // ticks of one of four schedulers
constexpr double kSharedBytes = 128;               // a tick
constexpr double kOverlap = 1.2;                   // products and shared memory overlap little
constexpr double kOverlapFloat32 = 2;              // with the splitting of float32
constexpr double kForward = 200, kBackward = 580;  // cells, barriers, and what else does not overlap
constexpr double kFloat32 = 400;
constexpr double kCta = 60;                                             // the exchange: a barrier
constexpr double kCluster = 640, kClusterCta = 6, kClusterByte = 0.06;  // of each CTA, of each byte to each CTA
constexpr double kGrid = 3500, kGridBytes = 40;                         // bytes a tick that a CTA fetches
constexpr double kClear = 1.15;                                         // a difference that is more than its error
constexpr double kStepwise = 20 * 1980.;                                // a GEMM and a cell kernel: their launches
constexpr double kGemm[2] = {300e6 / 1980, 25e6 / 1980};                // multiply-adds a tick: 16 bits, float32
inline double ticks_of_us(const Gpu& gpu) { return gpu.capability >= 90 ? 1980 : 1500; }
}  // namespace model

inline double exchange_ticks(Exchange exchange, int ctas, double bytes_to_each, double fetched) {
  return exchange == Exchange::cta ? model::kCta
         : exchange == Exchange::cluster
             ? model::kCluster + ctas * (model::kClusterCta + model::kClusterByte * bytes_to_each)
             : model::kGrid + fetched / model::kGridBytes;
}

// mma: of the busiest warp.
inline double products_ticks(int size, double mma, int warps, double shared_bytes) {
  const double ticks = mma * double(divide_up(warps, 4)) * model::kMma + shared_bytes / model::kSharedBytes;
  return size == 4 ? model::kOverlapFloat32 * ticks + model::kFloat32 : model::kOverlap * ticks;
}

// A step of each of a CTA's groups: with two, one is computed while what the other has sent is under way.
inline double in_turns(int turns, double exchange, double computing) {
  return std::max(turns * computing, computing + exchange);
}

inline double step_ticks(int size, const ForwardPlan& plan) {
  const ForwardRow& row = row_of(size, plan);
  const double mma = 1. * row.tiles() * plan.steps * row.eights * (size == 4 ? 3 : 1);
  const double shared =
      plan.warps * (plan.memory_steps * row.tiles() * double(kFragment) + plan.steps * row.eights * 256.);
  const double own = h_bytes(plan.blocks, row.sequences(), size);
  return in_turns(row.turns, exchange_ticks(plan.exchange, plan.ctas, own, own * plan.ctas),
                  model::kForward + products_ticks(size, mma, plan.warps, shared));
}

inline double step_ticks(int size, const BackwardPlan& plan) {
  const BackwardRow& row = row_of(size, plan);
  const double mma = 1. * row.steps * row.tiles * row.eights * (size == 4 ? 3 : 1);
  const double received = received_bytes(plan.ctas * row.splits, row.own_tiles(size), row.eights);
  const double shared =
      plan.warps * (row.memory_fragments() * double(kFragment) + row.steps * row.eights * 256.) + received;
  return in_turns(row.turns, exchange_ticks(plan.exchange, plan.ctas, received / plan.ctas, received),
                  model::kBackward + products_ticks(size, mma, plan.warps, shared));
}

// Groups of CTAs that run at once, by shared memory and threads alone; clusters leave some multiprocessors idle.
template <class Plan>
int64_t groups_at_once(const Layer& layer, const Gpu& gpu, int ctas_of_multiprocessor, const Plan& plan) {
  const int64_t of_one = std::max(1, std::min(ctas_of_multiprocessor, gpu.shared_memory / std::max(plan.bytes, 1)));
  const int64_t usable =
      plan.exchange == Exchange::cluster && plan.ctas > 8 ? gpu.multiprocessors * 7 / 8 : gpu.multiprocessors;
  const int64_t groups = usable * of_one / plan.ctas;
  return std::max<int64_t>(plan.exchange == Exchange::grid ? groups / layer.D * layer.D : groups, 1);
}

template <class Plan>
double all_ticks(const Layer& layer, const Gpu& gpu, int ctas_of_multiprocessor, const Plan& plan) {
  const int size = size_of(layer.dtype);
  const int64_t groups = layer.D * divide_up(layer.B, row_of(size, plan).batch());
  return double(divide_up(groups, groups_at_once(layer, gpu, ctas_of_multiprocessor, plan))) * step_ticks(size, plan);
}

// Lets every plan pass.
struct AnyPlan {
  template <class Plan>
  bool operator()(const Plan&) const {
    return true;
  }
};

// Types that the persistent kernels are compiled for (kernel() in persistent/launch.cu); any other is stepwise's alone.
constexpr bool is_persistent(DType type) { return type == DType::f32 || type == DType::f16 || type == DType::bf16; }

// Whether a plan can be launched at all. A group's CTAs are resident together; in grid those of both directions, as it
// takes one of each to go on.
template <class Plan>
bool fits_gpu(const Layer& layer, const Gpu& gpu, const Plan& plan) {
  const int most = plan.exchange == Exchange::cta       ? 1
                   : plan.exchange == Exchange::cluster ? kMaxCluster
                                                        : gpu.multiprocessors / int(layer.D);
  return plan.bytes <= gpu.shared_memory && plan.ctas <= most;
}

template <class Plan>
struct Candidate {
  Plan plan;
  double ticks;  // of a step
};

template <class Plan>
using Candidates = std::vector<Candidate<Plan>>;

template <class Plan>
void add_if_fits(Candidates<Plan>& found, const Layer& layer, const Gpu& gpu, const Plan& plan, int ctas) {
  if (fits_gpu(layer, gpu, plan)) found.push_back({plan, all_ticks(layer, gpu, ctas, plan)});
}

// Lists every plan of an exchange that can run the layer forward: rows of the table, with all numbers of blocks.
inline Candidates<ForwardPlan> forward_candidates(Exchange exchange, const Layer& layer, const Gpu& gpu) {
  Candidates<ForwardPlan> found;
  const int size = size_of(layer.dtype);
  for_each_row(size == 2 ? kForwardRows16 : kForwardRows32, size, [&](int k, const ForwardEntry& entry) {
    const ForwardRow& row = entry.row;
    if (entry.exchange != exchange || row.cell != layer.cell) return;
    const int64_t all = divide_up(layer.H, row.blocks() * kBlock);  // shares of blocks, each a warp's or its splits'
    const int most = row.splits == 1 ? row.warps : std::min(row.warps / row.splits, kMaxBarriers - 1);
    for (int shares = 1; shares <= most; ++shares)
      if (divide_up(all, divide_up(all, shares)) == shares)  // otherwise fewer would do, in as many CTAs
        add_if_fits(found, layer, gpu, forward_plan(size, layer.H, k, shares * row.blocks()), row.ctas);
  });
  return found;
}

// Lists every plan of an exchange that can run the layer backward. A row of the table is one plan.
inline Candidates<BackwardPlan> backward_candidates(Exchange exchange, const Layer& layer, const Gpu& gpu) {
  Candidates<BackwardPlan> found;
  const int size = size_of(layer.dtype);
  for_each_row(size == 2 ? kBackwardRows16 : kBackwardRows32, size, [&](int k, const BackwardEntry& entry) {
    if (entry.exchange == exchange && entry.row.cell == layer.cell &&
        divide_up(layer.H, kTile) <= entry.row.most_tiles())
      add_if_fits(found, layer, gpu, backward_plan(size, layer.H, k), entry.row.ctas);
  });
  return found;
}

// Of the candidates that `fits` lets pass, the model can't tell those within kClear from the fastest. This returns the
// one of them with the fewest CTAs a group, which leaves multiprocessors to others.
template <class Plan, class Fits>
std::optional<Candidate<Plan>> pick(Candidates<Plan> all, Fits fits) {
  std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.ticks < b.ticks; });
  std::optional<Candidate<Plan>> fastest, best;
  for (const Candidate<Plan>& candidate : all) {
    if (fastest && candidate.ticks > model::kClear * fastest->ticks) break;
    if ((best && candidate.plan.ctas >= best->plan.ctas) || !fits(candidate.plan)) continue;
    if (!fastest) fastest = candidate;
    best = candidate;
  }
  return best;
}

// The best way for a persistent algorithm to run a layer, of those that `fits` lets pass.
template <class Fits = AnyPlan>
Choice best_of(Algorithm algorithm, const Layer& layer, const Gpu& gpu, Fits fits = {}) {
  Choice best{algorithm};
  if (algorithm == Algorithm::stepwise) {
    const double products = double(layer.D) * double(layer.B) * gates_of(layer.cell) * layer.H * layer.H;
    const double rate = model::kGemm[layer.dtype == DType::f32 || layer.dtype == DType::f64];
    best.possible = true;
    best.us = 2 * std::max(model::kStepwise, products / rate * 132 / gpu.multiprocessors) / model::ticks_of_us(gpu);
    return best;
  }
  const Exchange exchange = exchange_of(algorithm);
  if (!is_persistent(layer.dtype) || gpu.capability < (exchange == Exchange::cluster ? 90 : 80) ||
      layer.T > kMostSteps || layer.B > kMostSequences || layer.H > kMostUnits)
    return best;
  const auto forward = pick(forward_candidates(exchange, layer, gpu), fits);
  const auto backward = pick(backward_candidates(exchange, layer, gpu), fits);
  if (!forward || !backward) return best;
  best.possible = true;
  best.us = (forward->ticks + backward->ticks) / model::ticks_of_us(gpu);
  best.forward = forward->plan;
  best.backward = backward->plan;
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
