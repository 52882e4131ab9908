// Products of small matrices on tensor cores: D (16 x 8) += A (16 x K) B (K x 8), with K 16 for 16-bit types and 8 for
// TF32, and sums in float32.
//
// Lane 4 g + t holds of A rows g and g + 8, of B column g, of D columns 2 t and 2 t + 1 of rows g and g + 8. PTX counts
// k in an order of its own; any other does, as long as A and B agree. Here lane t has 4 neighbouring k (TF32: 2), so
// that it reads 8 bytes of B, and of each row of A.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace birnn::cuda {

template <class S>
constexpr int kMmaDepth = 32 / int(sizeof(S));  // K

// a: {row g, row g + 8} of the first half of the lane's k, then of the second; b: the same halves of column g.
template <class S>
__device__ void mma(float (&d)[4], const uint4& a, const uint2& b);

#define BIRNN_MMA(S, SHAPE)                                                                                   \
  template <>                                                                                                 \
  inline __device__ void mma<S>(float (&d)[4], const uint4& a, const uint2& b) {                              \
    asm volatile("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));                               \
  }
BIRNN_MMA(__half, "m16n8k16.row.col.f32.f16.f16.f32")
BIRNN_MMA(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
BIRNN_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef BIRNN_MMA

// A float32 as the sum of two TF32 values, of 11 bits each. The high one is rounded: half a unit is added, and the rest
// cut off; of the low one the tensor core cuts off the rest. Infinity less infinity leaves no number for the low part
// (to keep it would take as many instructions again), so an infinite factor mostly makes NaN. A NaN must be the one of
// quiet(), as others could turn into zeros here.
inline __device__ uint32_t tf32_high(uint32_t x) { return (x + 0x1000u) & 0xffffe000u; }
inline __device__ uint32_t tf32_low(uint32_t x, uint32_t high) {
  return __float_as_uint(__uint_as_float(x) - __uint_as_float(high)) + 0x1000u;
}
inline __device__ uint4 tf32_high(const uint4& x) {
  return {tf32_high(x.x), tf32_high(x.y), tf32_high(x.z), tf32_high(x.w)};
}
inline __device__ uint4 tf32_low(const uint4& x, const uint4& high) {
  return {tf32_low(x.x, high.x), tf32_low(x.y, high.y), tf32_low(x.z, high.z), tf32_low(x.w, high.w)};
}
inline __device__ uint2 tf32_high(const uint2& x) { return {tf32_high(x.x), tf32_high(x.y)}; }
inline __device__ uint2 tf32_low(const uint2& x, const uint2& high) {
  return {tf32_low(x.x, high.x), tf32_low(x.y, high.y)};
}
inline __device__ float quiet(float x) { return x == x ? x : __int_as_float(0x7fc00000); }

}  // namespace birnn::cuda
