// Memory for the kernels, aligned to cache lines and to the widest vector.
#pragma once

#include <cstdint>
#include <memory>

namespace birnn::cpu {

struct Free {
  void operator()(void* p) const;
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(int64_t bytes);
Buffer allocate_zeros(int64_t bytes);

// Asks for huge pages if the memory is large, because a page fault costs about as much as writing its 4 KiB.
void advise_huge_pages(void* p, int64_t bytes);

}  // namespace birnn::cpu
