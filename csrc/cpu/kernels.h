// What each ISA's build of the CPU kernels offers, and what it is told. One table per ISA; isa.h chooses among them.
#pragma once

#include <cstdint>

#include "../core/recurrence.h"
#include "../core/variant.h"
#include "barrier.h"

namespace birnn::cpu {

// W_ih is packed for more steps of sequences (T * B) than these. With fewer, packing takes about as long as the
// product.
constexpr int64_t kMostUnpackedRows = 64;

// Steps that a kernel takes at once, at most.
constexpr int64_t kMostStepsAtOnce = 64;

// Vectors of columns of a register tile whose columns are not the gates of a unit; 2 or 1 at the end.
constexpr int64_t kTileVectors = 4;

// The weights of a direction, packed into panels for the register tiles; made once per call. L: lanes of a
// vector; blocks: H / L, rounded up; units and columns beyond the end are 0. "Tile": kTileVectors vectors of columns
// side by side. Where pairs of bfloat16 are multiplied, two neighbouring k stand side by side in each lane.
struct Panels {
  void* ih;          // [block][k: I][gate][lane]; null in the forward pass of few rows
  void* hh;          // [block][k: H][gate][lane]
  void* hh_t;        // [tile of H][k: gate, block, lane][vector of the tile][lane]
  bool* not_finite;  // some value of hh_t or ih_t is no finite number: 0 times it is not 0
  void* ih_t;        // [tile of I][k: gate, block, lane][vector of the tile][lane]
};

// A chain is one direction of some sequences: it depends on no other chain, over all time steps.
struct Chain {
  int64_t direction;
  const int64_t* rows;  // (count) indices of its sequences, longest first
  int64_t count;
  int64_t rank, rank_step;  // its k-th sequence is number rank + k * rank_step of all, longest first
  void* scratch;            // of forward_scratch or backward_scratch bytes, aligned to 64 bytes
};

// The threads that share a chain split its hidden units.
struct Member {
  int64_t index, count;
  Barrier* barrier;
};

// Gradients of the pre-activations of some steps of a direction, as panels for the gradients of the weights:
// [panel][slot][kTileVectors vectors][lane], where the vectors in the order gate, block are dealt out in that many. A
// slot is a step of a sequence; slots are in the order of t, then longest sequence first.
struct Slots {
  void* dz;                // null: BackwardParams::d_gates_x is wanted instead
  int64_t capacity;        // slots that a panel has room for
  int64_t first;           // the slot that stands first
  const int64_t* offsets;  // (T+1): the first slot of each t
};

// The gradients of one direction's weights from some of its steps.
struct WeightGradient {
  const void* dz;             // as in Slots
  int64_t capacity, count;    //
  const void* const* x_rows;  // (count) x of each slot, (I)
  const void* const* h_rows;  // (count) h before each slot, (H)
  int64_t I, H;
  int64_t begin, end;  // the tiles of columns to work on, of column_tiles
  void* sums;          // [tile of columns][panel][column of the tile][kTileVectors vectors][lane], of type A
  bool first;          // overwrite sums, rather than add to them
};

struct Kernels {
  int64_t (*lanes)(DType);
  int64_t rows;  // sequences, or columns, of a register tile
  int64_t (*accumulate_bytes)(DType);

  // Bytes of the packed weights (gates * H, columns).
  int64_t (*panel_bytes)(DType, int64_t H, int64_t columns, bool transposed);

  // Pack one block, or one vector of columns, of a weight matrix (gates * H, columns). See Panels. pack_transposed:
  // whether all its values are finite.
  void (*pack)(DType, const void* w, int64_t H, int64_t columns, int64_t block, void* panels);
  bool (*pack_transposed)(DType, const void* w, int64_t H, int64_t columns, int64_t vector, void* panels);

  // Run one chain. `steps` of them are projected at once.
  int64_t (*forward_scratch)(DType, const ForwardParams&, int64_t rows, int64_t steps);
  void (*forward)(DType, const ForwardParams&, const Chain&, const Panels&, int64_t steps, const Member&);

  // Run the iterations begin <= s < end of one chain.
  int64_t (*backward_scratch)(DType, const BackwardParams&, int64_t rows, int64_t steps);
  void (*backward)(DType, const BackwardParams&, const Chain&, const Panels&, const Slots&, int64_t steps,
                   int64_t begin, int64_t end, const Member&);

  // A pass of one step, over the rows begin <= state < end of (D, B). See core/variant.h.
  void (*variant_forward)(DType, const VariantForward&, int64_t begin, int64_t end);
  void (*variant_forward_projected)(DType, const VariantForward&, int64_t begin, int64_t end);
  void (*variant_backward_output)(DType, const VariantBackward&, int64_t begin, int64_t end);
  void (*variant_backward)(DType, const VariantBackward&, int64_t begin, int64_t end);

  // What follows is null in a table without float32, and the last three in one without the plain float32.

  // Bytes of scratch of the two functions that take some, for each thread.
  int64_t (*gradient_scratch)(DType, int64_t H) = nullptr;

  // dx_rows[k] += W_ih^T dz of slot k, begin <= k < end.
  void (*input_gradient)(DType, const void* dz, int64_t capacity, int64_t H, int64_t I, const void* ih_t, bool finite,
                         void* const* dx_rows, int64_t begin, int64_t end, void* scratch) = nullptr;

  int64_t (*column_tiles)(int64_t I, int64_t H) = nullptr;
  void (*weight_gradient)(DType, const WeightGradient&, void* scratch) = nullptr;
  void (*store_weight_gradient)(DType, const WeightGradient&, void* dw_ih, void* dw_hh, void* d_bias) = nullptr;

  // The cell's functions by themselves, for their test: n floats in, n out.
  void (*exp)(const float* x, float* y, int64_t n) = nullptr;
  void (*sigmoid)(const float* x, float* y, int64_t n) = nullptr;
  void (*tanh)(const float* x, float* y, int64_t n) = nullptr;
};

}  // namespace birnn::cpu
