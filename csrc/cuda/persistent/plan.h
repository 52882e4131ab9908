// The `persistent` algorithms: one launch runs all T steps of both directions of a layer, with W_hh on the chip. How
// work is laid onto the GPU, and how much of it fits, is decided here, free of torch and CUDA; docs/cuda.md draws it.
//
// A group of P thread blocks (CTAs) serves one direction of 8, 16 or 32 sequences. Each CTA owns some hidden units, in
// blocks of 8, for all gates. Products run on tensor cores: weights are the 16 rows, 8 sequences the columns.
//
// Forward: two tiles of rows are the four gates of a unit block, or three tiles the three gates of two; a warp has
// these and one part (split) of the sum over h_{t-1}, and in the end each lane has all gates of its own cells. h_t goes
// to all CTAs of the group. Backward: a CTA multiplies its own dz_t with its own rows of W_hh, which makes a part of
// the sum for every unit of the layer; a tile's rows are 16 of these, and each part goes to the CTA that owns the
// units. That moves 4 H bytes a sequence and step; handing dz round would move 8 H to 16 H.
#pragma once

#include <cstdint>
#include <iterator>

#include "../../core/cells.h"
#include "../../core/inline.h"

namespace birnn::cuda {

enum class Exchange : int {
  cta,      // P = 1: shared memory
  grid,     // P CTAs that are resident together (cooperative launch), through global memory and a counter
  cluster,  // P CTAs of a thread-block cluster, through distributed shared memory (compute capability 9.0)
};
constexpr int kExchanges = 3;

constexpr int kBlock = 8;  // units of a block: of a gate, half a tile's rows
constexpr int kTile = 16;  // rows of an mma
constexpr int kEight = 8;  // columns of an mma: sequences
constexpr int kWarp = 32;
constexpr int kMaxCluster = 16;
constexpr int kPiece = 16;         // bytes that travel as one
constexpr int kFragment = 512;     // bytes of a tile's weights for one mma, of all lanes
constexpr int kCounter = 128;      // bytes that a group's counter has to itself, as its CTAs poll it
constexpr int kMaxBarriers = 16;   // that a CTA has; 0 is __syncthreads()
constexpr int kRegisters = 65536;  // of a multiprocessor

// Kernels count steps, sequences and units in int.
constexpr int64_t kMostSteps = (1ll << 31) - 2, kMostSequences = 1 << 30, kMostUnits = 1 << 15;

BIRNN_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- The kernels that are compiled: rows of small tables. What a warp keeps of its weights in registers is
// `resident`; the rest is in shared memory.

// eights: of sequences in a group. turns: groups of sequences that the same CTAs serve, a step of each in turn: while
// one is computed, what the other has sent is under way. splits: of the sum over h. resident: steps of the sum (each an
// mma deep, and all of its tiles high) whose weights a warp keeps in registers. warps: the most that a CTA may have.
// stages: steps of gates_x that are under way. ctas: those that share a multiprocessor, if they fit. ahead: whether
// float32 weights are split into two TF32 when they are loaded, which takes twice the registers, rather than each time
// they are used.
//
// "Step" has two meanings: a time step, and a step of a sum, which is as deep as one mma. Members of rows and plans
// mean the latter.
struct ForwardRow {
  CellKind cell;
  int eights, turns, splits, resident, warps, stages, ctas;
  bool ahead = false;
  constexpr int blocks() const { return gates_of(cell) % 2 == 0 ? 1 : 2; }  // of a warp, so that tiles are filled
  constexpr int tiles() const { return blocks() * gates_of(cell) / 2; }     // of these blocks
  constexpr int cells() const { return 2 * eights * blocks() / splits; }    // of a lane, in a group
  constexpr int sequences() const { return kEight * eights; }               // of a group
  constexpr int batch() const { return turns * sequences(); }               // of its CTAs
  constexpr int stage_bytes(int size) const {                               // of a warp
    return cells() * gates_of(cell) * 4 * kBlock * size;
  }
};

// cells: those of a lane. splits: of the sum over a CTA's dz. steps: of one split. tiles: those of the layer's units
// that a warp multiplies. resident: how many of its tiles * steps fragments are in registers. warps: those that a CTA
// has. stages: steps of gates, dy and cells that are under way. The rest is as above.
struct BackwardRow {
  CellKind cell;
  int eights, turns, cells, splits, steps, tiles, resident, warps, stages, ctas;
  bool ahead = false;
  constexpr int sequences() const { return kEight * eights; }
  constexpr int batch() const { return turns * sequences(); }
  constexpr int units(int size) const { return steps * splits * (32 / size) / gates_of(cell); }  // of a CTA
  constexpr int own_tiles(int size) const { return units(size) / kTile; }
  constexpr int most_tiles() const { return warps / splits * tiles; }  // of a layer
  constexpr int memory_fragments() const { return tiles * steps - resident; }
  constexpr int stage_bytes(int size) const {  // values, dy, cells
    return cells * 2 * kTile * ((values_of(cell) + 1) * size + (state_is_output(cell) ? size : 4));
  }
};

// X(cell, exchange, eights, turns, splits, resident, warps, stages, ctas, ahead)
#define BIRNN_FORWARD_ROWS_16(X)                 \
  X(lstm, cta, 1, 1, 1, 4, 8, 4, 2, false)       \
  X(lstm, cta, 1, 1, 1, 6, 16, 4, 1, false)      \
  X(lstm, cluster, 1, 1, 2, 4, 8, 4, 2, false)   \
  X(lstm, cluster, 1, 1, 2, 8, 8, 4, 1, false)   \
  X(lstm, cluster, 1, 1, 2, 16, 8, 4, 1, false)  \
  X(lstm, cluster, 1, 1, 2, 12, 12, 4, 1, false) \
  X(lstm, cluster, 2, 1, 2, 4, 8, 4, 1, false)   \
  X(lstm, cluster, 2, 1, 2, 16, 8, 4, 1, false)  \
  X(lstm, cluster, 2, 1, 2, 8, 12, 2, 1, false)  \
  X(lstm, cluster, 4, 1, 2, 8, 8, 2, 1, false)   \
  X(lstm, cluster, 1, 2, 2, 12, 8, 4, 1, false)  \
  X(lstm, cluster, 2, 2, 2, 8, 8, 2, 1, false)   \
  X(lstm, grid, 2, 1, 4, 16, 8, 4, 1, false)     \
  X(lstm, grid, 4, 1, 4, 12, 8, 2, 1, false)     \
  X(lstm, grid, 2, 2, 4, 12, 8, 2, 1, false)     \
  X(gru, cta, 1, 1, 2, 3, 16, 2, 1, false)       \
  X(gru, cluster, 1, 1, 2, 4, 4, 4, 2, false)    \
  X(gru, cluster, 1, 1, 2, 12, 8, 4, 1, false)   \
  X(gru, cluster, 2, 1, 2, 8, 8, 2, 1, false)    \
  X(gru, grid, 2, 1, 4, 10, 8, 4, 1, false)
#define BIRNN_FORWARD_ROWS_32(X)                \
  X(lstm, cta, 1, 1, 1, 6, 8, 2, 1, true)       \
  X(lstm, cluster, 1, 1, 2, 8, 8, 4, 1, true)   \
  X(lstm, cluster, 1, 1, 2, 16, 8, 4, 1, false) \
  X(lstm, cluster, 2, 1, 2, 11, 8, 2, 1, false) \
  X(lstm, cluster, 1, 2, 2, 12, 8, 2, 1, false) \
  X(lstm, grid, 1, 1, 2, 16, 8, 4, 1, false)    \
  X(lstm, grid, 2, 1, 2, 10, 8, 2, 1, false)    \
  X(lstm, grid, 1, 2, 2, 12, 8, 2, 1, false)    \
  X(gru, cta, 1, 1, 1, 4, 8, 2, 1, false)       \
  X(gru, cluster, 1, 1, 4, 4, 8, 4, 1, true)    \
  X(gru, cluster, 1, 1, 4, 9, 8, 4, 1, false)   \
  X(gru, grid, 1, 1, 4, 8, 8, 4, 1, false)

// X(cell, exchange, eights, turns, cells, splits, steps, tiles, resident, warps, stages, ctas, ahead)
#define BIRNN_BACKWARD_ROWS_16(X)                          \
  X(lstm, cta, 1, 1, 2, 2, 8, 1, 8, 8, 2, 1, false)        \
  X(lstm, cta, 1, 1, 2, 2, 16, 1, 8, 16, 1, 1, false)      \
  X(lstm, cluster, 1, 1, 1, 1, 8, 1, 8, 8, 4, 2, false)    \
  X(lstm, cluster, 1, 1, 1, 1, 8, 2, 16, 8, 4, 1, false)   \
  X(lstm, cluster, 1, 1, 1, 1, 8, 3, 24, 8, 4, 1, false)   \
  X(lstm, cluster, 1, 1, 1, 1, 8, 4, 32, 8, 4, 1, false)   \
  X(lstm, cluster, 1, 1, 1, 1, 12, 4, 21, 12, 2, 1, false) \
  X(lstm, cluster, 2, 1, 2, 1, 8, 1, 8, 8, 4, 1, false)    \
  X(lstm, cluster, 2, 1, 2, 1, 8, 2, 16, 8, 4, 1, false)   \
  X(lstm, cluster, 2, 1, 2, 1, 8, 4, 24, 8, 2, 1, false)   \
  X(lstm, cluster, 1, 2, 1, 1, 8, 2, 16, 8, 4, 1, false)   \
  X(lstm, cluster, 1, 2, 1, 1, 8, 4, 28, 8, 2, 1, false)   \
  X(lstm, cluster, 2, 2, 2, 1, 8, 2, 16, 8, 2, 1, false)   \
  X(lstm, grid, 2, 1, 1, 1, 4, 8, 31, 8, 4, 1, false)      \
  X(lstm, grid, 2, 2, 1, 1, 4, 8, 20, 8, 2, 1, false)      \
  X(gru, cta, 1, 1, 2, 2, 6, 1, 6, 8, 2, 1, false)         \
  X(gru, cta, 1, 1, 2, 2, 12, 1, 8, 16, 1, 1, false)       \
  X(gru, cluster, 1, 1, 2, 1, 6, 8, 36, 4, 4, 1, false)    \
  X(gru, cluster, 1, 1, 2, 1, 9, 8, 36, 6, 2, 1, false)    \
  X(gru, cluster, 2, 1, 2, 1, 6, 4, 24, 8, 2, 1, false)    \
  X(gru, grid, 2, 1, 1, 1, 3, 8, 24, 8, 4, 1, false)
#define BIRNN_BACKWARD_ROWS_32(X)                         \
  X(lstm, cta, 1, 1, 2, 2, 16, 1, 16, 8, 1, 1, false)     \
  X(lstm, cluster, 1, 1, 1, 1, 16, 1, 16, 8, 4, 1, true)  \
  X(lstm, cluster, 1, 1, 1, 1, 16, 2, 24, 8, 4, 1, false) \
  X(lstm, cluster, 1, 1, 1, 1, 16, 4, 24, 8, 2, 1, false) \
  X(lstm, cluster, 2, 1, 2, 1, 16, 2, 15, 8, 2, 1, false) \
  X(lstm, cluster, 1, 2, 1, 1, 16, 2, 20, 8, 2, 1, false) \
  X(lstm, grid, 2, 1, 1, 1, 8, 4, 16, 8, 4, 1, false)     \
  X(lstm, grid, 2, 1, 1, 1, 8, 6, 16, 8, 2, 1, false)     \
  X(lstm, grid, 2, 1, 1, 1, 8, 8, 16, 8, 2, 1, false)     \
  X(gru, cta, 1, 1, 2, 2, 12, 1, 12, 8, 1, 1, false)      \
  X(gru, cluster, 1, 1, 1, 1, 12, 1, 12, 8, 4, 1, true)   \
  X(gru, cluster, 1, 1, 1, 1, 12, 4, 24, 8, 2, 1, false)  \
  X(gru, grid, 2, 1, 1, 1, 6, 6, 24, 8, 2, 1, false)      \
  X(gru, grid, 2, 1, 1, 1, 6, 8, 20, 8, 2, 1, false)

#define BIRNN_ROW(cell, exchange, ...) {Exchange::exchange, {CellKind::cell, __VA_ARGS__}},
struct ForwardEntry {
  Exchange exchange;
  ForwardRow row;
};
struct BackwardEntry {
  Exchange exchange;
  BackwardRow row;
};
constexpr ForwardEntry kForwardRows16[] = {BIRNN_FORWARD_ROWS_16(BIRNN_ROW)};
constexpr ForwardEntry kForwardRows32[] = {BIRNN_FORWARD_ROWS_32(BIRNN_ROW)};
constexpr BackwardEntry kBackwardRows16[] = {BIRNN_BACKWARD_ROWS_16(BIRNN_ROW)};
constexpr BackwardEntry kBackwardRows32[] = {BIRNN_BACKWARD_ROWS_32(BIRNN_ROW)};
#undef BIRNN_ROW
constexpr int kForwardCounts[] = {int(std::size(kForwardRows16)), int(std::size(kForwardRows32))};
constexpr int kBackwardCounts[] = {int(std::size(kBackwardRows16)), int(std::size(kBackwardRows32))};

// f(k, entry k) of a table for elements of 2 or 4 bytes.
template <class F>
void for_each_row(const ForwardEntry* rows, int size, F f) {
  for (int k = 0; k < kForwardCounts[size == 4]; ++k) f(k, rows[k]);
}
template <class F>
void for_each_row(const BackwardEntry* rows, int size, F f) {
  for (int k = 0; k < kBackwardCounts[size == 4]; ++k) f(k, rows[k]);
}

// ---- Plans. Offsets are bytes in a CTA's shared memory, which begins with weights.

struct ForwardPlan {
  Exchange exchange;
  int row;           // of kForwardRows16 or 32
  int ctas;          // P
  int blocks;        // of units, of a CTA
  int steps;         // of the sum over h, of one split
  int memory_steps;  // of these, in shared memory
  int h_blocks;      // of units in a buffer of h, padding included
  int h;             // [turn][two buffers], h_stride() apart, of h: [block][sequence][8 units], see h_offset()
  int parts;         // of sums, to the lane that has the cell: [turn][block][column][other split][lane] x 16 bytes
  int ring;          // [turn][warp][stage]
  int bytes;
  int warps;
};

struct BackwardPlan {
  Exchange exchange;
  int row;
  int ctas;
  int tiles;     // of the whole layer
  int received;  // parts of sums: [turn][two buffers, one in cta], received_stride() apart, of
                 // [source][tile][eight][lane] x 16 bytes; not in grid
  int dz;        // [two buffers, one in cta][step][sequence] x 32 bytes, see dz_offset()
  int ring;
  int bytes;
  int warps;
};

inline const ForwardRow& row_of(int size, const ForwardPlan& plan) {
  return (size == 2 ? kForwardRows16[plan.row] : kForwardRows32[plan.row]).row;
}
inline const BackwardRow& row_of(int size, const BackwardPlan& plan) {
  return (size == 2 ? kBackwardRows16[plan.row] : kBackwardRows32[plan.row]).row;
}

// Bytes of one buffer of h, of the parts of sums for a step that a CTA receives, and of a buffer of dz.
BIRNN_INLINE constexpr int h_bytes(int h_blocks, int sequences, int size) {
  return h_blocks * sequences * kBlock * size;
}
BIRNN_INLINE constexpr int received_bytes(int sources, int tiles, int eights) {
  return sources * tiles * eights * kFragment;
}
// In shared memory each buffer that others fill is followed by the mbarrier that counts what has come.
BIRNN_INLINE constexpr int h_stride(int h_blocks, int sequences, int size) {
  return h_bytes(h_blocks, sequences, size) + kPiece;
}
BIRNN_INLINE constexpr int received_stride(int sources, int tiles, int eights) {
  return received_bytes(sources, tiles, eights) + kPiece;
}
BIRNN_INLINE constexpr int parts_bytes(int blocks, int eights, int splits) {
  return blocks * 2 * eights * (splits - 1) * kFragment;
}
BIRNN_INLINE constexpr int dz_bytes(int steps, int sequences) { return steps * sequences * 32; }

// Blocks of units that the sum over h has in one mma.
BIRNN_INLINE constexpr int blocks_of_step(int size) { return size == 2 ? 2 : 1; }

// Where a sequence's 8 units of a block begin in a buffer of h. In 16 bits, odd blocks have fours of sequences swapped,
// so that the 8 bytes each that half a warp reads, of four sequences and two blocks, are all in different banks.
BIRNN_INLINE constexpr int h_offset(int block, int sequence, int sequences, int size) {
  return (block * sequences + (size == 2 ? sequence ^ (block & 1) << 2 : sequence)) * kBlock * size;
}

// The neighbouring k that a unit has in a step of the backward pass's sum: all its gates, if they fill the k of a lane;
// else one, and each gate has steps of its own.
constexpr int k_of_unit(CellKind cell) { return gates_of(cell) == 4 ? 4 : 1; }

// Where the gradients of a unit and a sequence begin in a buffer of dz, of all gates or of the first: of a step of the
// sum, 32 bytes of each sequence are 4 units with four gates (float32: 2), or 16 with one (float32: 8). Sequences are
// swapped for the banks, too: lanes store 8 or 16 units of two sequences at once.
BIRNN_INLINE constexpr int dz_swap(int k_of_unit, int step, int size) {
  return k_of_unit == 4 ? (size == 2 ? (step & 3) << 1 : step & 3) : size == 2 ? 0 : (step & 1) << 1;
}
BIRNN_INLINE constexpr int dz_offset(int k_of_unit, int unit, int sequence, int sequences, int size) {
  const int units = 32 / size / k_of_unit, step = unit / units;
  return (step * sequences + (sequence ^ dz_swap(k_of_unit, step, size))) * 32 + unit % units * k_of_unit * size;
}

constexpr int kTooLarge = 1 << 30;  // bytes, in place of more

inline ForwardPlan forward_plan(int size, int64_t H, int row, int blocks) {
  const ForwardEntry& entry = size == 2 ? kForwardRows16[row] : kForwardRows32[row];
  const ForwardRow& r = entry.row;
  ForwardPlan plan{entry.exchange, row};
  const int64_t all = divide_up(H, kBlock);
  plan.blocks = blocks;
  plan.ctas = int(divide_up(all, blocks));
  plan.warps = blocks / r.blocks() * r.splits;
  // A warp does all steps whose weights are in registers: those beyond the layer multiply zeros.
  const int64_t steps = divide_up(divide_up(all, blocks_of_step(size)), r.splits);
  plan.steps = int(steps > r.resident ? steps : r.resident);
  plan.memory_steps = plan.steps - r.resident;
  const int summed = plan.steps * r.splits * blocks_of_step(size);
  plan.h_blocks = summed > plan.ctas * blocks ? summed : plan.ctas * blocks;
  int64_t at = int64_t(plan.warps) * plan.memory_steps * r.tiles() * kFragment;
  plan.h = int(at);
  at += 2ll * r.turns * h_stride(plan.h_blocks, r.sequences(), size);
  plan.parts = int(at);
  at += int64_t(r.turns) * parts_bytes(blocks, r.eights, r.splits);
  plan.ring = int(at);
  at += int64_t(r.turns) * plan.warps * r.stages * r.stage_bytes(size);
  plan.bytes = int(at < kTooLarge ? at : kTooLarge);
  return plan;
}

inline BackwardPlan backward_plan(int size, int64_t H, int row) {
  const BackwardEntry& entry = size == 2 ? kBackwardRows16[row] : kBackwardRows32[row];
  const BackwardRow& r = entry.row;
  BackwardPlan plan{entry.exchange, row};
  plan.ctas = int(divide_up(H, r.units(size)));
  plan.tiles = int(divide_up(H, kTile));
  plan.warps = r.warps;
  const int buffers = entry.exchange == Exchange::cta ? 1 : 2;
  int64_t at = int64_t(r.warps) * r.memory_fragments() * kFragment;
  plan.received = int(at);
  if (entry.exchange != Exchange::grid)
    at += int64_t(r.turns) * buffers * received_stride(plan.ctas * r.splits, r.own_tiles(size), r.eights);
  plan.dz = int(at = divide_up(at, 256) * 256);  // dz_swap() is of bits below
  at += int64_t(buffers) * dz_bytes(r.steps * r.splits, r.sequences());
  plan.ring = int(at);
  at += int64_t(r.turns) * r.warps * r.stages * r.stage_bytes(size);
  plan.bytes = int(at < kTooLarge ? at : kTooLarge);
  return plan;
}

}  // namespace birnn::cuda
