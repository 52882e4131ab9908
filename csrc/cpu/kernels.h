// What each ISA's build of the recurrence kernels offers. One such table per ISA; isa.h chooses among them.
#pragma once

#include <cstdint>

#include "../core/recurrence.h"

namespace birnn::cpu {

// A chain is one direction of some sequences: it depends on no other chain, over all time steps.
struct Chain {
  int64_t direction;
  const int64_t* rows;  // (count) indices of its sequences, longest first
  int64_t count;
};

struct Kernels {
  const char* isa;

  // Weights are packed once per call and direction, in blocks of `lanes` hidden units (the last one padded with 0).
  int64_t (*lanes)(DType);
  int64_t (*accumulate_bytes)(DType);
  void (*pack_forward)(DType, const void* w_hh, int64_t H, int64_t block, void* panels);
  void (*pack_backward)(DType, const void* w_hh, int64_t H, int64_t block, void* panels);

  // Run one chain. panels: the packed weights of its direction. scratch: 3 (backward: 9) values per sequence and padded
  // unit. Both are aligned to
  // 64 bytes.
  void (*forward)(DType, const ForwardParams&, const Chain&, const void* panels, void* scratch);
  void (*backward)(DType, const BackwardParams&, const Chain&, const void* panels, void* scratch);

  // The cell's functions by themselves, for their test: n floats in, n out.
  void (*sigmoid)(const float* x, float* y, int64_t n);
  void (*tanh)(const float* x, float* y, int64_t n);
};

}  // namespace birnn::cpu
