// Device code that the persistent kernels share: products on tensor cores, the layout of shared memory, accesses of
// 16 bytes, and the barrier of a group of CTAs.
#pragma once

#include <cassert>

#include "../core/cells/lstm.h"
#include "cell_math.cuh"
#include "persistent.h"

namespace birnn::cuda {

// --- products

// mma computes
// D (16 x 8) += A (16 x K) B (K x 8). A is h or dz: a row for each sequence. B is the weights: a column for each gate
// of a unit. Both are read in pieces of 16 bytes along K: of each row of a chunk (64 bytes), lane 4 g + t holds piece
// t. The order of k within a sum is free as long as A and B agree on it, so words 2j and 2j + 1 of a piece serve as the
// operands of the j-th of two mma, for 16-bit types (K = 16) and for TF32 (K = 8) alike.
//
// Of D, lane 4 g + t holds columns 2t and 2t + 1 of rows g (values 0 and 1) and g + 8 (values 2 and 3). The columns are
// 8 units of one gate, so a lane has all gates of its units without any exchange.

// Rows g and g + 8 of one chunk of A.
template <class S>
struct Operand {
  uint4 rows[2];
};

// float32 is split in two TF32 values, of 11 bits each: x = high + low.
template <>
struct Operand<float> {
  uint4 rows[2];
  uint4 low[2];
};

// Rounded to TF32's 11 bits: half a unit added, the rest cut off. Infinity less infinity leaves no number for the low
// part (to keep it would take as many instructions again as the split itself), so an infinite weight or h0 mostly makes
// NaN in float32. A NaN must be the one of quiet(), as others could turn into zeros here.
inline __device__ uint32_t tf32_high(uint32_t x) { return (x + 0x1000u) & 0xffffe000u; }
inline __device__ uint32_t tf32_low(uint32_t x, uint32_t high) {
  return __float_as_uint(__uint_as_float(x) - __uint_as_float(high)) + 0x1000u;  // mma cuts off the rest
}

inline __device__ float quiet(float x) { return x == x ? x : __int_as_float(0x7fc00000); }

// Elements as products take them.
template <class S>
__device__ uint4 factor(uint4 v) {
  return v;
}
template <>
inline __device__ uint4 factor<float>(uint4 v) {
  const auto word = [](uint32_t x) { return __float_as_uint(quiet(__uint_as_float(x))); };
  return {word(v.x), word(v.y), word(v.z), word(v.w)};
}
template <class S>
__device__ float factor(float x) {
  return sizeof(S) == 4 ? quiet(x) : x;
}

inline __device__ uint32_t word(const uint4& v, int k) { return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w; }

template <class S>
__device__ Operand<S> operand(uint4 g, uint4 g8) {
  return {{g, g8}};
}
template <>
inline __device__ Operand<float> operand<float>(uint4 g, uint4 g8) {
  Operand<float> a;
  a.rows[0] = {tf32_high(g.x), tf32_high(g.y), tf32_high(g.z), tf32_high(g.w)};
  a.rows[1] = {tf32_high(g8.x), tf32_high(g8.y), tf32_high(g8.z), tf32_high(g8.w)};
  a.low[0] = {tf32_low(g.x, a.rows[0].x), tf32_low(g.y, a.rows[0].y), tf32_low(g.z, a.rows[0].z),
              tf32_low(g.w, a.rows[0].w)};
  a.low[1] = {tf32_low(g8.x, a.rows[1].x), tf32_low(g8.y, a.rows[1].y), tf32_low(g8.z, a.rows[1].z),
              tf32_low(g8.w, a.rows[1].w)};
  return a;
}

template <class S>
__device__ void mma(float (&d)[4], const uint4 (&a)[2], int j, uint32_t b0, uint32_t b1);

#define BIRNN_MMA(S, SHAPE)                                                                                   \
  template <>                                                                                                 \
  inline __device__ void mma<S>(float (&d)[4], const uint4(&a)[2], int j, uint32_t b0, uint32_t b1) {         \
    asm volatile("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                 : "r"(word(a[0], 2 * j)), "r"(word(a[1], 2 * j)), "r"(word(a[0], 2 * j + 1)),                \
                   "r"(word(a[1], 2 * j + 1)), "r"(b0), "r"(b1));                                             \
  }
BIRNN_MMA(__half, "m16n8k16.row.col.f32.f16.f16.f32")
BIRNN_MMA(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
BIRNN_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef BIRNN_MMA

// Keeps what is derived from a register (the two parts of a float32) from being computed once for all steps and kept.
inline __device__ void opaque(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }

template <class... Ints>
__device__ void forget(Ints&... values) {
  (..., [](int& v) { asm volatile("" : "+r"(v)); }(values));
}

// sums[n] += A weights[n] over one chunk. A float32 chunk is summed on its own, the small products first: tensor cores
// cut off what does not fit their sum, and over a long one that would add up.
template <class S, int N>
__device__ void multiply(float (&sums)[N][4], const Operand<S>& a, const uint4 (&weights)[N], bool exact) {
  if constexpr (sizeof(S) == 4) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float part[4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t b0 = word(weights[n], 2 * j), b1 = word(weights[n], 2 * j + 1);
        const uint32_t high0 = tf32_high(b0), high1 = tf32_high(b1);
        if (exact) {
          mma<S>(part, a.low, j, high0, high1);
          mma<S>(part, a.rows, j, tf32_low(b0, high0), tf32_low(b1, high1));
        }
        mma<S>(part, a.rows, j, high0, high1);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] += part[i];
    }
  } else {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int n = 0; n < N; ++n) mma<S>(sums[n], a.rows, j, word(weights[n], 2 * j), word(weights[n], 2 * j + 1));
  }
}

// --- memory

template <class E>
constexpr int kPerPiece = kPiece / int(sizeof(E));  // elements of a 16-byte piece

inline __device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, without waiting.
inline __device__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
inline __device__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// One access, where the compiler would sometimes make four of it.
inline __device__ void store_global(void* to, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// A plane is 16 rows (sequences) of 16 units of type E in shared memory. Its pieces are swizzled so that neither
// accesses of whole pieces nor a lane's pairs of units meet in a bank.
template <class E>
constexpr int kPlane = kRows * kUnits * int(sizeof(E));

template <class E>
__device__ int swizzled(int row, int piece) {
  return sizeof(E) == 4 ? piece ^ (row & 2) : piece ^ (row >> 2 & 1);
}

// Offset of a piece of a plane, and of the pair of units (unit, unit + 1), unit being even.
template <class E>
__device__ int piece_at(int row, int piece) {
  return row * kUnits * int(sizeof(E)) + swizzled<E>(row, piece) * kPiece;
}
template <class E>
__device__ int pair_at(int row, int unit) {
  return piece_at<E>(row, unit / kPerPiece<E>) + unit % kPerPiece<E> * int(sizeof(E));
}

template <class E>
struct alignas(2 * sizeof(E)) Pair {
  E values[2];
};

template <class E>
__device__ float2 load_pair(const char* at) {
  const auto pair = *reinterpret_cast<const Pair<E>*>(at);
  return {convert(pair.values[0], 0.f), convert(pair.values[1], 0.f)};
}
template <class E>
__device__ void store_pair(char* at, float2 v) {
  *reinterpret_cast<Pair<E>*>(at) = {{convert(v.x, E()), convert(v.y, E())}};
}

// Calls f(row, piece) for every piece of a plane, a warp's lanes in parallel.
template <class E, class F>
__device__ void for_pieces(int lane, F f) {
  constexpr int pieces = kUnits * int(sizeof(E)) / kPiece;
#pragma unroll 1  // addresses of one piece at a time: registers are for weights
  for (int index = lane; index < kRows * pieces; index += 32) f(index / pieces, index % pieces);
}

// Elements [unit, unit + a piece) of a row of H elements, as a piece; 0 beyond H.
template <class E>
__device__ uint4 load_piece(const E* row, int64_t unit, int64_t H, bool wide) {
  union {
    uint4 piece;
    E values[kPerPiece<E>];
  };
  if (wide) return unit < H ? *reinterpret_cast<const uint4*>(row + unit) : uint4{0, 0, 0, 0};
#pragma unroll
  for (int e = 0; e < kPerPiece<E>; ++e) values[e] = unit + e < H ? row[unit + e] : convert(0.f, E());
  return piece;
}

// A piece in shared memory to a row of H elements; zeros in its place if it is not `there`.
template <class E>
__device__ void store_piece(E* row, int64_t unit, int64_t H, bool wide, const char* from, bool there = true) {
  if (wide) {
    if (unit < H)
      *reinterpret_cast<uint4*>(row + unit) = there ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
    return;
  }
#pragma unroll 1
  for (int e = 0; e < kPerPiece<E> && unit + e < H; ++e)
    row[unit + e] = there ? reinterpret_cast<const E*>(from)[e] : convert(0.f, E());
}

// The same from global to shared memory, without waiting if wide; what lies beyond H is left as it is.
template <class E>
__device__ void fetch_piece(char* to, const E* row, int64_t unit, int64_t H, bool wide) {
  if (wide) {
    if (unit < H) copy_async(to, row + unit);
    return;
  }
#pragma unroll 1
  for (int e = 0; e < kPerPiece<E> && unit + e < H; ++e) reinterpret_cast<E*>(to)[e] = row[unit + e];
}

// --- groups

// What a thread stored before it arrives is seen by all threads of the cluster that have waited.
inline __device__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
  __trap();
#endif
}
inline __device__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

// Stores 16 bytes at the same place of another CTA's shared memory.
inline __device__ void store_remote(void* to, int rank, uint4 v) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(to)), "r"(rank));
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
#else
  __trap();
#endif
}

constexpr long long kPatience = 20'000'000'000;  // clock ticks, of 0.5 to 1 ns, that a CTA waits for its group

// Every thread's writes to global memory are seen by the whole group afterwards. arrivals counts up by P each time;
// expected: what it is to reach.
inline __device__ void grid_barrier(unsigned* arrivals, unsigned expected) {
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned arrived;
    __threadfence();
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
    const long long start = clock64();
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(arrivals) : "memory");
      // the difference, as the counter may wrap around
      if (int(arrived - expected) < 0 && clock64() - start > kPatience)
        __assert_fail("a thread block of a persistent LSTM kernel did not arrive in 10 to 20 s", __FILE__, __LINE__,
                      __func__);
    } while (int(arrived - expected) < 0);
    __threadfence();
  }
  __syncthreads();
}

}  // namespace birnn::cuda
