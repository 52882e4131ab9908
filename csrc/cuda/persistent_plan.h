// The `persistent` algorithm: one launch runs all T steps of both directions of a layer, with W_hh on the chip. How
// work is laid onto the GPU, and how much of it fits, is decided here, free of torch and CUDA; docs/cuda.md draws it.
//
// A group of P thread blocks (CTAs) serves one direction of 16 sequences at a time. Hidden units go in tiles of 16;
// each CTA owns `tiles` of them, for all four gates. Products run on tensor cores with the 16 sequences as rows.
//
// Forward: warp (tile, split) multiplies all of h_{t-1} (or its part of the sum) with the tile's rows of W_hh; then h_t
// goes from each CTA to all of its group. Backward: a CTA multiplies its own dz_t with its own rows of W_hh, which
// makes a part of the sum for every unit of the layer; each part goes to the CTA that owns the unit. That moves 4 H
// bytes a sequence and step; handing dz round would move 8 H to 16 H, and to hold it would not leave room for W_hh.
#pragma once

#include <cstdint>

#include "../core/inline.h"

namespace birnn::cuda {

enum class Exchange : int {
  cta,      // P = 1: shared memory
  grid,     // P CTAs that are resident together (cooperative launch), through global memory and a counter
  cluster,  // P CTAs of a thread-block cluster, through distributed shared memory (compute capability 9.0)
};

constexpr int kRows = 16;     // sequences of a group
constexpr int kUnits = 16;    // hidden units of a tile
constexpr int kChunk = 64;    // bytes of a row that one step of the products' inner loop takes: two mma deep
constexpr int kMaxWarps = 8;  // 256 threads of up to 255 registers: registers are the larger store
constexpr int kMaxCluster = 16;
constexpr int kPiece = 16;     // bytes of an access
constexpr int kCounter = 128;  // bytes that a group's counter has to itself, as its CTAs poll it

// Kernels count steps, sequences and units in int.
constexpr int64_t kMostSteps = (1ll << 31) - 2, kMostSequences = 1 << 30, kMostUnits = 1 << 15;

// What of W_hh a warp keeps in registers; the rest is in shared memory. Of 255 registers a thread, chunks of the
// forward pass take 32 each and items of the backward pass 8.
constexpr int kRegisterChunks = 5;
constexpr int kRegisterItems = 23;

// Bytes between the gates' planes of dz (16 sequences x 16 units). In 16 bits an odd gate is 64 bytes off, as a thread
// reads two gates at once.
BIRNN_INLINE constexpr int dz_plane(int size) { return kRows * kUnits * size + (size == 2 ? 64 : 0); }

// Whether the backward pass keeps c_t in shared memory from the step before. In float32 f c_{t-1} + i g is as exact,
// and without it H = 128 fits into one CTA of an A100.
BIRNN_INLINE constexpr bool keeps_cells(int size) { return size == 2; }

BIRNN_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Offsets are bytes in a CTA's shared memory, which begins with weights.
struct ForwardPlan {
  Exchange exchange;
  int ctas;          // P
  int tiles;         // of a CTA
  int splits;        // warps among which a tile's sums over h are divided
  int chunks;        // of a row of h
  int warp_chunks;   // of a warp's part of it
  int h_stride;      // bytes from row to row of h: 64 modulo 128, so that two rows are in different banks
  int h, h_buffers;  // with one buffer, all wait for all to have read it before it is written
  int stage;         // per tile: gates, c, h
  int tile_stage;
  int sums;  // parts of sums, where splits > 1
  int bytes;
  int warps() const { return tiles * splits; }
};

struct BackwardPlan {
  Exchange exchange;
  int ctas;
  int tiles;
  int pairs;       // tiles of the whole layer: columns of the products
  int warp_pairs;  // of a warp
  int chunks;      // of a row of the CTA's own dz
  int received;    // cluster: [2][source CTA][tile], parts of sums
  int dz;          // [2][tile][gate]: gates of a step, replaced by dz
  int cells;       // [2 or 1][tile]
  int dy;          // [tile]
  int dc;          // [tile], each lane's own
  int bytes;
  int warps;
};

// The smallest number of CTAs that makes so many tiles each; fewer than asked for where that leaves none idle.
inline int ctas_of(int64_t H, int wanted) {
  const int64_t tiles = divide_up(H, kUnits);
  return int(divide_up(tiles, divide_up(tiles, wanted)));
}

// size: bytes of the tensors' type, 2 or 4. ctas: as ctas_of() returns. limit: bytes of shared memory that a CTA may
// have; the plan fits if it takes no more, and no more than kMaxWarps.
inline ForwardPlan forward_plan(int size, int64_t H, Exchange exchange, int ctas, int limit) {
  ForwardPlan plan{exchange, ctas};
  const int64_t pairs = divide_up(H, kUnits);
  plan.tiles = int(divide_up(pairs, ctas));
  plan.chunks = int(divide_up(H * size, kChunk));
  // as many warps as hold the weights in registers, if there are so many
  const int wanted = int(divide_up(plan.chunks, kRegisterChunks));
  const int room = plan.tiles > kMaxWarps ? 1 : kMaxWarps / plan.tiles;
  plan.splits = wanted < room ? wanted : room;
  plan.warp_chunks = int(divide_up(plan.chunks, plan.splits));
  const int in_memory = plan.warp_chunks - kRegisterChunks;
  const int row = plan.chunks * kChunk;
  plan.h_stride = row % 128 == 0 ? row + 64 : row;
  int64_t at = int64_t(plan.warps()) * (in_memory > 0 ? in_memory : 0) * 8 * 512;
  plan.h = int(at);
  const int64_t others =
      plan.tiles * int64_t(kRows * kUnits * (4 * size + 4 + size)) + (plan.splits - 1) * plan.tiles * 8ll * 512;
  plan.h_buffers = exchange == Exchange::grid || at + 2ll * kRows * plan.h_stride + others > limit ? 1 : 2;
  at += int64_t(plan.h_buffers) * kRows * plan.h_stride;
  plan.stage = int(at);
  plan.tile_stage = kRows * kUnits * (4 * size + 4 + size);
  at += int64_t(plan.tiles) * plan.tile_stage;
  plan.sums = int(at);
  at += int64_t(plan.splits - 1) * plan.tiles * 8 * 512;
  plan.bytes = int(at < (1 << 30) ? at : 1 << 30);
  return plan;
}

inline BackwardPlan backward_plan(int size, int64_t H, Exchange exchange, int ctas) {
  BackwardPlan plan{exchange, ctas};
  plan.pairs = int(divide_up(H, kUnits));
  plan.tiles = int(divide_up(plan.pairs, ctas));
  plan.warps = plan.pairs < kMaxWarps ? plan.pairs : kMaxWarps;
  plan.warp_pairs = int(divide_up(plan.pairs, plan.warps));
  plan.chunks = plan.tiles * 4 * kUnits * size / kChunk;
  const int64_t items = int64_t(plan.warp_pairs) * plan.chunks;
  const int64_t in_memory = items - kRegisterItems;
  int64_t at = plan.warps * (in_memory > 0 ? in_memory : 0) * 2 * 512;
  plan.received = int(at);
  if (exchange == Exchange::cluster) at += 2ll * ctas * plan.tiles * 2 * 512;
  plan.dz = int(at);
  at += 2ll * plan.tiles * 4 * dz_plane(size);
  plan.cells = int(at);
  at += (keeps_cells(size) ? 2ll : 1ll) * plan.tiles * kRows * kUnits * 4;
  plan.dy = int(at);
  at += int64_t(plan.tiles) * kRows * kUnits * size;
  plan.dc = int(at);
  at += int64_t(plan.tiles) * kRows * kUnits * 4;
  plan.bytes = int(at < (1 << 30) ? at : 1 << 30);
  return plan;
}

}  // namespace birnn::cuda
