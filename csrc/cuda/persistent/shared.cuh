// What the forward and the backward kernel share: who a thread is, accesses to rows of any alignment, weights.
#pragma once

#include <type_traits>
#include <utility>

#include "../../core/cells.h"
#include "../../core/step_order.h"
#include "../cell_math.cuh"
#include "../sm80/copy_async.cuh"
#include "../sm80/mma.cuh"
#include "kernels.h"

namespace birnn::cuda {

#if defined(__CUDA_ARCH__)
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 90;
#endif
template <Exchange kExchange>
constexpr bool kCanRun = kArchitecture >= (kExchange == Exchange::cluster ? 90 : 80);

template <CellKind kCell>
using CellOf = std::conditional_t<kCell == CellKind::lstm, Lstm, std::conditional_t<kCell == CellKind::gru, Gru, void>>;

// A thread's place: its lane (g and t as in mma.cuh; t is not a time step), its warp in the CTA, the CTA's rank in its
// group, the group of CTAs, and the direction d that this group runs.
struct Place {
  int lane, g, t, warp;
  int rank, group;
  int d;

  template <class Params>
  __device__ explicit Place(const Params& p)
      : lane(threadIdx.x % kWarp),
        g(lane / 4),
        t(lane % 4),
        warp(threadIdx.x / kWarp),
        rank(int(blockIdx.x) % p.plan.ctas),
        group(int(blockIdx.x) / p.plan.ctas),
        d(group % int(p.D)) {}
};

// The iterations in which a sequence of some length has a step: from `first` on, `length` of them. One that has none
// keeps its state, as does padding.
struct Activity {
  int first, length;
  __device__ bool at(int s) const { return unsigned(s - first) < unsigned(length); }
  __device__ bool ends_at(int s) const { return s + 1 == first + length; }
};

// The length of sequence b, as the cell of one unit sees it: 0 if sequence or unit is padding.
template <class Params>
__device__ int length_of(const Params& p, int64_t b, int unit) {
  return b < p.B && unit < p.H ? int(birnn::length_of(p.lengths, b, p.T)) : 0;
}

// Returns x, but hides from the compiler where it comes from. So the compiler keeps it in a register, rather than
// compute it anew in each step.
template <class V>
__device__ V kept(V x) {
  if constexpr (sizeof(V) == 8)
    asm volatile("" : "+l"(x));
  else
    asm volatile("" : "+r"(x));
  return x;
}

// --- values

// The cell's functions. Those for 16 bits are wrong by up to 1e-7, far less than the rounding of a result, and take a
// third of the instructions.
template <class S>
struct CellMath {
  using Scalar = float;
  static constexpr float kLog2E = 1.44269504f;
  static __device__ float sigmoid(float x) { return reciprocal(1.f + exp2(-kLog2E * x)); }
  static __device__ float tanh(float x) { return fmaf(-2.f, reciprocal(1.f + exp2(2.f * kLog2E * x)), 1.f); }

 private:
  static __device__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
};
template <>
struct CellMath<float> : Math<float> {};

// Returns x as products may take it: in float32 a NaN must be the one of quiet(), see mma.cuh.
template <class S>
__device__ float factor(float x) {
  return sizeof(S) == 4 ? quiet(x) : x;
}

template <class S>
__device__ float load(const void* from, int64_t at) {
  return convert(static_cast<const S*>(from)[at], 0.f);
}

inline __device__ uint32_t bits_of(float x) { return __float_as_uint(x); }
inline __device__ uint32_t bits_of(__half x) { return __half_as_ushort(x); }
inline __device__ uint32_t bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }

// Two elements of a sum's factor in 32 bits; one of float32.
template <class S>
__device__ uint32_t pair_of(S a, S b) {
  return bits_of(a) | bits_of(b) << 16;
}

// --- a ring of stages, filled some steps ahead of those that read them

// Copies 16 bytes of a row, of which `valid` exist, where the row can't be read by 16 bytes.
template <class S>
__device__ void copy_parts(char* to, const char* from, int valid, int access) {
  if (access == 8) {
#pragma unroll
    for (int k = 0; k < 16; k += 8)
      if (k < valid) copy_async<8>(to + k, from + k);
  } else if (access == 4) {
#pragma unroll
    for (int k = 0; k < 16; k += 4)
      if (k < valid) copy_async<4>(to + k, from + k);
  } else {
#pragma unroll 1
    for (int k = 0; k < valid; k += int(sizeof(S)))
      *reinterpret_cast<S*>(to + k) = *reinterpret_cast<const S*>(from + k);
  }
}

// A warp's own ring in shared memory: a stage is what the warp's cells need of global memory for a step, in pieces of
// 16 bytes that its lanes copy. Rows of a piece that do not exist stay 0.
template <class S, class Row>
struct Ring {
  static constexpr int kStages = Row::kStages, kStage = Row::template kStageBytes<S>;
  static constexpr int kPieces = kStage / kPiece, kOfLane = int(divide_up(kPieces, kWarp));
  char* memory;
  int first, to;  // offsets of the warp's first stage, and of where the lane's first piece goes there
  const char* from[kOfLane];
  int64_t stride[kOfLane];  // bytes from step to step
  int valid[kOfLane];       // bytes of the piece that exist
  int until[kOfLane];       // the piece exists in steps below this
  int access;               // bytes by which memory may be read

  __device__ Ring(char* shared, int rings, int warps, int turn, const Place& place, int access)
      : memory(shared),
        first(rings + (turn * warps + place.warp) * kStages * kStage),
        to(kept(first + place.lane * kPiece)),
        access(access) {}

  // The lane's j-th piece is piece id() of a stage.
  static __device__ int id(int lane, int j) { return lane + j * kWarp; }
  __device__ void set(int j, const void* piece, int64_t bytes, int64_t exist, int steps) {
    from[j] = kept(static_cast<const char*>(piece));
    stride[j] = bytes;
    valid[j] = int(min(int64_t(kPiece), max(int64_t(0), exist)));
    until[j] = kept(valid[j] > 0 ? steps : 0);
  }

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < kOfLane; ++j)
      if (id((to - first) / kPiece, j) < kPieces) {
#pragma unroll 1
        for (int s = 0; s < kStages; ++s)
          *reinterpret_cast<uint4*>(memory + (to + s * kStage + j * kWarp * kPiece)) = {0, 0, 0, 0};
      }
    __syncwarp();
  }
  __device__ void fetch(int s, int stage) {
    char* const stage_memory = memory + (to + stage);
#pragma unroll
    for (int j = 0; j < kOfLane; ++j) {
      if (s < until[j]) {
        if (access == kPiece)
          copy_async<kPiece>(stage_memory + j * kWarp * kPiece, from[j]);
        else
          copy_parts<S>(stage_memory + j * kWarp * kPiece, from[j], valid[j], access);
      }
      from[j] += stride[j];
    }
    commit_copies();
  }

  // acquire() waits for the stage of step s, and returns its offset. release() starts to fill it with step s + kStages.
  // A thread's copies complete in the order in which it commits them, and with two groups it fills their rings in turn:
  // so all but the newest kTurns * kStages - 1 commits must be there.
  __device__ int acquire(int s) const {
    wait_for_copies<Row::kTurns * kStages - 1>();
    __syncwarp();
    return s % kStages * kStage;
  }
  __device__ void release(int s, int stage) {
    __syncwarp();
    fetch(s + kStages, stage);
  }
};

// The passes in which a group of CTAs goes through the batch. There is one pass, except in grid: all CTAs are resident
// there, and may be too few for the whole batch at once.
template <class Row>
struct Passes {
  int64_t b0;     // the first sequence of this group of CTAs, in this pass
  int64_t batch;  // sequences of a pass
  int64_t B;      // sequences in all

  template <class Params>
  __device__ Passes(const Params& p, const Place& place)
      : b0(int64_t(place.group / int(p.D)) * (Row::kTurns * Row::kSequences)),
        batch(p.groups / p.D * (Row::kTurns * Row::kSequences)),
        B(p.B) {}
  __device__ bool next() {
    b0 += batch;
    return Row::kExchange == Exchange::grid && b0 < B;
  }
};

// Starts the copies of the first kStages steps, for all groups in turn, in the order in which acquire() waits.
template <class Group, size_t kTurns>
__device__ void fill_rings(Group (&groups)[kTurns]) {
#pragma unroll 1
  for (int s = 0; s < groups[0].ring.kStages; ++s)
#pragma unroll
    for (int turn = 0; turn < int(kTurns); ++turn) groups[turn].ring.fetch(s, s * groups[turn].ring.kStage);
}

// --- weights

// Returns 8 bytes of a row of `count` elements, from element k on; 0 beyond. aligned: rows may be read by 8 bytes. The
// loop is not unrolled, as the compiler would make all loads of a kernel's weights at once, for which it lacks
// registers.
template <class S>
__device__ uint2 row_part(const S* row, int k, int count, bool aligned) {
  constexpr int kOfLane = 8 / int(sizeof(S));
  uint2 v = {0, 0};
  if (aligned && k + kOfLane <= count) {
    v = *reinterpret_cast<const uint2*>(row + k);
    if (sizeof(S) == 4) v = {bits_of(quiet(__uint_as_float(v.x))), bits_of(quiet(__uint_as_float(v.y)))};
  } else {
#pragma unroll 1
    for (int e = 0; e < kOfLane && k + e < count; ++e) {
      const uint32_t bits = bits_of(convert(factor<S>(convert(row[k + e], 0.f)), S()));
      const uint32_t word = sizeof(S) == 4 ? bits : bits << e % 2 * 16;
      if (e < kOfLane / 2)
        v.x |= word;
      else
        v.y |= word;
    }
  }
  return v;
}

// A tile's weights for one mma: as they are, or split into two TF32 ahead of all products.
template <class S, bool kAhead>
struct Fragment {
  uint4 v;
  __device__ void operator=(const uint4& x) { v = x; }
};
template <>
struct Fragment<float, true> {
  uint4 v, low;
  __device__ void operator=(const uint4& x) {
    v = tf32_high(x);
    low = tf32_low(x, v);
  }
};

// A column's part for one mma.
template <class S>
struct Column {
  uint2 v;
  Column() = default;
  __device__ explicit Column(const char* from) : v(*reinterpret_cast<const uint2*>(from)) {}
};
template <>
struct Column<float> {
  uint2 v, low;
  Column() = default;
  __device__ explicit Column(const char* from) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    v = tf32_high(x);
    low = tf32_low(x, v);
  }
};

// Sums of a tile and eight columns. Those of float32 are made of runs of kRun steps: tensor cores cut off what does not
// fit their sum, and over a long one that would add up. Products with a low part have a sum of their own.
template <class S>
struct Sums {
  float v[4] = {};
  __device__ void end_run() {}
  __device__ void finish() {}
};
template <>
struct Sums<float> {
  float v[4] = {}, run[4] = {}, low[4] = {};
  __device__ void end_run() {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] += run[i], run[i] = 0;
  }
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] += run[i] + low[i];
  }
};
constexpr int kRun = 4;

template <class S, bool kAhead>
__device__ void multiply(Sums<S>& sums, const Fragment<S, kAhead>& a, const Column<S>& b, bool full_float32) {
  if constexpr (sizeof(S) == 4) {
    uint4 high = a.v, low;
    if constexpr (kAhead) {
      low = a.low;
    } else {
      // not to be computed once for all steps and kept: that would take the registers
      asm volatile("" : "+r"(high.x), "+r"(high.y), "+r"(high.z), "+r"(high.w));
      const uint4 x = high;
      high = tf32_high(x);
      low = tf32_low(x, high);
    }
    if (full_float32) {
      mma<S>(sums.low, high, b.low);
      mma<S>(sums.low, low, b.v);
    }
    mma<S>(sums.run, high, b.v);
  } else {
    mma<S>(sums.v, a.v, b.v);
  }
}

}  // namespace birnn::cuda
