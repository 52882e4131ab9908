// Autograd of birnn_ext::lstm_layer. It is in C++ because, for a single sequence, Python would take longer than the
// kernels.
#include <ATen/TensorOperators.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "layer_weights.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors call_layer(const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                       const OptionalTensor& c0, const OptionalTensor& lengths, c10::string_view save) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("birnn_ext::lstm_layer", "")
                             .typed<FiveTensors(const Tensor&, at::TensorList, bool, const OptionalTensor&,
                                                const OptionalTensor&, const OptionalTensor&, c10::string_view)>();
  return op.call(x, weights, bias, h0, c0, lengths, save);
}

std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor> call_backward(
    const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0, const OptionalTensor& c0,
    const OptionalTensor& lengths, const Tensor& y, const Tensor& gates, const Tensor& cells, const OptionalTensor& dy,
    const OptionalTensor& dh_n, const OptionalTensor& dc_n, bool x_grad, bool weight_grads, bool state_grads) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("birnn_ext::lstm_layer_backward", "")
          .typed<std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor>(
              const Tensor&, at::TensorList, bool, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
              const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
              const OptionalTensor&, bool, bool, bool)>();
  return op.call(x, weights, bias, h0, c0, lengths, y, gates, cells, dy, dh_n, dc_n, x_grad, weight_grads, state_grads);
}

OptionalTensor defined(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// Computes the layer as an input projection and birnn_ext::lstm_recurrence, which autograd can differentiate
// repeatedly.
variable_list composite(const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                        const OptionalTensor& c0, const OptionalTensor& lengths) {
  static const auto recurrence =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("birnn_ext::lstm_recurrence", "")
          .typed<FiveTensors(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, c10::string_view)>();
  const birnn::LayerWeights layer{weights, bias};
  std::vector<Tensor> w_ih, w_hh, biases;
  for (size_t d = 0; d < layer.directions(); ++d) {
    w_ih.push_back(layer.w_ih(d));
    w_hh.push_back(layer.w_hh(d));
    if (bias) biases.push_back(layer.bias_ih(d) + layer.bias_hh(d));
  }
  const auto directions = static_cast<int64_t>(w_ih.size());
  const Tensor used = birnn::without_padding(x, lengths);
  const Tensor gates_x = at::linear(used, at::cat(w_ih), bias ? OptionalTensor(at::cat(biases)) : std::nullopt);
  auto [y, h_n, c_n, gates, cells] =
      recurrence.call(gates_x.unflatten(-1, {directions, -1}), at::stack(w_hh), h0, c0, lengths, "all");
  return {y, h_n, c_n};
}

struct LayerFunction : torch::autograd::Function<LayerFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& h0,
                               const OptionalTensor& c0, const OptionalTensor& lengths, bool bias,
                               c10::string_view save, at::TensorList weights) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, h_n, c_n, gates, cells] = call_layer(x, weights, bias, h0, c0, lengths, save);
    variable_list saved = {x,    h0.value_or(Tensor()), c0.value_or(Tensor()), lengths.value_or(Tensor()), y, gates,
                           cells};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["bias"] = bias;
    ctx->mark_non_differentiable({gates, cells});
    ctx->set_materialize_grads(false);
    return {y, h_n, c_n, gates, cells};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool bias = ctx->saved_data["bias"].toBool();
    const OptionalTensor h0 = defined(saved[1]), c0 = defined(saved[2]), lengths = defined(saved[3]);
    const std::vector<Tensor> weights(saved.begin() + 7, saved.end());
    // There is one entry for each argument of forward: x, h0, c0, lengths, bias, save, then the weights.
    variable_list result(6 + weights.size());
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;
    if (transformed(grads) || at::GradMode::is_enabled()) {
      differentiable_backward(saved[0], weights, bias, h0, c0, lengths, grads, result);
      return result;
    }
    bool weight_grads = false;
    int64_t variable = 1 + h0.has_value() + c0.has_value() + lengths.has_value();
    for (size_t k = 0; k < weights.size(); ++k) weight_grads |= ctx->needs_input_grad(variable + k);
    const bool h0_grad = h0 && ctx->needs_input_grad(1), c0_grad = c0 && ctx->needs_input_grad(1 + h0.has_value());
    auto [dx, d_weights, dh0, dc0] =
        call_backward(saved[0], weights, bias, h0, c0, lengths, saved[4], saved[5], saved[6], defined(grads[0]),
                      defined(grads[1]), defined(grads[2]), ctx->needs_input_grad(0), weight_grads, h0_grad || c0_grad);
    if (ctx->needs_input_grad(0)) result[0] = dx;
    if (h0_grad) result[1] = dh0;
    if (c0_grad) result[2] = dc0;
    for (size_t k = 0; k < weights.size(); ++k)
      if (ctx->needs_input_grad(variable + k)) result[6 + k] = d_weights[k];
    return result;
  }

  // Kernels see plain values only. This finds gradients that are a batch, as with
  // autograd.grad(..., is_grads_batched=True) or torch.func.vmap, or that carry tangents.
  static bool transformed(const variable_list& grads) {
    constexpr c10::DispatchKeySet batched({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
    bool found = false;
    for (const Tensor& grad : grads) {
      if (!grad.defined()) continue;
      TORCH_CHECK_NOT_IMPLEMENTED(!grad.key_set().has(c10::DispatchKey::FuncTorchGradWrapper),
                                  "birnn_ext::lstm_layer: torch.func's grad, vjp and jvp can't follow a graph that was "
                                  "made outside of them; call the LSTM within the function that they transform");
      found |= grad.key_set().has_any(batched) || grad._fw_grad(/*level=*/0).defined();
    }
    return found;
  }

  // With create_graph, or gradients as above, autograd differentiates the composite. Aliases keep the paths apart if
  // one input depends on another.
  static void differentiable_backward(const Tensor& x, const std::vector<Tensor>& weights, bool bias,
                                      const OptionalTensor& h0, const OptionalTensor& c0, const OptionalTensor& lengths,
                                      const variable_list& grads, variable_list& result) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // forward has cast already
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode enable(true);
    variable_list inputs;
    std::vector<size_t> places;
    const auto input = [&](const Tensor& t, size_t place) {
      if (!t.requires_grad()) return t;
      inputs.push_back(at::alias(t));
      places.push_back(place);
      return inputs.back();
    };
    const Tensor own_x = input(x, 0);
    const OptionalTensor own_h0 = h0 ? OptionalTensor(input(*h0, 1)) : h0,
                         own_c0 = c0 ? OptionalTensor(input(*c0, 2)) : c0;
    std::vector<Tensor> own_weights;
    for (size_t k = 0; k < weights.size(); ++k) own_weights.push_back(input(weights[k], 6 + k));
    const variable_list all = composite(own_x, own_weights, bias, own_h0, own_c0, lengths);
    variable_list outputs, cotangents;
    for (size_t k = 0; k < all.size(); ++k)
      if (grads[k].defined()) {
        outputs.push_back(all[k]);
        cotangents.push_back(grads[k]);
      }
    const variable_list found = torch::autograd::grad(outputs, inputs, cotangents, /*retain_graph=*/true, create_graph,
                                                      /*allow_unused=*/true);
    for (size_t k = 0; k < places.size(); ++k) result[places[k]] = found[k];
  }
};

FiveTensors lstm_layer(const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                       const OptionalTensor& c0, const OptionalTensor& lengths, c10::string_view save) {
  bool differentiate = x.requires_grad() || (h0 && h0->requires_grad()) || (c0 && c0->requires_grad());
  for (const Tensor& w : weights) differentiate |= w.requires_grad();
  if (!differentiate || !at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_layer(x, weights, bias, h0, c0, lengths, save);
  }
  const variable_list out = LayerFunction::apply(x, h0, c0, lengths, bias, save, weights);
  return {out[0], out[1], out[2], out[3], out[4]};
}

}  // namespace

TORCH_LIBRARY_IMPL(birnn_ext, Autograd, m) { m.impl("lstm_layer", lstm_layer); }
