// The order in which a direction visits the steps of a sequence. Direction 0 runs t = 0 .. T-1 and direction 1 runs
// t = T-1 .. 0; the backward pass runs the other way. A sequence of length n consists of its first n steps, so
// direction 1 begins at step n-1, and both directions skip the steps beyond.
#pragma once

#include <cstdint>

#include "inline.h"

namespace birnn {

// lengths is (B), or null if all are T.
BIRNN_INLINE int64_t length_of(const int64_t* lengths, int64_t b, int64_t T) { return lengths ? lengths[b] : T; }

// Int is the type in which a kernel counts steps. "Before" and "after" are meant in the direction's order.
template <class Int>
struct StepOrder {
  Int direction;  // 0 or 1
  Int T;

  // The step of iteration s, 0 <= s < T, of each pass. Each function is its own inverse: it maps a step to its
  // iteration.
  BIRNN_INLINE constexpr Int forward(Int s) const { return direction == 0 ? s : T - 1 - s; }
  BIRNN_INLINE constexpr Int backward(Int s) const { return direction == 0 ? T - 1 - s : s; }

  // active() tells whether a sequence has a step t, first() and last() which of its steps come first and last. A
  // sequence of length 0 has no step.
  BIRNN_INLINE constexpr bool active(Int t, Int length) const { return t < length; }
  BIRNN_INLINE constexpr Int first(Int length) const { return direction == 0 ? 0 : length - 1; }
  BIRNN_INLINE constexpr Int last(Int length) const { return direction == 0 ? length - 1 : 0; }

  // The steps before and after t, which exist unless t is first() or last().
  BIRNN_INLINE constexpr Int before(Int t) const { return direction == 0 ? t - 1 : t + 1; }
  BIRNN_INLINE constexpr Int after(Int t) const { return direction == 0 ? t + 1 : t - 1; }
};

template <class Int>
StepOrder(Int, Int) -> StepOrder<Int>;

}  // namespace birnn
