#include "memory.h"

#include <algorithm>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace birnn::cpu {
namespace {
constexpr std::align_val_t kAlign{64};
constexpr int64_t kHugePage = 2 << 20;
}  // namespace

void Free::operator()(void* p) const { ::operator delete(p, kAlign); }

Buffer allocate(int64_t bytes) {
  bytes = std::max<int64_t>(bytes, 1);
  Buffer buffer(::operator new(static_cast<size_t>(bytes), kAlign));
  advise_huge_pages(buffer.get(), bytes);
  return buffer;
}

Buffer allocate_zeros(int64_t bytes) {
  Buffer buffer = allocate(bytes);
  std::memset(buffer.get(), 0, static_cast<size_t>(bytes));
  return buffer;
}

void advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  const auto address = reinterpret_cast<uintptr_t>(p);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage,
                  end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may fail, which is harmless
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace birnn::cpu
