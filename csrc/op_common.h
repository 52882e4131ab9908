// What the CPU and the CUDA operator share: checks of the arguments, allocation of the results, counting of calls.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <optional>
#include <tuple>

#include "core/recurrence.h"

namespace birnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// How often each compiled operator has run in this process; read by birnn_ext.op_calls().
struct OpCalls {
  std::atomic<int64_t> cpu_forward{0}, cpu_backward{0}, cuda_forward{0}, cuda_backward{0};
};
inline OpCalls op_calls;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::f64;
    case at::kFloat:
      return DType::f32;
    case at::kHalf:
      return DType::f16;
    case at::kBFloat16:
      return DType::bf16;
    default:
      TORCH_CHECK_TYPE(false, "lstm_recurrence: ", name, " must be float64, float32, float16 or bfloat16, got ",
                       t.scalar_type());
  }
}

// The type of the saved cell states, in which the kernels accumulate.
inline at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

inline void check(const Tensor& t, const char* name, at::IntArrayRef shape, at::ScalarType type, at::Device device) {
  TORCH_CHECK_VALUE(t.sizes() == shape, "lstm_recurrence: ", name, " must have shape ", shape, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == type, "lstm_recurrence: ", name, " must be ", type, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == device, "lstm_recurrence: ", name, " must be on ", device, ", got ", t.device());
}

inline void check(const OptionalTensor& t, const char* name, at::IntArrayRef shape, at::ScalarType type,
                  at::Device device) {
  if (t) check(*t, name, shape, type, device);
}

// Tensors made contiguous, kept alive as long as the params that point into them.
struct Held {
  Tensor tensors[8];
  int count = 0;
  template <class T = void>
  const T* pointer(const OptionalTensor& t) {
    if (!t || !t->defined()) return nullptr;
    tensors[count] = t->contiguous();
    return static_cast<const T*>(tensors[count++].const_data_ptr());
  }
};

struct Forward {
  DType dtype;
  ForwardParams params;
  Held inputs;
  Tensor y, h_n, c_n, gates, cells;
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> results() const { return {y, h_n, c_n, gates, cells}; }

  Forward(const Tensor& gates_x, const Tensor& w_hh, const OptionalTensor& h0, const OptionalTensor& c0,
          const OptionalTensor& lengths, bool save) {
    dtype = dtype_of(gates_x, "gates_x");
    const auto type = gates_x.scalar_type();
    const auto device = gates_x.device();
    TORCH_CHECK_VALUE(gates_x.dim() == 4 && gates_x.size(3) % 4 == 0 && gates_x.size(3) > 0,
                      "lstm_recurrence: gates_x must have shape (T, B, D, 4H), got ", gates_x.sizes());
    const int64_t T = gates_x.size(0), B = gates_x.size(1), D = gates_x.size(2), H = gates_x.size(3) / 4;
    TORCH_CHECK_VALUE(T > 0, "lstm_recurrence: gates_x must have at least one time step, got shape ", gates_x.sizes());
    TORCH_CHECK_VALUE(D == 1 || D == 2, "lstm_recurrence: gates_x must have 1 or 2 directions, got shape ",
                      gates_x.sizes());
    check(w_hh, "w_hh", {D, 4 * H, H}, type, device);
    check(h0, "h0", {D, B, H}, type, device);
    check(c0, "c0", {D, B, H}, type, device);
    check(lengths, "lengths", {B}, at::kLong, device);

    const auto options = gates_x.options();
    y = at::empty({T, B, D, H}, options);
    h_n = at::empty({D, B, H}, options);
    c_n = at::empty({D, B, H}, options);
    gates = save ? at::empty({T, B, D, 4 * H}, options) : at::empty({0}, options);
    cells = at::empty({0}, options.dtype(accumulate_type(type)));
    if (save) cells = at::empty({T, B, D, H}, cells.options());

    static_cast<RecurrenceSizes&>(params) = {T, B, D, H};
    params.gates_x = inputs.pointer(gates_x);
    params.w_hh = inputs.pointer(w_hh);
    params.h0 = inputs.pointer(h0);
    params.c0 = inputs.pointer(c0);
    params.lengths = inputs.pointer<int64_t>(lengths);
    params.y = y.mutable_data_ptr();
    params.h_n = h_n.mutable_data_ptr();
    params.c_n = c_n.mutable_data_ptr();
    params.gates = save ? gates.mutable_data_ptr() : nullptr;
    params.cells = save ? cells.mutable_data_ptr() : nullptr;
  }
};

struct Backward {
  DType dtype;
  BackwardParams params;
  Held inputs;
  Tensor d_gates_x, dh0, dc0;
  std::tuple<Tensor, Tensor, Tensor> results() const { return {d_gates_x, dh0, dc0}; }

  Backward(const Tensor& w_hh, const OptionalTensor& c0, const OptionalTensor& lengths, const Tensor& gates,
           const Tensor& cells, const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
           bool state_grads) {
    dtype = dtype_of(gates, "gates");
    const auto type = gates.scalar_type();
    const auto device = gates.device();
    TORCH_CHECK_VALUE(gates.dim() == 4 && gates.size(3) % 4 == 0 && gates.size(0) > 0,
                      "lstm_recurrence_backward: gates must be those of a forward call with save=True, got shape ",
                      gates.sizes());
    const int64_t T = gates.size(0), B = gates.size(1), D = gates.size(2), H = gates.size(3) / 4;
    TORCH_CHECK_VALUE(D == 1 || D == 2, "lstm_recurrence_backward: gates must have 1 or 2 directions, got shape ",
                      gates.sizes());
    check(w_hh, "w_hh", {D, 4 * H, H}, type, device);
    check(c0, "c0", {D, B, H}, type, device);
    check(lengths, "lengths", {B}, at::kLong, device);
    check(cells, "cells", {T, B, D, H}, accumulate_type(type), device);
    check(dy, "dy", {T, B, D, H}, type, device);
    check(dh_n, "dh_n", {D, B, H}, type, device);
    check(dc_n, "dc_n", {D, B, H}, type, device);

    const auto options = gates.options();
    d_gates_x = at::empty({T, B, D, 4 * H}, options);
    dh0 = state_grads ? at::empty({D, B, H}, options) : at::empty({0}, options);
    dc0 = at::empty(dh0.sizes(), options);

    static_cast<RecurrenceSizes&>(params) = {T, B, D, H};
    params.w_hh = inputs.pointer(w_hh);
    params.c0 = inputs.pointer(c0);
    params.lengths = inputs.pointer<int64_t>(lengths);
    params.gates = inputs.pointer(gates);
    params.cells = inputs.pointer(cells);
    params.dy = inputs.pointer(dy);
    params.dh_n = inputs.pointer(dh_n);
    params.dc_n = inputs.pointer(dc_n);
    params.d_gates_x = d_gates_x.mutable_data_ptr();
    params.dh0 = state_grads ? dh0.mutable_data_ptr() : nullptr;
    params.dc0 = state_grads ? dc0.mutable_data_ptr() : nullptr;
  }
};

}  // namespace birnn
