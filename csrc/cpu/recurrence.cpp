#include "recurrence.h"

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "isa.h"

namespace birnn::cpu {
namespace {

constexpr std::align_val_t kAlign{64};

struct Free {
  void operator()(void* p) const { ::operator delete(p, kAlign); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(int64_t bytes) {
  return Buffer(::operator new(static_cast<size_t>(std::max<int64_t>(bytes, 1)), kAlign));
}

// Sequences, longest first, dealt out to as many chains per direction as keep all threads busy.
struct Chains {
  std::vector<int64_t> rows;
  std::vector<Chain> chains;

  Chains(const RecurrenceSizes& sizes, const int64_t* lengths, int64_t threads) : rows(sizes.B) {
    const int64_t parts = std::clamp<int64_t>((threads + sizes.D - 1) / sizes.D, 1, std::max<int64_t>(sizes.B, 1));
    std::vector<int64_t> order(sizes.B);
    std::iota(order.begin(), order.end(), 0);
    if (lengths)
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    int64_t next = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = next;
      // With lengths every part takes each parts-th sequence, so that all have as many steps to do; without,
      // neighbours.
      if (lengths)
        for (int64_t k = part; k < sizes.B; k += parts) rows[next++] = order[k];
      else
        for (const int64_t end = (part + 1) * sizes.B / parts; next < end; ++next) rows[next] = order[next];
      for (int64_t direction = 0; direction < sizes.D; ++direction)
        chains.push_back({direction, rows.data() + begin, next - begin});
    }
  }
};

// Packs the weights of all directions and runs all chains. state_values: values of scratch per sequence and padded
// unit.
template <class Params>
void run(DType dtype, const Params& params, int64_t state_values, int64_t threads, const ParallelFor& parallel_for,
         const Kernels& kernels, decltype(Kernels::pack_forward) pack,
         void (*run_chain)(DType, const Params&, const Chain&, const void*, void*)) {
  if (params.B == 0) return;
  const int64_t lanes = kernels.lanes(dtype), bytes = kernels.accumulate_bytes(dtype);
  const int64_t blocks = (params.H + lanes - 1) / lanes, padded = blocks * lanes;
  const int64_t panel_bytes = padded * 4 * params.H * bytes;

  const Buffer panels = allocate(params.D * panel_bytes);
  const auto panels_of = [&](int64_t d) { return static_cast<char*>(panels.get()) + d * panel_bytes; };
  const int64_t w_bytes = 4 * params.H * params.H * (dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2);
  parallel_for(params.D * blocks, [&](int64_t task) {
    const int64_t d = task / blocks;
    pack(dtype, static_cast<const char*>(params.w_hh) + d * w_bytes, params.H, task % blocks, panels_of(d));
  });

  const Chains work(params, params.lengths, threads);
  parallel_for(static_cast<int64_t>(work.chains.size()), [&](int64_t task) {
    const Chain& chain = work.chains[task];
    const Buffer scratch = allocate(chain.count * state_values * padded * bytes);
    run_chain(dtype, params, chain, panels_of(chain.direction), scratch.get());
  });
}

}  // namespace

void recurrence_forward(DType dtype, const ForwardParams& params, int64_t threads, const ParallelFor& parallel_for) {
  const Kernels& kernels = chosen_kernels();
  run(dtype, params, /*h twice, c*/ 3, threads, parallel_for, kernels, kernels.pack_forward, kernels.forward);
}

void recurrence_backward(DType dtype, const BackwardParams& params, int64_t threads, const ParallelFor& parallel_for) {
  const Kernels& kernels = chosen_kernels();
  run(dtype, params, /*dz of 4 gates twice, dc*/ 9, threads, parallel_for, kernels, kernels.pack_backward,
      kernels.backward);
}

}  // namespace birnn::cpu
