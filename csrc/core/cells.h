// All cells. Code that does not have the type of a cell has its CellKind, and asks here. As the CPU kernels include
// this file once per ISA, all is inlined: no function may be shared with code for other CPUs.
#pragma once

#include <type_traits>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "recurrence.h"

namespace birnn {

// The type in which the backward pass finds the states of a cell: that of y, if it has them.
template <class Cell, class S>
using SavedState = std::conditional_t<Cell::kStateIsOutput, S, Accumulate<S>>;

// Tells whether the recurrent part of a gate has a value of its own.
template <class Cell>
BIRNN_INLINE constexpr bool is_apart(int gate) {
  return Cell::recurrent_value(gate) != Cell::input_value(gate);
}

constexpr CellKind kCells[] = {CellKind::lstm, CellKind::gru, CellKind::rnn_tanh, CellKind::rnn_relu};

// Calls f with an object of the cell's type, and returns what it does.
template <class F>
BIRNN_INLINE_HOST constexpr auto with_cell(CellKind cell, const F& f) {
  switch (cell) {
    case CellKind::gru:
      return f(Gru());
    case CellKind::rnn_tanh:
      return f(Rnn<CellKind::rnn_tanh>());
    case CellKind::rnn_relu:
      return f(Rnn<CellKind::rnn_relu>());
    case CellKind::lstm:
      break;
  }
  return f(Lstm());
}

// The beginning of the operators' names.
BIRNN_INLINE_HOST constexpr const char* name_of(CellKind cell) {
  return with_cell(cell, [](auto of) BIRNN_INLINE_LAMBDA { return decltype(of)::kName; });
}

// What core/cells/lstm.h says of these.
BIRNN_INLINE_HOST constexpr int gates_of(CellKind cell) {
  return with_cell(cell, [](auto of) BIRNN_INLINE_LAMBDA { return decltype(of)::kGates; });
}
BIRNN_INLINE_HOST constexpr int values_of(CellKind cell) {
  return with_cell(cell, [](auto of) BIRNN_INLINE_LAMBDA { return decltype(of)::kValues; });
}
BIRNN_INLINE_HOST constexpr int recurrent_value_of(CellKind cell, int gate) {
  return with_cell(cell, [gate](auto of) BIRNN_INLINE_LAMBDA { return decltype(of)::recurrent_value(gate); });
}
BIRNN_INLINE_HOST constexpr bool state_is_output(CellKind cell) {
  return with_cell(cell, [](auto of) BIRNN_INLINE_LAMBDA { return decltype(of)::kStateIsOutput; });
}
BIRNN_INLINE_HOST constexpr bool saves_values(CellKind cell) {
  return with_cell(cell, [](auto of) BIRNN_INLINE_LAMBDA { return decltype(of)::kSavesValues; });
}

}  // namespace birnn
