// A barrier for threads that all run at the same time. They spin on it, because a step of a small LSTM takes only about
// as long as a futex call.
#pragma once

#include <atomic>
#include <cstdint>

namespace birnn::cpu {

class alignas(64) Barrier {
 public:
  // Returns once `count` threads have called it; what they wrote before is then visible to all of them.
  void wait(int64_t count);

 private:
  std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

}  // namespace birnn::cpu
