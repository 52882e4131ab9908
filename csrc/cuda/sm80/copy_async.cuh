// Copies from global to shared memory that nobody waits for until their group is wanted.
#pragma once

#include <cstdint>

namespace birnn::cuda {

inline __device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

template <int kBytes>
__device__ void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes)
                 : "memory");
#endif
}

// The copies so far, of this thread, become a group; wait until all groups but the newest kNewest are there.
inline __device__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kNewest>
__device__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
#endif
}

}  // namespace birnn::cuda
