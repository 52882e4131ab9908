// The CPU kernels, compiled once per ISA. A kernels_<isa>.cpp sets the compiler's target, defines BIRNN_ISA
// (namespace), BIRNN_ISA_BYTES (vector size) and BIRNN_ISA_ROWS (rows of a register tile), and includes this file. With
// BIRNN_ISA_BF16 it multiplies bfloat16 (with BIRNN_ISA_AMX, on AMX's tiles) and holds the kernels for bfloat16 only.
//
// A chain (one direction of some sequences) goes through all its time steps without waiting for another. If there are
// fewer chains than threads, several threads share a chain: each has its own hidden units, and they meet once per step.
//
// A step multiplies (rows x H) * (H x gates H), cut into register tiles of kRows sequences x some vectors. The cell
// update follows at once, so pre-activations never leave the L1 cache. In the forward pass the vectors are the gates of
// the same units (4 for the LSTM; of a plain cell, 4 neighbouring vectors of units). In the backward pass, (rows x
// gates H) * (gates H x H), they are kTileVectors neighbouring vectors of units. Blocks of units are the outer loop, so
// that a panel of packed weights (H x 4 vectors) stays in the L1 cache while all rows use it.
//
// Only the products are compiled for each size of a tile, and all cells share them (multiply_rows). What comes before
// and after them takes most of the compiler's time, and loops over the rows.
//
// Every tile sums in the order of k, so results do not depend on how the work is split.

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "../core/cells.h"
#include "../core/step_order.h"
#include "../core/variant_row.h"
#include "kernels.h"

#ifndef BIRNN_ISA_BF16
#define BIRNN_ISA_BF16 0
#endif
#ifndef BIRNN_ISA_AMX
#define BIRNN_ISA_AMX 0
#endif
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace birnn::cpu::BIRNN_ISA {
namespace {

constexpr int kBytes = BIRNN_ISA_BYTES;
constexpr int kRows = BIRNN_ISA_ROWS;

#include "simd.h"

// Vanishing gradients fill the backward pass with denormals, on which arithmetic is 10-100 times slower.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040); }  // FTZ, DAZ
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t(1) << 24)));  // FZ
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  FlushDenormals() {}
#endif
};

// clang-format off: each file uses the one before
#include "tiles.h"
#include "forward.h"
#include "backward.h"
#include "variant.h"
#include "gradients.h"
// clang-format on

// --- the table -------------------------------------------------------------------------------------------------------

template <class F>
void with_storage(DType dtype, const F& f) {
#if BIRNN_ISA_BF16
  if (dtype == DType::bf16) f(bfloat16());
#if BIRNN_ISA_AMX
  if (dtype == DType::f32_high) f(split_float());
#endif
#else
  switch (dtype) {
    case DType::f64:
      return f(double());
    case DType::f32:
      return f(float());
    case DType::f16:
      return f(float16());
    case DType::bf16:
      return f(bfloat16());
    case DType::f32_high:
      return;  // AMX's alone
  }
#endif
}

// The same, with the cell's type, for the few functions that depend on it.
template <class F>
void with_cell(CellKind cell, DType dtype, const F& f) {
  with_storage(dtype, [&]<class S>(S type) { birnn::with_cell(cell, [&](auto of) { f(of, type); }); });
}

int64_t lanes(DType dtype) { return dtype == DType::f64 ? kLanes<double> : kLanes<float>; }

int64_t depth(DType dtype) {
  int64_t depth = 0;
  with_storage(dtype, [&]<class S>(S) { depth = kStep<S>; });
  return depth;
}

int64_t accumulate_bytes(DType dtype) { return dtype == DType::f64 ? sizeof(double) : sizeof(float); }

int64_t factor_bytes(DType dtype) {
  int64_t bytes = 0;
  with_storage(dtype, [&]<class S>(S) { bytes = kPlanes<S> * sizeof(Factor<S>); });
  return bytes;
}

int64_t panel_bytes(DType dtype, int64_t gates, int64_t H, int64_t columns, bool transposed) {
  int64_t bytes = 0;
  with_storage(dtype, [&]<class S>(S) {
    constexpr int64_t L = kLanes<Accumulate<S>>;
    bytes = (transposed ? transposed_rows<S>(gates, H) * round_up(columns, L)
                        : gates * round_up(H, unit_vectors(gates) * L) * packed_rows<S>(columns)) *
            kPlanes<S> * sizeof(Factor<S>);
  });
  return bytes;
}

void pack(DType dtype, const void* w, int64_t gates, int64_t H, int64_t columns, int64_t block, void* panels) {
  with_storage(dtype, [&]<class S>(S) { pack<S>(w, gates, H, columns, block, panels); });
}

bool pack_transposed(DType dtype, const void* w, int64_t gates, int64_t H, int64_t columns, int64_t vector,
                     void* panels) {
  bool finite = true;
  with_storage(dtype, [&]<class S>(S) { finite = pack_transposed<S>(w, gates, H, columns, vector, panels); });
  return finite;
}

int64_t forward_scratch(CellKind cell, DType dtype, const ForwardParams& p, int64_t rows, int64_t steps) {
  int64_t bytes = 0;
  with_cell(cell, dtype, [&]<class Cell, class S>(Cell, S) { bytes = Forward<Cell, S>::scratch(p, rows, steps); });
  return bytes;
}

void forward(CellKind cell, DType dtype, const ForwardParams& p, const Chain& chain, const Panels& panels,
             int64_t steps, const Member& member) {
  FlushDenormals flush;
  [[maybe_unused]] const TileRegisters tiles;
  with_cell(cell, dtype,
            [&]<class Cell, class S>(Cell, S) { Forward<Cell, S>(p, chain, panels, steps, member).run(steps); });
}

int64_t backward_scratch(CellKind cell, DType dtype, const BackwardParams& p, int64_t rows, int64_t steps) {
  int64_t bytes = 0;
  with_cell(cell, dtype, [&]<class Cell, class S>(Cell, S) { bytes = Backward<Cell, S>::scratch(p, rows, steps); });
  return bytes;
}

void backward(CellKind cell, DType dtype, const BackwardParams& p, const Chain& chain, const Panels& panels,
              const Slots& slots, int64_t steps, int64_t begin, int64_t end, const Member& member) {
  FlushDenormals flush;
  [[maybe_unused]] const TileRegisters tiles;
  with_cell(cell, dtype, [&]<class Cell, class S>(Cell, S) {
    Backward<Cell, S>(p, chain, panels, slots, steps, member).run(steps, begin, end);
  });
}

// Runs one pass of a step over the rows begin <= state < end of (D, B).
template <class F>
void variant_rows(DType dtype, int64_t begin, int64_t end, const F& row) {
  FlushDenormals flush;
  with_storage(dtype, [&]<class S>(S) {
    if constexpr (!kSplit<S>)
      for (int64_t state = begin; state < end; ++state) row(S(), Row<Accumulate<S>>(), state);
  });
}

void variant_forward(DType dtype, const VariantForward& p, int64_t begin, int64_t end) {
  variant_rows(dtype, begin, end, [&]<class S, class X>(S, const X& x, int64_t state) INLINE_LAMBDA {
    variant_forward_row<S, typename X::A>(p, x, state);
  });
}

void variant_forward_projected(DType dtype, const VariantForward& p, int64_t begin, int64_t end) {
  variant_rows(dtype, begin, end, [&]<class S, class X>(S, const X& x, int64_t state) INLINE_LAMBDA {
    variant_forward_projected_row<S, typename X::A>(p, x, state);
  });
}

void variant_backward_output(DType dtype, const VariantBackward& p, int64_t begin, int64_t end) {
  variant_rows(dtype, begin, end, [&]<class S, class X>(S, const X& x, int64_t state) INLINE_LAMBDA {
    variant_backward_output_row<S, typename X::A>(p, x, state);
  });
}

void variant_backward(DType dtype, const VariantBackward& p, int64_t begin, int64_t end) {
  variant_rows(dtype, begin, end, [&]<class S, class X>(S, const X& x, int64_t state) INLINE_LAMBDA {
    variant_backward_row<S, typename X::A>(p, x, state);
  });
}

// y = f(x) for n values of type S, f being called with a vector and an S.
template <class F>
void apply(DType dtype, const void* x, void* y, int64_t n, const F& f) {
  with_storage(dtype, [&]<class S>(S) {
    using A = Accumulate<S>;
    for (int64_t k = 0; k < n; k += kLanes<A>)
      store<A>(static_cast<S*>(y) + k, f(load<A>(static_cast<const S*>(x) + k, n - k), S()), n - k);
  });
}

void sigmoid(DType dtype, const void* x, void* y, int64_t n) {
  apply(dtype, x, y, n, []<class V, class S>(V v, S) INLINE_LAMBDA { return Math<S>::sigmoid(v); });
}

void tanh(DType dtype, const void* x, void* y, int64_t n) {
  apply(dtype, x, y, n, []<class V, class S>(V v, S) INLINE_LAMBDA { return Math<S>::tanh(v); });
}

int64_t gradient_scratch(CellKind cell, DType dtype, int64_t H) {
  int64_t bytes = 0;
  with_storage(dtype, [&]<class S>(S) { bytes = WeightGradients<S>::scratch(cell, H); });
  return bytes;
}

void input_gradient(CellKind cell, DType dtype, const void* dz, int64_t capacity, int64_t H, int64_t I,
                    const void* ih_t, bool finite, void* const* dx_rows, int64_t begin, int64_t end) {
  FlushDenormals flush;
  [[maybe_unused]] const TileRegisters tiles;
  with_storage(dtype, [&]<class S>(S) {
    input_gradient<S>(cell, static_cast<const Factor<S>*>(dz), capacity, H, I, static_cast<const Factor<S>*>(ih_t),
                      finite, dx_rows, begin, end);
  });
}

void input_gradient_unpacked(CellKind cell, DType dtype, const void* dz, int64_t capacity, int64_t count, int64_t H,
                             int64_t I, const void* w_ih, void* const* dx_rows, int64_t begin, int64_t end) {
  FlushDenormals flush;
  with_storage(dtype, [&]<class S>(S) {
    if constexpr (!kConverted<S>)
      input_gradient_unpacked<S>(cell, static_cast<const S*>(dz), capacity, count, H, I, static_cast<const S*>(w_ih),
                                 dx_rows, begin / kLanes<S>, end / kLanes<S>);
  });
}

int64_t column_tiles(int64_t I, int64_t H) { return divide_up(I + H + 1, BIRNN_ISA_AMX ? 16 : kRows); }

void weight_gradient(DType dtype, const WeightGradient& work, void* scratch) {
  FlushDenormals flush;
  [[maybe_unused]] const TileRegisters tiles;
  with_storage(dtype, [&]<class S>(S) { WeightGradients<S>{work}.add(static_cast<Factor<S>*>(scratch)); });
}

void store_weight_gradient(DType dtype, const WeightGradient& work, void* dw_ih, void* dw_hh, void* d_bias_ih,
                           void* d_bias_hh) {
  with_storage(dtype, [&]<class S>(S) {
    WeightGradients<S>{work}.store(static_cast<S*>(dw_ih), static_cast<S*>(dw_hh), static_cast<S*>(d_bias_ih),
                                   static_cast<S*>(d_bias_hh));
  });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    .lanes = lanes,
    .rows = BIRNN_ISA_AMX ? 16 : kRows,
    .depth = depth,
    .accumulate_bytes = accumulate_bytes,
    .factor_bytes = factor_bytes,
    .panel_bytes = panel_bytes,
    .pack = pack,
    .pack_transposed = pack_transposed,
    .forward_scratch = forward_scratch,
    .forward = forward,
    .backward_scratch = backward_scratch,
    .backward = backward,
    .variant_forward = variant_forward,
    .variant_forward_projected = variant_forward_projected,
    .variant_backward_output = variant_backward_output,
    .variant_backward = variant_backward,
    .input_gradient = input_gradient,
    .input_gradient_unpacked = input_gradient_unpacked,
    .column_tiles = column_tiles,
    .gradient_scratch = gradient_scratch,
    .weight_gradient = weight_gradient,
    .store_weight_gradient = store_weight_gradient,
    .sigmoid = sigmoid,
    .tanh = tanh,
};

}  // namespace birnn::cpu::BIRNN_ISA
