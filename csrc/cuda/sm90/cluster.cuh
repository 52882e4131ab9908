// Thread-block clusters (compute capability 9.0): the CTAs of one see each other's shared memory, where stores arrive
// without anyone waiting for them, and mbarriers count the bytes that have.
#pragma once

#include <cassert>
#include <cstdint>

#include "../sm80/copy_async.cuh"

namespace birnn::cuda {

// Waiting is bounded, of an mbarrier here and of grid's counter, which GPUs before 9.0 have, too.
constexpr long long kPatience = 20'000'000'000;  // clock ticks, of 0.5 to 1 ns, that a CTA waits for its group

inline __device__ void lost_patience() {
  __assert_fail("a thread block of a persistent LSTM kernel did not arrive in 10 to 20 s", __FILE__, __LINE__,
                __func__);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

inline __device__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The address by which this CTA reaches what is at `address` of its own shared memory, in that of CTA `rank`.
inline __device__ uint32_t remote(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Stores 16 bytes in the CTA that `to` is in; an mbarrier of that CTA counts them when they are there.
inline __device__ void store_async(uint32_t to, const uint4& v, uint32_t mbarrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(mbarrier)
               : "memory");
}

// mbarriers of one arrival, which announces how many bytes will come.
inline __device__ void mbarrier_init(uint32_t mbarrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(mbarrier) : "memory");
}
inline __device__ void mbarrier_inits_seen_by_cluster() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
inline __device__ void mbarrier_expect(uint32_t mbarrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}

// Acquires at the scope of the CTA, as CUTLASS's pipelines do for data that arrive from the cluster or by bulk copies:
// the bytes and their count are both in this CTA's own shared memory, which nothing caches. The cluster's scope would
// make each wait invalidate the L1 cache, 2 to 4 % of a step on an H100.
inline __device__ bool mbarrier_try_wait(uint32_t mbarrier, int parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(mbarrier), "r"(parity)
               : "memory");
  return done;
}
inline __device__ void mbarrier_wait(uint32_t mbarrier, int parity) {
  if (mbarrier_try_wait(mbarrier, parity)) return;
  const long long start = clock64();
  while (!mbarrier_try_wait(mbarrier, parity))
    if (clock64() - start > kPatience) lost_patience();
}

// bulk_copy() copies from global to this CTA's shared memory, counted at an mbarrier; bytes is a multiple of 16. The
// copying unit has a view of memory of its own. acquired_for_bulk_copy() passes to it what other threads wrote to
// global memory and this one has acquired; stored_before_bulk_copy() what this thread wrote to shared memory, so that
// it comes before what a copy will write there.
inline __device__ void acquired_for_bulk_copy() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
inline __device__ void stored_before_bulk_copy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
inline __device__ void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t mbarrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(mbarrier)
               : "memory");
}

#endif

}  // namespace birnn::cuda
