// Memory of the kernels, aligned to cache lines and to the widest vector.
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

// Asks for huge pages where fresh memory is large: a page fault costs about as much as the 4 KiB it brings.
void advise_huge_pages(void* p, int64_t bytes);

}  // namespace birnn::cpu
