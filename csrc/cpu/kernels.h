// The interface of the CPU kernels: each ISA's build fills a table (Kernels), and isa.h chooses among the tables.
#pragma once

#include <cstdint>

#include "../core/recurrence.h"
#include "../core/variant.h"
#include "barrier.h"

namespace birnn::cpu {

// W_ih is packed if T * B is more than this. With fewer, packing takes about as long as the product.
constexpr int64_t kMostUnpackedRows = 64;

// A kernel takes at most so many steps at once.
constexpr int64_t kMostStepsAtOnce = 64;

// The width of a register tile in vectors, if its columns are not the gates of a unit. The last tile may have 2 or 1.
constexpr int64_t kTileVectors = 4;

// A register tile of the forward pass has all gates of a block, which is so many vectors of units: one, unless they
// have a single gate, whose sums would not keep the multipliers busy.
constexpr int64_t unit_vectors(int64_t gates) { return gates == 1 ? kTileVectors : 1; }

// The weights of a direction, packed into panels for the register tiles, once per call. A vector has L lanes; there are
// H / L blocks, rounded up; units and columns beyond the end are 0. A tile is kTileVectors neighbouring vectors of
// columns. If pairs of bfloat16 are multiplied, each lane has two neighbouring k side by side.
struct Panels {
  void* ih;          // [block][k: I][gate][lane]; null in the forward pass of few rows
  void* hh;          // [block][k: H][gate][lane]
  void* hh_t;        // [tile of H][k: gate, block, lane][vector of the tile][lane]
  bool* not_finite;  // hh_t or ih_t has an infinity or NaN, so products with 0 can't be skipped
  void* ih_t;        // [tile of I][k: gate, block, lane][vector of the tile][lane]; null if W_ih is read as it is
};

// A chain is one direction of some sequences. No step of it depends on another chain.
struct Chain {
  int64_t direction;
  const int64_t* rows;  // (count) indices of its sequences, longest first
  int64_t count;
  int64_t rank, rank_step;  // its k-th sequence is number rank + k * rank_step of all, longest first
  void* scratch;            // forward_scratch or backward_scratch bytes, aligned to 64 bytes
};

// A thread among those that share a chain. They split its hidden units.
struct Member {
  int64_t index, count;
  Barrier* barrier;
};

// Gradients of the cell's values of some steps of a direction, as factors for the gradients of the weights and of x:
// [panel][slot][kTileVectors vectors][lane]. The vectors of all values, in the order value, block, are cut into panels.
// A slot is a step of a sequence; slots are ordered by t, then longest sequence first. If pairs of bfloat16 are
// multiplied, one panel has all vectors, [slot][plane][vector][lane], as tiles read long rows best, and gradients of
// the weights need pairs of slots, which are made from it. Behind the last value's vectors, zeros fill the last panel.
struct Slots {
  void* dz;                // null: the kernel writes BackwardParams::d_gates_x instead
  int64_t capacity;        // slots that a panel has room for
  int64_t first;           // number of the first slot
  const int64_t* offsets;  // (T+1): the first slot of each t
};

// Parameters of the gradients of one direction's weights, from some of its steps.
struct WeightGradient {
  const void* dz;  // as in Slots
  int64_t capacity, count;
  CellKind cell;
  const void* const* x_rows;  // (count) x of each slot, (I)
  const void* const* h_rows;  // (count) h before each slot, (H)
  int64_t I, H;
  int64_t begin, end;  // the tiles of columns to work on, out of column_tiles
  void* sums;          // A [tile of columns][panel][column of the tile][kTileVectors vectors][lane]
  bool first;          // overwrite sums rather than add to them
};

struct Kernels {
  int64_t (*lanes)(DType);
  int64_t rows;             // sequences, or columns, of a register tile
  int64_t (*depth)(DType);  // products that an instruction adds up in each lane
  int64_t (*accumulate_bytes)(DType);
  int64_t (*factor_bytes)(DType);  // of a value as a factor, in all its planes

  // Returns the bytes of the packed weights (gates * H, columns).
  int64_t (*panel_bytes)(DType, int64_t gates, int64_t H, int64_t columns, bool transposed);

  // These pack one block, or one vector of columns, of a weight matrix (gates * H, columns); see Panels.
  // pack_transposed returns whether all its values are finite.
  void (*pack)(DType, const void* w, int64_t gates, int64_t H, int64_t columns, int64_t block, void* panels);
  bool (*pack_transposed)(DType, const void* w, int64_t gates, int64_t H, int64_t columns, int64_t vector,
                          void* panels);

  // Runs one chain, projecting `steps` steps at once.
  int64_t (*forward_scratch)(CellKind, DType, const ForwardParams&, int64_t rows, int64_t steps);
  void (*forward)(CellKind, DType, const ForwardParams&, const Chain&, const Panels&, int64_t steps, const Member&);

  // Runs the iterations begin <= s < end of one chain.
  int64_t (*backward_scratch)(CellKind, DType, const BackwardParams&, int64_t rows, int64_t steps);
  void (*backward)(CellKind, DType, const BackwardParams&, const Chain&, const Panels&, const Slots&, int64_t steps,
                   int64_t begin, int64_t end, const Member&);

  // These run a pass of one step, over the rows begin <= state < end of (D, B). See core/variant.h.
  void (*variant_forward)(DType, const VariantForward&, int64_t begin, int64_t end);
  void (*variant_forward_projected)(DType, const VariantForward&, int64_t begin, int64_t end);
  void (*variant_backward_output)(DType, const VariantBackward&, int64_t begin, int64_t end);
  void (*variant_backward)(DType, const VariantBackward&, int64_t begin, int64_t end);

  // dx_rows[k] += W_ih^T dz of slot k, begin <= k < end.
  void (*input_gradient)(CellKind, DType, const void* dz, int64_t capacity, int64_t H, int64_t I, const void* ih_t,
                         bool finite, void* const* dx_rows, int64_t begin, int64_t end);

  // The same for the slots 0 <= k < count and the columns begin <= column < end, multiples of the lanes, from W_ih as
  // it is. float and double only.
  void (*input_gradient_unpacked)(CellKind, DType, const void* dz, int64_t capacity, int64_t count, int64_t H,
                                  int64_t I, const void* w_ih, void* const* dx_rows, int64_t begin, int64_t end);

  int64_t (*column_tiles)(int64_t I, int64_t H);
  int64_t (*gradient_scratch)(CellKind, DType, int64_t H);  // returns the bytes of scratch per thread
  void (*weight_gradient)(DType, const WeightGradient&, void* scratch);
  void (*store_weight_gradient)(DType, const WeightGradient&, void* dw_ih, void* dw_hh, void* d_bias_ih,
                                void* d_bias_hh);

  // The cell's functions, which tests/test_math.py tests: n values in, n out.
  void (*sigmoid)(DType, const void* x, void* y, int64_t n);
  void (*tanh)(DType, const void* x, void* y, int64_t n);
};

}  // namespace birnn::cpu
