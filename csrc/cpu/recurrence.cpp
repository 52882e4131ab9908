#include "recurrence.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "../core/cells.h"
#include "../core/step_order.h"
#include "isa.h"
#include "memory.h"

namespace birnn::cpu {
namespace {

// Enough steps are projected at once to make this many rows. With a single sequence, one step would leave tiles empty.
constexpr int64_t kProjectedRows = 64;

// The backward pass keeps dz of so many steps of sequences, then sums the gradients of the weights and of x from it. So
// dz stays in the L3 cache, and memory does not grow with T. As this fixes the order of summation, it does not depend
// on the number of threads.
constexpr int64_t kSlotsAtOnce = 1024;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The share of n items of one of `count` workers.
struct Share {
  int64_t begin, end;
  Share(int64_t n, int64_t index, int64_t count) : begin(index * n / count), end((index + 1) * n / count) {}
};

// The division of the work: chains are given to teams of threads, and a team works on one chain at a time.
struct Plan {
  std::vector<int64_t> order;  // sequences, longest first
  std::vector<int64_t> rows;   // the same sequences, chain by chain
  std::vector<Chain> chains;
  int64_t teams, team_size;
  std::unique_ptr<Barrier[]> barriers;  // one per team
  Barrier all;
  std::vector<Buffer> scratch;

  Plan(const RecurrenceSizes& sizes, const int64_t* lengths, int64_t threads, const Kernels& kernels, DType dtype) {
    order.resize(sizes.B);
    std::iota(order.begin(), order.end(), 0);
    if (lengths)
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    const int64_t parts = best_parts(sizes, threads, kernels, dtype);
    rows.resize(sizes.B);
    for (int64_t part = 0, next = 0; part < parts; ++part) {
      // With lengths, a part takes every parts-th sequence, so that all parts have about as many steps. Without, it
      // takes neighbours.
      const Share share(sizes.B, part, parts);
      const int64_t rank = lengths ? part : share.begin, step = lengths ? parts : 1, begin = next;
      for (int64_t k = rank; k < (lengths ? sizes.B : share.end); k += step) rows[next++] = order[k];
      for (int64_t direction = 0; direction < sizes.D; ++direction)
        chains.push_back({direction, rows.data() + begin, next - begin, rank, step, nullptr});
    }
    const auto count = static_cast<int64_t>(chains.size());
    team_size = std::max<int64_t>(threads / count, 1);
    teams = std::min(threads / team_size, count);
    barriers = std::make_unique<Barrier[]>(teams);
  }

  // Returns the number of parts that gives the busiest thread the least work, in rows times blocks of units. Threads
  // that share a chain meet at every step, and what a tile costs beside its product falls to each of them. This is the
  // larger, the fewer instructions a product takes, which are H / depth. From H = 32 on, 6 / H is between what was
  // measured for both passes on AVX2, where the depth is 1 (DESIGN.md). Other depths were not timed.
  static int64_t best_parts(const RecurrenceSizes& sizes, int64_t threads, const Kernels& kernels, DType dtype) {
    const int64_t blocks = divide_up(sizes.H, kernels.lanes(dtype));
    const double shared = 1 + 6.0 * static_cast<double>(kernels.depth(dtype)) / static_cast<double>(sizes.H);
    int64_t best = 1;
    double least = 0;
    for (int64_t parts = 1; parts <= std::clamp<int64_t>(sizes.B / kernels.rows, 1, threads); ++parts) {
      const int64_t chains = parts * sizes.D, team = std::max<int64_t>(threads / chains, 1);
      const int64_t turns = divide_up(chains, threads / team), rows = divide_up(sizes.B, parts);
      const double cost = static_cast<double>(turns * rows * divide_up(blocks, team)) * (team > 1 ? shared : 1.0);
      if (parts == 1 || cost < least) best = parts, least = cost;
    }
    return best;
  }

  template <class Bytes>
  void allocate_scratch(const Bytes& bytes) {
    for (Chain& chain : chains) {
      scratch.push_back(allocate(bytes(chain.count)));
      chain.scratch = scratch.back().get();
    }
  }

  // Calls run(chain, member) for the chains of this thread's team; threads without a team come back at once.
  template <class Run>
  void for_each_chain(int64_t thread, const Run& run) {
    const int64_t team = thread / team_size;
    if (team >= teams) return;
    const Member member{thread % team_size, team_size, &barriers[team]};
    for (size_t k = team; k < chains.size(); k += teams) run(chains[k], member);
  }
};

// The packed weights of all directions. Packing is split into blocks, which the threads share.
class Packing {
 public:
  Packing(CellKind cell, DType dtype, const RecurrenceSizes& sizes, const Kernels& kernels)
      : gates_(gates_of(cell)), dtype_(dtype), sizes_(sizes), kernels_(kernels) {
    for (Panels& one : panels) one.not_finite = &not_finite_;
  }

  // w has the weights (gates * H, columns) of each direction.
  void add(const void* const* w, int64_t columns, bool transposed, void* Panels::* member) {
    for (int64_t d = 0; d < sizes_.D; ++d) {
      buffers_.push_back(allocate(kernels_.panel_bytes(dtype_, gates_, sizes_.H, columns, transposed)));
      panels[d].*member = buffers_.back().get();
      const int64_t lanes = kernels_.lanes(dtype_);
      const int64_t blocks = transposed ? divide_up(columns, lanes) : divide_up(sizes_.H, unit_vectors(gates_) * lanes);
      for (int64_t block = 0; block < blocks; ++block)
        tasks_.push_back({w[d], buffers_.back().get(), columns, block, transposed});
    }
  }

  void run(int64_t thread, int64_t threads) const {
    const Share share(static_cast<int64_t>(tasks_.size()), thread, threads);
    for (int64_t k = share.begin; k < share.end; ++k) {
      const Task& task = tasks_[k];
      if (!task.transposed)
        kernels_.pack(dtype_, task.w, gates_, sizes_.H, task.columns, task.block, task.to);
      else if (!kernels_.pack_transposed(dtype_, task.w, gates_, sizes_.H, task.columns, task.block, task.to))
        __atomic_store_n(panels[0].not_finite, true, __ATOMIC_RELAXED);
    }
  }

  Panels panels[2] = {};

 private:
  struct Task {
    const void* w;
    void* to;
    int64_t columns, block;
    bool transposed;
  };
  const int64_t gates_;
  const DType dtype_;
  const RecurrenceSizes& sizes_;
  const Kernels& kernels_;
  std::vector<Buffer> buffers_;
  std::vector<Task> tasks_;
  bool not_finite_ = false;
};

int64_t projected_steps(const Plan& plan, const RecurrenceSizes& sizes) {
  int64_t rows = 1;
  for (const Chain& chain : plan.chains) rows = std::max(rows, chain.count);
  return std::min({divide_up(kProjectedRows, rows), kMostStepsAtOnce, sizes.T});
}

// Tells whether factors are of another type than the tensors. Then weights are always packed.
bool converted(DType dtype) { return dtype != DType::f64 && dtype != DType::f32; }

const void* element(const void* base, int64_t index, int64_t bytes) {
  return static_cast<const char*>(base) + index * bytes;
}

// Returns the first slot (see Slots) of each t, and then the number of slots.
std::vector<int64_t> slot_offsets(const BackwardParams& p, const std::vector<int64_t>& order) {
  std::vector<int64_t> offsets(p.T + 1);
  int64_t active = p.B;
  for (int64_t t = 0; t < p.T; ++t) {
    while (p.lengths && active > 0 && p.lengths[order[active - 1]] <= t) --active;
    offsets[t + 1] = offsets[t] + active;
  }
  return offsets;
}

// The rows of a direction's slots in a round, for the products over them.
struct SlotRows {
  std::vector<const void*> x, h;
  std::vector<void*> dx;
};

// The backward pass of a layer with its input projection. In each round the recurrence runs some iterations and leaves
// dz as factors, and then the products of these are added to the gradients.
class LayerBackward {
 public:
  LayerBackward(CellKind cell, DType dtype, const BackwardParams& p, int64_t threads, Plan& plan,
                const Packing& packing, const Kernels& kernels)
      : cell_(cell),
        dtype_(dtype),
        p_(p),
        plan_(plan),
        packing_(packing),
        kernels_(kernels),
        bytes_(size_of(dtype)),
        zeros_(allocate_zeros(p.H * bytes_)),
        offsets_(slot_offsets(p, plan.order)) {
    const int64_t lanes = kernels.lanes(dtype), blocks = divide_up(p.H, lanes);
    const int64_t panels = divide_up(values_of(cell) * blocks, kTileVectors), row = panels * kTileVectors * lanes;
    const auto allocate_dz = values_of(cell) % kTileVectors ? allocate_zeros : allocate;
    for (int64_t d = 0; d < p.D; ++d) {
      rounds_[d] = rounds(d);
      for (size_t k = 1; k < rounds_[d].size(); ++k)
        capacity_ = std::max(capacity_, slots(d, rounds_[d][k - 1], rounds_[d][k]).count);
    }
    capacity_ = divide_up(capacity_, kernels.rows) * kernels.rows;  // AMX multiplies whole tiles
    tiles_ = kernels.column_tiles(p.input.I, p.H);
    for (int64_t k = 0; k < threads; ++k) scratch_.push_back(allocate(kernels.gradient_scratch(cell, dtype, p.H)));
    for (int64_t d = 0; d < p.D; ++d) {
      rows_[d] = {std::vector<const void*>(capacity_), std::vector<const void*>(capacity_),
                  std::vector<void*>(capacity_)};
      dz_[d] = allocate_dz(capacity_ * row * kernels.factor_bytes(dtype));
      if (p.dw_ih[0]) sums_[d] = allocate(tiles_ * kernels.rows * row * kernels.accumulate_bytes(dtype));
    }
  }

  void run(int64_t steps_at_once, int64_t thread, int64_t threads) {
    void* const scratch = scratch_[thread].get();
    const auto last = static_cast<int64_t>(rounds_[0].size()) - 1;
    for (int64_t round = 0; round < last; ++round) {
      Range range[2];
      for (int64_t d = 0; d < p_.D; ++d) range[d] = slots(d, rounds_[d][round], rounds_[d][round + 1]);
      for (int64_t d = 0; d < p_.D; ++d) find_rows(d, range[d], Share(range[d].count, thread, threads));
      plan_.for_each_chain(thread, [&](const Chain& chain, const Member& member) {
        const int64_t d = chain.direction;
        const Slots to{dz_[d].get(), capacity_, range[d].first, offsets_.data()};
        kernels_.backward(cell_, dtype_, p_, chain, packing_.panels[d], to, steps_at_once, rounds_[d][round],
                          rounds_[d][round + 1], member);
      });
      plan_.all.wait(threads);
      if (p_.dw_ih[0]) {
        const Share share(p_.D * tiles_, thread, threads);
        for (int64_t d = 0; d < p_.D; ++d) {
          const WeightGradient work = weight_gradient(d, share, range[d], round == 0);
          if (work.begin < work.end) kernels_.weight_gradient(dtype_, work, scratch);
        }
      }
      for (int64_t d = 0; p_.dx && d < p_.D; ++d) {
        const int64_t I = p_.input.I;
        void* const* const dx = rows_[d].dx.data();
        if (packing_.panels[d].ih_t) {
          const Share share(divide_up(range[d].count, kernels_.rows), thread, threads);
          kernels_.input_gradient(cell_, dtype_, dz_[d].get(), capacity_, p_.H, I, packing_.panels[d].ih_t,
                                  !*packing_.panels[d].not_finite, dx, share.begin * kernels_.rows,
                                  std::min(share.end * kernels_.rows, range[d].count));
        } else {
          const int64_t columns = kTileVectors * kernels_.lanes(dtype_);
          const Share share(divide_up(I, columns), thread, threads);
          kernels_.input_gradient_unpacked(cell_, dtype_, dz_[d].get(), capacity_, range[d].count, p_.H, I,
                                           p_.input.w_ih[d], dx, share.begin * columns,
                                           std::min(share.end * columns, I));
        }
        plan_.all.wait(threads);  // both directions add to the same dx
      }
      if (!p_.dx && round + 1 < last) plan_.all.wait(threads);  // the next round overwrites dz
    }
    if (p_.dw_ih[0]) {
      const Share share(p_.D * tiles_, thread, threads);
      for (int64_t d = 0; d < p_.D; ++d)
        kernels_.store_weight_gradient(dtype_, weight_gradient(d, share, {0, 0}, false), p_.dw_ih[d], p_.dw_hh[d],
                                       p_.d_bias_ih[d], p_.d_bias_hh[d]);
    }
  }

 private:
  struct Range {
    int64_t first, count;
  };

  // Fills rows_ for this thread's share of a round's slots.
  void find_rows(int64_t d, const Range& range, const Share& share) {
    if (share.begin == share.end) return;
    const StepOrder order{d, p_.T};
    int64_t slot = range.first + share.begin;
    int64_t t = std::upper_bound(offsets_.begin(), offsets_.end(), slot) - offsets_.begin() - 1;
    for (int64_t k = share.begin; k < share.end; ++k, ++slot) {
      while (slot >= offsets_[t + 1]) ++t;
      const int64_t b = plan_.order[slot - offsets_[t]], first = order.first(length_of(p_.lengths, b, p_.T));
      if (p_.dw_ih[0]) {
        rows_[d].x[k] = element(p_.input.x, t * p_.input.stride_t + b * p_.input.stride_b, bytes_);
        rows_[d].h[k] = t != first ? element(p_.y, ((order.before(t) * p_.B + b) * p_.D + d) * p_.H, bytes_)
                        : p_.h0    ? element(p_.h0, (d * p_.B + b) * p_.H, bytes_)
                                   : zeros_.get();
      }
      if (p_.dx) rows_[d].dx[k] = static_cast<char*>(p_.dx) + (t * p_.B + b) * p_.input.I * bytes_;
    }
  }

  // Returns the slots of the iterations begin <= s < end of a direction.
  Range slots(int64_t d, int64_t begin, int64_t end) const {
    if (begin == end) return {0, 0};
    const StepOrder order{d, p_.T};
    const auto [low, high] = std::minmax({order.backward(begin), order.backward(end - 1)});
    return {offsets_[low], offsets_[high + 1] - offsets_[low]};
  }

  // Returns the iterations at which the rounds of a direction begin, and the end. Both directions have the same number
  // of rounds, with about the same number of slots in each. With lengths these differ in iterations, as direction 0
  // begins with few sequences and direction 1 with all.
  std::vector<int64_t> rounds(int64_t d) const {
    const int64_t total = offsets_[p_.T], count = std::clamp<int64_t>(total / kSlotsAtOnce, 1, p_.T);
    std::vector<int64_t> begins = {0};
    for (int64_t round = 1; round < count; ++round) {
      int64_t s = begins.back();
      while (s < p_.T && slots(d, 0, s).count < round * total / count) ++s;
      begins.push_back(s);
    }
    begins.push_back(p_.T);
    return begins;
  }

  WeightGradient weight_gradient(int64_t d, const Share& share, const Range& range, bool overwrite) const {
    return {dz_[d].get(),
            capacity_,
            range.count,
            cell_,
            rows_[d].x.data(),
            rows_[d].h.data(),
            p_.input.I,
            p_.H,
            std::clamp<int64_t>(share.begin - d * tiles_, 0, tiles_),
            std::clamp<int64_t>(share.end - d * tiles_, 0, tiles_),
            sums_[d].get(),
            overwrite};
  }

  const CellKind cell_;
  const DType dtype_;
  const BackwardParams& p_;
  Plan& plan_;
  const Packing& packing_;
  const Kernels& kernels_;
  const int64_t bytes_;  // of an element of a tensor
  const Buffer zeros_;
  const std::vector<int64_t> offsets_;
  SlotRows rows_[2];
  std::vector<int64_t> rounds_[2];
  int64_t capacity_ = 1, tiles_;
  Buffer dz_[2], sums_[2];
  std::vector<Buffer> scratch_;  // one per thread
};

// Calls work(threads) with as many threads as are useful and available.
template <class Work>
void with_threads(const RecurrenceSizes& sizes, int64_t threads, const Kernels& kernels, DType dtype,
                  const Work& work) {
  const int64_t tiles = std::max<int64_t>(sizes.B / kernels.rows, 1), lanes = kernels.lanes(dtype);
  threads = std::clamp<int64_t>(threads, 1, sizes.D * tiles * divide_up(sizes.H, lanes));
  for (int64_t got; (got = work(threads)) < threads;) threads = got;
}

}  // namespace

void recurrence_forward(CellKind cell, DType dtype, const ForwardParams& params, int64_t max_threads,
                        const Parallel& parallel) {
  if (params.B == 0) return;
  const Kernels& kernels = chosen_kernels(dtype);
  Packing packing(cell, dtype, params, kernels);
  if (params.T > 1 || params.h0) packing.add(params.w_hh, params.H, false, &Panels::hh);
  if (!params.gates_x && (params.T * params.B > kMostUnpackedRows || converted(dtype)))
    packing.add(params.input.w_ih, params.input.I, false, &Panels::ih);

  with_threads(params, max_threads, kernels, dtype, [&](int64_t threads) {
    Plan plan(params, params.lengths, threads, kernels, dtype);
    const int64_t steps = projected_steps(plan, params);
    plan.allocate_scratch([&](int64_t rows) { return kernels.forward_scratch(cell, dtype, params, rows, steps); });
    return parallel(threads, [&](int64_t thread) {
      packing.run(thread, threads);
      plan.all.wait(threads);
      plan.for_each_chain(thread, [&](const Chain& chain, const Member& member) {
        kernels.forward(cell, dtype, params, chain, packing.panels[chain.direction], steps, member);
      });
    });
  });
}

void recurrence_backward(CellKind cell, DType dtype, const BackwardParams& params, int64_t max_threads,
                         const Parallel& parallel) {
  if (params.B == 0) return;
  const Kernels& kernels = chosen_kernels(dtype);
  Packing packing(cell, dtype, params, kernels);
  if (params.T > 1 || params.dh0) packing.add(params.w_hh, params.H, true, &Panels::hh_t);
  if (!params.gates) {
    packing.add(params.w_hh, params.H, false, &Panels::hh);
    packing.add(params.input.w_ih, params.input.I, false, &Panels::ih);
  }
  const bool whole_vectors = params.input.I % kernels.lanes(dtype) == 0;
  if (params.dx && (params.T * params.B > kernels.rows || converted(dtype) || !whole_vectors))
    packing.add(params.input.w_ih, params.input.I, true, &Panels::ih_t);

  with_threads(params, max_threads, kernels, dtype, [&](int64_t threads) {
    Plan plan(params, params.lengths, threads, kernels, dtype);
    const int64_t steps = projected_steps(plan, params);
    plan.allocate_scratch([&](int64_t rows) { return kernels.backward_scratch(cell, dtype, params, rows, steps); });
    std::unique_ptr<LayerBackward> layer;
    if (!params.d_gates_x)
      layer = std::make_unique<LayerBackward>(cell, dtype, params, threads, plan, packing, kernels);
    return parallel(threads, [&](int64_t thread) {
      packing.run(thread, threads);
      plan.all.wait(threads);
      if (layer) return layer->run(steps, thread, threads);
      plan.for_each_chain(thread, [&](const Chain& chain, const Member& member) {
        kernels.backward(cell, dtype, params, chain, packing.panels[chain.direction], Slots{}, steps, 0, params.T,
                         member);
      });
    });
  });
}

}  // namespace birnn::cpu
