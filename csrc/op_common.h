// The CPU and the CUDA operators share this: they check arguments, allocate results and count calls in the same way.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <optional>
#include <tuple>

#include "core/cells.h"

namespace birnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// birnn_ext.op_calls() reads these: they count how often each compiled operator has run in this process.
struct OpCalls {
  std::atomic<int64_t> cpu_forward{0}, cpu_backward{0}, cuda_forward{0}, cuda_backward{0};
};
inline OpCalls op_calls;

// Says what an operator keeps for its backward pass, as schema.cpp describes.
enum class Save { none, cells, all };

inline Save save_named(c10::string_view name) {
  if (name == "none") return Save::none;
  if (name == "cells") return Save::cells;
  TORCH_CHECK_VALUE(name == "all", "birnn_ext: save must be \"none\", \"cells\" or \"all\", got \"", name, "\"");
  return Save::all;
}

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
      TORCH_CHECK_TYPE(false, "birnn_ext: ", name, " must be float64, float32, float16 or bfloat16, got ",
                       t.scalar_type());
  }
}

// The kernels accumulate in this type, and save cell states in it.
inline at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

inline void check(const Tensor& t, const char* name, at::IntArrayRef shape, at::ScalarType type, at::Device device) {
  TORCH_CHECK_VALUE(t.sizes() == shape, "birnn_ext: ", name, " must have shape ", shape, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == type, "birnn_ext: ", name, " must be ", type, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == device, "birnn_ext: ", name, " must be on ", device, ", got ", t.device());
}

inline void check(const OptionalTensor& t, const char* name, at::IntArrayRef shape, at::ScalarType type,
                  at::Device device) {
  if (t) check(*t, name, shape, type, device);
}

// Checks lengths in host memory.
inline void check_lengths(const int64_t* lengths, const RecurrenceSizes& sizes) {
  for (int64_t b = 0; lengths && b < sizes.B; ++b)
    TORCH_CHECK_VALUE(0 <= lengths[b] && lengths[b] <= sizes.T,
                      "birnn_ext: lengths must be between 0 and T = ", sizes.T, ", got lengths[", b,
                      "] = ", lengths[b]);
}

// Checks lengths on a GPU. The device does so, and the host need not wait for it.
inline void check_lengths_on_device(const OptionalTensor& lengths, const RecurrenceSizes& sizes) {
  if (lengths)
    at::_assert_async(((*lengths >= 0) & (*lengths <= sizes.T)).all(), "birnn_ext: lengths must be between 0 and T");
}

// Keeps tensors alive as long as the params that point into them.
struct Held {
  Tensor tensors[16];
  int count = 0;
  const Tensor& hold(Tensor t) { return tensors[count++] = std::move(t); }
  // Makes t contiguous; returns its data.
  template <class T = void>
  const T* pointer(const OptionalTensor& t) {
    if (!t || !t->defined()) return nullptr;
    return static_cast<const T*>(hold(t->contiguous()).const_data_ptr());
  }
  // Points `to` at each direction's part of a tensor (D, ...).
  void directions(const Tensor& t, const void* (&to)[2]) {
    to[0] = pointer(t);
    if (t.size(0) == 2) to[1] = static_cast<const char*>(to[0]) + t.numel() / 2 * t.element_size();
  }
};

// A call of a cell's forward operator. The kernels' state is h and c. If that is the output, c0 is h0, and c_n is h_n;
// y has the states that the backward pass reads, and there are no cells.
struct Forward {
  CellKind cell;
  DType dtype;
  ForwardParams params = {};
  Held inputs;
  Tensor y, h_n, c_n, gates, cells;  // cells: undefined if y has them
  FiveTensors results() const { return {y, h_n, c_n, gates, cells}; }

  // The recurrence alone uses this constructor.
  Forward(CellKind of, const Tensor& gates_x, const Tensor& w_hh, const OptionalTensor& bias_hh,
          const OptionalTensor& h0, const OptionalTensor& c0, const OptionalTensor& lengths, Save save)
      : Forward(of, dtype_of(gates_x, "gates_x"), sizes_of(of, gates_x), gates_x.options(), h0, c0, lengths, save) {
    const int64_t rows = gates_of(cell) * params.H;
    check(w_hh, "w_hh", {params.D, rows, params.H}, gates_x.scalar_type(), gates_x.device());
    check(bias_hh, "bias_hh", {params.D, rows}, gates_x.scalar_type(), gates_x.device());
    params.gates_x = inputs.pointer(gates_x);
    inputs.directions(w_hh, params.w_hh);
    if (bias_hh) inputs.directions(*bias_hh, params.input.bias_hh);
  }

  // Every operator uses this constructor. The caller sets where the pre-activations come from.
  Forward(CellKind of, DType type, const RecurrenceSizes& sizes, const at::TensorOptions& options,
          const OptionalTensor& h0, const OptionalTensor& c0, const OptionalTensor& lengths, Save save)
      : cell(of), dtype(type) {
    const auto [T, B, D, H] = sizes;
    const auto scalar = c10::typeMetaToScalarType(options.dtype());
    const bool save_gates = save == Save::all && saves_values(cell);
    const bool save_cells = save != Save::none;
    const auto device = options.device();
    check(h0, "h0", {D, B, H}, scalar, device);
    check(c0, "c0", {D, B, H}, scalar, device);
    check(lengths, "lengths", {B}, at::kLong, device);

    y = at::empty({T, B, D, H}, options);
    h_n = at::empty({D, B, H}, options);
    c_n = state_is_output(cell) ? h_n : at::empty({D, B, H}, options);
    gates = save_gates ? at::empty({T, B, D, values_of(cell) * H}, options) : at::empty({0}, options);
    if (!state_is_output(cell))
      cells =
          at::empty(save_cells ? at::DimVector{T, B, D, H} : at::DimVector{0}, options.dtype(accumulate_type(scalar)));

    static_cast<RecurrenceSizes&>(params) = sizes;
    params.h0 = inputs.pointer(h0);
    params.c0 = inputs.pointer(c0);
    params.lengths = inputs.pointer<int64_t>(lengths);
    params.y = y.mutable_data_ptr();
    params.h_n = h_n.mutable_data_ptr();
    params.c_n = c_n.mutable_data_ptr();
    params.gates = save_gates ? gates.mutable_data_ptr() : nullptr;
    params.cells = save_cells && cells.defined() ? cells.mutable_data_ptr() : nullptr;
  }

 private:
  static RecurrenceSizes sizes_of(CellKind cell, const Tensor& gates_x) {
    const int gates = gates_of(cell);
    TORCH_CHECK_VALUE(gates_x.dim() == 4 && gates_x.size(3) % gates == 0 && gates_x.size(3) > 0,
                      "birnn_ext: gates_x must have shape (T, B, D, ", gates, "H), got ", gates_x.sizes());
    TORCH_CHECK_VALUE(gates_x.size(0) > 0, "birnn_ext: gates_x must have at least one time step, got shape ",
                      gates_x.sizes());
    TORCH_CHECK_VALUE(gates_x.size(2) == 1 || gates_x.size(2) == 2,
                      "birnn_ext: gates_x must have 1 or 2 directions, got shape ", gates_x.sizes());
    return {gates_x.size(0), gates_x.size(1), gates_x.size(2), gates_x.size(3) / gates};
  }
};

// A call of a cell's backward operator. If the state is the output, c0 is h0, and there are no cells and no dc_n.
struct Backward {
  CellKind cell;
  DType dtype;
  BackwardParams params = {};
  Held inputs;
  Tensor d_gates_x, d_q, dh0, dc0;

  // The recurrence alone uses this constructor.
  Backward(CellKind of, const Tensor& w_hh, const OptionalTensor& h0, const OptionalTensor& c0,
           const OptionalTensor& lengths, const OptionalTensor& y, const Tensor& gates, const Tensor& cells,
           const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, bool state_grads)
      : Backward(of, dtype_of(gates, "gates"), saves_values(of) ? sizes_of(of, gates, "gates") : sizes_of(of, *y, "y"),
                 gates.options(), h0, c0, lengths, y, gates, cells, dy ? OptionalTensor(dy->contiguous()) : dy, dh_n,
                 dc_n, state_grads) {
    check(w_hh, "w_hh", {params.D, gates_of(cell) * params.H, params.H}, gates.scalar_type(), gates.device());
    inputs.directions(w_hh, params.w_hh);
    allocate_gradients_of_gates(gates.options());
  }

  // Every operator uses this constructor. The caller sets which gradients it wants. gates may be empty, and dy may be
  // strided over time and batch. Of h0 and y, the LSTM's recurrence needs neither.
  Backward(CellKind of, DType type, const RecurrenceSizes& sizes, const at::TensorOptions& options,
           const OptionalTensor& h0, const OptionalTensor& c0, const OptionalTensor& lengths, const OptionalTensor& y,
           const Tensor& gates, const Tensor& cells, const OptionalTensor& dy, const OptionalTensor& dh_n,
           const OptionalTensor& dc_n, bool state_grads)
      : cell(of), dtype(type) {
    const auto [T, B, D, H] = sizes;
    const auto scalar = c10::typeMetaToScalarType(options.dtype());
    const auto device = options.device();
    check(h0, "h0", {D, B, H}, scalar, device);
    check(c0, "c0", {D, B, H}, scalar, device);
    check(lengths, "lengths", {B}, at::kLong, device);
    check(y, "y", {T, B, D, H}, scalar, device);
    if (gates.dim() != 1) check(gates, "gates", {T, B, D, values_of(cell) * H}, scalar, device);
    if (!state_is_output(cell)) check(cells, "cells", {T, B, D, H}, accumulate_type(scalar), device);
    check(dy, "dy", {T, B, D, H}, scalar, device);
    check(dh_n, "dh_n", {D, B, H}, scalar, device);
    check(dc_n, "dc_n", {D, B, H}, scalar, device);

    dh0 = state_grads ? at::empty({D, B, H}, options) : at::empty({0}, options);
    if (!state_is_output(cell)) dc0 = at::empty(dh0.sizes(), options);

    static_cast<RecurrenceSizes&>(params) = sizes;
    params.h0 = inputs.pointer(h0);
    params.c0 = inputs.pointer(c0);
    params.lengths = inputs.pointer<int64_t>(lengths);
    params.y = inputs.pointer(y);
    // Without saved values y stands for them: kernels that load before they compute may do so.
    params.gates = !saves_values(cell) ? params.y : gates.dim() == 1 ? nullptr : inputs.pointer(gates);
    params.cells = state_is_output(cell) ? params.y : inputs.pointer(cells);
    if (dy) {
      const bool dense = dy->stride(3) == 1 && (D == 1 || dy->stride(2) == H);
      const Tensor& kept = inputs.hold(dense ? *dy : dy->contiguous());
      params.dy = kept.const_data_ptr();
      params.dy_stride_t = kept.stride(0);
      params.dy_stride_b = kept.stride(1);
    }
    params.dh_n = inputs.pointer(dh_n);
    params.dc_n = inputs.pointer(dc_n);
    params.dh0 = state_grads ? dh0.mutable_data_ptr() : nullptr;
    params.dc0 = state_grads && dc0.defined() ? dc0.mutable_data_ptr() : nullptr;
  }

  void allocate_gradients_of_gates(const at::TensorOptions& options) {
    const auto [T, B, D, H] = static_cast<const RecurrenceSizes&>(params);
    d_gates_x = at::empty({T, B, D, gates_of(cell) * H}, options);
    params.d_gates_x = d_gates_x.mutable_data_ptr();
    if (values_of(cell) == gates_of(cell)) return;
    d_q = at::empty({T, B, D, H}, options);
    params.d_q = d_q.mutable_data_ptr();
  }

 private:
  static RecurrenceSizes sizes_of(CellKind cell, const Tensor& saved, const char* name) {
    const int values = values_of(cell);
    TORCH_CHECK_VALUE(saved.dim() == 4 && saved.size(3) % values == 0 && saved.size(3) > 0 && saved.size(0) > 0,
                      name_of(cell), "_recurrence_backward: ", name,
                      " must be those of a forward call with save=\"all\", got shape ", saved.sizes());
    TORCH_CHECK_VALUE(saved.size(2) == 1 || saved.size(2) == 2, name_of(cell), "_recurrence_backward: ", name,
                      " must have 1 or 2 directions, got shape ", saved.sizes());
    return {saved.size(0), saved.size(1), saved.size(2), saved.size(3) / values};
  }
};

}  // namespace birnn
