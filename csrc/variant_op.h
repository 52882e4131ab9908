// The operators lstm_variant and lstm_variant_backward for a Device. Each step runs one batched matrix product for both
// directions and one pass of core/variant.h; with a projection it runs two of each. A Device has the four passes and
//   multiplied(w)         converts weights for product()
//   product(out, a, b)    computes out = a b, batched
//   operand_type(type)    names the type of the products' left operand, for tensors of `type`
//   empty(sizes, options) allocates results
//   check(lengths, sizes) refuses lengths outside 0 .. T
//   Guard(device)         makes a device the current one
//   ran(forward)          counts a call
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>

#include "core/variant.h"
#include "op_common.h"

namespace birnn {

using VariantResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using VariantGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Holds the arguments that both operators share.
struct VariantOptions {
  const OptionalTensor &lengths, &reset, &h_mask, &zoneout_h, &zoneout_c;
  double zoneout_h_mean, zoneout_c_mean;
  const OptionalTensor &ln_hh, &ln_c;
  double eps;

  void set(Variant& p, Held& held, at::ScalarType type, at::Device device) const {
    const auto [T, B, D, H] = static_cast<const RecurrenceSizes&>(p);
    birnn::check(lengths, "lengths", {B}, at::kLong, device);
    birnn::check(reset, "reset", {T, B}, at::kBool, device);
    birnn::check(h_mask, "h_mask", {D, B, p.P}, type, device);
    birnn::check(zoneout_h, "zoneout_h", {T, B, D, p.P}, at::kBool, device);
    birnn::check(zoneout_c, "zoneout_c", {T, B, D, H}, at::kBool, device);
    birnn::check(ln_hh, "ln_hh", {D, 4 * H}, type, device);
    birnn::check(ln_c, "ln_c", {D, 2, H}, type, device);
    p.lengths = held.pointer<int64_t>(lengths);
    p.reset = held.pointer<bool>(reset);
    p.h_mask = held.pointer(h_mask);
    p.zoneout_h = held.pointer<bool>(zoneout_h);
    p.zoneout_c = held.pointer<bool>(zoneout_c);
    p.zoneout_h_mean = zoneout_h_mean;
    p.zoneout_c_mean = zoneout_c_mean;
    p.ln_hh = held.pointer(ln_hh);
    p.ln_c = held.pointer(ln_c);
    p.eps = eps;
  }
};

// Checks gates_x or gates (T, B, D, 4H); returns the sizes.
inline RecurrenceSizes variant_sizes(const Tensor& gates, const char* name) {
  TORCH_CHECK_VALUE(gates.dim() == 4 && gates.size(0) > 0 && (gates.size(2) == 1 || gates.size(2) == 2) &&
                        gates.size(3) > 0 && gates.size(3) % 4 == 0,
                    "lstm_variant: ", name, " must have shape (T, B, D, 4H), T > 0 and D 1 or 2, got ", gates.sizes());
  return {gates.size(0), gates.size(1), gates.size(2), gates.size(3) / 4};
}

// Checks the weights; returns P.
inline int64_t variant_outputs(const RecurrenceSizes& sizes, const Tensor& w_hh, const OptionalTensor& w_hr,
                               const Tensor& like) {
  const auto [T, B, D, H] = sizes;
  const int64_t P = w_hr && w_hh.dim() == 3 ? w_hh.size(2) : H;
  check(w_hh, "w_hh", {D, 4 * H, P}, like.scalar_type(), like.device());
  check(w_hr, "w_hr", {D, P, H}, like.scalar_type(), like.device());
  return P;
}

// The loop overwrites its state, so this copies what the user gave; it returns zeros if there is nothing.
inline Tensor running_state(const OptionalTensor& given, at::IntArrayRef shape, const at::TensorOptions& to) {
  return given ? given->to(to, /*non_blocking=*/false, /*copy=*/true).contiguous() : at::zeros(shape, to);
}

// Returns a result's shape, or that of an empty tensor if it is not wanted.
inline at::DimVector shape_if(bool wanted, at::IntArrayRef shape) {
  return wanted ? at::DimVector(shape) : at::DimVector{0};
}

template <class Device>
VariantResults lstm_variant(const Tensor& gates_x, const Tensor& w_hh, const OptionalTensor& w_hr,
                            const OptionalTensor& h0, const OptionalTensor& c0, const OptionalTensor& lengths,
                            const OptionalTensor& reset, const OptionalTensor& h_mask, const OptionalTensor& zoneout_h,
                            const OptionalTensor& zoneout_c, double zoneout_h_mean, double zoneout_c_mean,
                            const OptionalTensor& ln_hh, const OptionalTensor& ln_c, double eps,
                            c10::string_view save_) {
  const Save save = save_named(save_);
  const bool save_cells = save != Save::none, save_gates = save == Save::all, save_norm = save_gates && ln_hh;
  const DType dtype = dtype_of(gates_x, "gates_x");
  const RecurrenceSizes sizes = variant_sizes(gates_x, "gates_x");
  const auto [T, B, D, H] = sizes;
  const int64_t P = variant_outputs(sizes, w_hh, w_hr, gates_x);
  const at::ScalarType type = gates_x.scalar_type();
  const auto options = gates_x.options(), accumulate = options.dtype(accumulate_type(type)),
             operands = options.dtype(Device::operand_type(type));
  check(h0, "h0", {D, B, P}, type, gates_x.device());
  check(c0, "c0", {D, B, H}, type, gates_x.device());

  Held held;
  VariantForward p{{sizes, P, w_hr.has_value()}};
  VariantOptions{lengths, reset, h_mask, zoneout_h, zoneout_c, zoneout_h_mean, zoneout_c_mean, ln_hh, ln_c, eps}.set(
      p, held, type, gates_x.device());
  const typename Device::Guard guard(gates_x.device());
  Device::check(lengths, sizes);

  const Tensor y = Device::empty({T, B, D, P}, options),
               cells = Device::empty(shape_if(save_cells, {T, B, D, H}), accumulate),
               gates = Device::empty(shape_if(save_gates, {T, B, D, 4 * H}), options),
               normed = Device::empty(shape_if(save_norm, {T, B, D, 4 * H}), options),
               rstd = Device::empty(shape_if(save_norm, {T, B, D}), accumulate);
  const Tensor h = running_state(h0, {D, B, P}, accumulate), c = running_state(c0, {D, B, H}, accumulate);
  const Tensor operand = (h_mask ? h * *h_mask : h).to(operands);  // this is h itself if nothing changes
  Tensor products = at::empty({D, B, 4 * H}, accumulate);
  const Tensor w_hh_t = Device::multiplied(w_hh).transpose(1, 2);
  Tensor w_hr_t, hidden, projected;
  if (w_hr) {
    w_hr_t = Device::multiplied(*w_hr).transpose(1, 2);
    hidden = at::zeros({D, B, H}, operands);  // the product also reads the rows of sequences that have no step
    projected = at::empty({D, B, P}, accumulate);
    p.hidden = hidden.mutable_data_ptr();
    p.projected = projected.const_data_ptr();
  }
  p.gates_x = held.pointer(gates_x);
  p.products = products.mutable_data_ptr();
  p.h = h.mutable_data_ptr();
  p.c = c.mutable_data_ptr();
  p.operand = operand.is_same(h) ? nullptr : operand.mutable_data_ptr();
  p.y = y.mutable_data_ptr();
  if (save_cells) p.cells = cells.mutable_data_ptr();
  if (save_gates) p.gates = gates.mutable_data_ptr();
  if (save_norm) {
    p.normed = normed.mutable_data_ptr();
    p.rstd = rstd.mutable_data_ptr();
  }
  for (p.s = 0; p.s < T && B > 0; ++p.s) {
    p.has_products = p.s > 0 || h0;
    if (p.has_products) Device::product(products, operand, w_hh_t);
    Device::forward(dtype, p);
    if (w_hr) {
      Device::product(projected, hidden, w_hr_t);
      Device::forward_projected(dtype, p);
    }
  }
  Device::ran(true);
  return {y, h.to(options), c.to(options), cells, gates, normed, rstd};
}

// Checks what the forward pass saved beside gates.
inline void check_saved(const RecurrenceSizes& sizes, const Tensor& gates, const Tensor& cells,
                        const OptionalTensor& normed, const OptionalTensor& rstd) {
  const auto [T, B, D, H] = sizes;
  const at::ScalarType type = gates.scalar_type(), wide = accumulate_type(type);
  check(cells, "cells", {T, B, D, H}, wide, gates.device());
  check(normed, "normed", {T, B, D, 4 * H}, type, gates.device());
  check(rstd, "rstd", {T, B, D}, wide, gates.device());
}

inline void check_variant_gradients(const RecurrenceSizes& sizes, int64_t P, const Tensor& gates,
                                    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                    const OptionalTensor& d_cells) {
  const auto [T, B, D, H] = sizes;
  const at::ScalarType type = gates.scalar_type();
  check(dy, "dy", {T, B, D, P}, type, gates.device());
  check(dh_n, "dh_n", {D, B, P}, type, gates.device());
  check(dc_n, "dc_n", {D, B, H}, type, gates.device());
  check(d_cells, "d_cells", {T, B, D, H}, accumulate_type(type), gates.device());
}

template <class Device>
VariantGradients lstm_variant_backward(const Tensor& w_hh, const OptionalTensor& w_hr, const OptionalTensor& c0,
                                       const OptionalTensor& lengths, const OptionalTensor& reset,
                                       const OptionalTensor& h_mask, const OptionalTensor& zoneout_h,
                                       const OptionalTensor& zoneout_c, double zoneout_h_mean, double zoneout_c_mean,
                                       const OptionalTensor& ln_hh, const OptionalTensor& ln_c, double eps,
                                       const Tensor& cells, const Tensor& gates, const Tensor& normed,
                                       const Tensor& rstd, const OptionalTensor& dy, const OptionalTensor& dh_n,
                                       const OptionalTensor& dc_n, const OptionalTensor& d_cells, bool state_grads) {
  const DType dtype = dtype_of(gates, "gates");
  const RecurrenceSizes sizes = variant_sizes(gates, "gates");
  const auto [T, B, D, H] = sizes;
  const int64_t P = variant_outputs(sizes, w_hh, w_hr, gates);
  const at::ScalarType type = gates.scalar_type(), wide = accumulate_type(type);
  const at::Device device = gates.device();
  const auto options = gates.options(), accumulate = options.dtype(wide),
             operands = options.dtype(Device::operand_type(type));
  check(c0, "c0", {D, B, H}, type, device);
  check_saved(sizes, gates, cells, ln_hh ? OptionalTensor(normed) : std::nullopt,
              ln_hh ? OptionalTensor(rstd) : std::nullopt);
  check_variant_gradients(sizes, P, gates, dy, dh_n, dc_n, d_cells);

  Held held;
  VariantBackward p{{sizes, P, w_hr.has_value()}};
  VariantOptions{lengths, reset, h_mask, zoneout_h, zoneout_c, zoneout_h_mean, zoneout_c_mean, ln_hh, ln_c, eps}.set(
      p, held, type, device);
  const typename Device::Guard guard(device);
  Device::check(lengths, sizes);
  p.c0 = held.pointer(c0);
  p.cells = held.pointer(cells);
  p.gates = held.pointer(gates);
  if (ln_hh) {
    p.normed = held.pointer(normed);
    p.rstd = held.pointer(rstd);
  }
  p.dy = held.pointer(dy);
  p.d_cells = held.pointer(d_cells);

  const bool projects = w_hr.has_value(), own_products = ln_hh || reset;
  const Tensor d_gates_x = Device::empty({T, B, D, 4 * H}, options),
               d_products = Device::empty(shape_if(own_products, {T, B, D, 4 * H}), options),
               d_projected = Device::empty(shape_if(projects, {T, B, D, P}), options),
               hidden = Device::empty(shape_if(projects, {T, B, D, H}), options),
               d_ln_hh = at::zeros(shape_if(ln_hh.has_value(), {D, B, 4 * H}), accumulate),
               d_ln_c = at::zeros(shape_if(ln_c.has_value(), {D, B, 2, H}), accumulate);
  const Tensor dh = running_state(dh_n, {D, B, P}, accumulate), dc = running_state(dc_n, {D, B, H}, accumulate);
  const Tensor operand = at::empty({D, B, 4 * H}, operands),
               d_projected_operand = at::empty(shape_if(projects, {D, B, P}), operands);
  Tensor d_hidden = at::empty({D, B, H}, accumulate), dh_products = at::empty({D, B, P}, accumulate);
  const Tensor w = Device::multiplied(w_hh), w_projection = w_hr ? Device::multiplied(*w_hr) : Tensor();
  p.dh = dh.mutable_data_ptr();
  p.dc = dc.mutable_data_ptr();
  p.d_hidden = d_hidden.mutable_data_ptr();
  p.operand = operand.mutable_data_ptr();
  p.d_gates_x = d_gates_x.mutable_data_ptr();
  if (own_products) p.d_products = d_products.mutable_data_ptr();
  if (projects) {
    p.d_projected_operand = d_projected_operand.mutable_data_ptr();
    p.d_projected = d_projected.mutable_data_ptr();
    p.hidden = hidden.mutable_data_ptr();
  }
  if (ln_hh) p.d_ln_hh = d_ln_hh.mutable_data_ptr();
  if (ln_c) p.d_ln_c = d_ln_c.mutable_data_ptr();

  for (p.s = 0; p.s < T && B > 0; ++p.s) {
    if (p.s > 0) {
      Device::product(dh_products, operand, w);
      p.dh_products = dh_products.const_data_ptr();
    }
    Device::backward_output(dtype, p);
    if (projects) Device::product(d_hidden, d_projected_operand, w_projection);
    Device::backward(dtype, p);
  }
  Tensor dh0 = at::empty({0}, options), dc0 = at::empty({0}, options);
  if (state_grads) {
    if (B > 0) {
      Device::product(dh_products, operand, w);
      dh.add_(h_mask ? dh_products * *h_mask : dh_products);
    }
    dh0 = dh.to(options);
    dc0 = dc.to(options);
  }
  Device::ran(false);
  return {d_gates_x, d_products, dh0, dc0, d_projected, hidden, d_ln_hh, d_ln_c};
}

}  // namespace birnn
