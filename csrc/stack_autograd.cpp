// birnn_ext::lstm, birnn_ext::gru and so on, stacks of layers that call lstm_layer, gru_layer and so on for each, and
// the gradients of all these. They are in C++ because, for a single sequence, Python would take longer than the
// kernels. Where a function is for any cell, those whose state is their output have no c0, and an undefined tensor for
// c_n.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index.h>
#include <ATen/ops/index_put.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cell_op.h"
#include "layer_weights.h"

namespace {

using at::Tensor;
using birnn::CellKind;
using birnn::FiveTensors;
using birnn::LayerGradients;
using birnn::LayerWeights;
using birnn::OptionalTensor;
using birnn::ThreeTensors;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The operators' implementation for autograd's dispatch key, see cell_op.h.
struct Autograd;

template <class Function>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

// Finds an operator of each cell whose state is its output, by the end of its name.
template <class Function>
std::map<CellKind, c10::TypedOperatorHandle<Function>> find_of_h_cells(const std::string& suffix) {
  std::map<CellKind, c10::TypedOperatorHandle<Function>> found;
  birnn::for_each_h_cell([&](auto of) {
    using Cell = decltype(of);
    found.emplace(Cell::kKind, find<Function>((std::string("birnn_ext::") + Cell::kName + suffix).c_str()));
  });
  return found;
}

constexpr CellKind kAny = CellKind::gru;  // all cells whose state is their output have operators of the same types

FiveTensors call_layer(CellKind cell, const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                       const OptionalTensor& c0, const OptionalTensor& lengths, c10::string_view save) {
  static const auto lstm = find<decltype(birnn::lstm_layer<Autograd>)>("birnn_ext::lstm_layer");
  static const auto others = find_of_h_cells<decltype(birnn::h_layer<Autograd, kAny>)>("_layer");
  if (cell == CellKind::lstm) return lstm.call(x, weights, bias, h0, c0, lengths, save);
  auto [y, h_n, gates] = others.at(cell).call(x, weights, bias, h0, lengths, save);
  return {y, h_n, Tensor(), gates, Tensor()};
}

LayerGradients call_backward(CellKind cell, const Tensor& x, at::TensorList weights, bool bias,
                             const OptionalTensor& h0, const OptionalTensor& c0, const OptionalTensor& lengths,
                             const Tensor& y, const Tensor& gates, const Tensor& cells, const OptionalTensor& dy,
                             const OptionalTensor& dh_n, const OptionalTensor& dc_n, bool x_grad, bool weight_grads,
                             bool state_grads) {
  static const auto lstm = find<decltype(birnn::lstm_layer_backward<Autograd>)>("birnn_ext::lstm_layer_backward");
  static const auto others = find_of_h_cells<decltype(birnn::h_layer_backward<Autograd, kAny>)>("_layer_backward");
  if (cell == CellKind::lstm)
    return lstm.call(x, weights, bias, h0, c0, lengths, y, gates, cells, dy, dh_n, dc_n, x_grad, weight_grads,
                     state_grads);
  auto [dx, d_weights, dh0] =
      others.at(cell).call(x, weights, bias, h0, lengths, y, gates, dy, dh_n, x_grad, weight_grads, state_grads);
  return {dx, d_weights, dh0, Tensor()};
}

// Computes a layer as an input projection and the cell's recurrence, which autograd can differentiate repeatedly.
ThreeTensors differentiable_layer(CellKind cell, const Tensor& x, at::TensorList weights, bool bias,
                                  const OptionalTensor& h0, const OptionalTensor& c0, const OptionalTensor& lengths) {
  static const auto lstm = find<decltype(birnn::lstm_recurrence<Autograd>)>("birnn_ext::lstm_recurrence");
  static const auto others = find_of_h_cells<decltype(birnn::h_recurrence<Autograd, kAny>)>("_recurrence");
  const LayerWeights layer{weights, bias};
  std::vector<Tensor> w_ih, w_hh, biases_x, biases_hh;
  for (size_t d = 0; d < layer.directions(); ++d) {
    w_ih.push_back(layer.w_ih(d));
    w_hh.push_back(layer.w_hh(d));
    if (!bias) continue;
    biases_x.push_back(cell == CellKind::lstm ? layer.bias_ih(d) + layer.bias_hh(d) : layer.bias_ih(d));
    biases_hh.push_back(layer.bias_hh(d));
  }
  const auto directions = static_cast<int64_t>(w_ih.size());
  const Tensor used = birnn::without_padding(x, lengths);
  const Tensor gates_x = at::linear(used, at::cat(w_ih), bias ? OptionalTensor(at::cat(biases_x)) : std::nullopt)
                             .unflatten(-1, {directions, -1});
  if (cell == CellKind::lstm) {
    auto [y, h_n, c_n, gates, cells] = lstm.call(gates_x, at::stack(w_hh), h0, c0, lengths, "all");
    return {y, h_n, c_n};
  }
  const OptionalTensor bias_hh = bias ? OptionalTensor(at::stack(biases_hh)) : std::nullopt;
  auto [y, h_n, gates] = others.at(cell).call(gates_x, at::stack(w_hh), bias_hh, h0, lengths, "all");
  return {y, h_n, Tensor()};
}

OptionalTensor defined(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// --- a stack of layers ----------------------------------------------------------------------------------------------

// A call of the operator of a layer: of all of it, or one direction.
struct Part {
  int64_t layer, direction, directions;
  bool of_last;    // one direction of a final layer of which only the last outputs are wanted
  bool last_step;  // only each sequence's last step runs: the reverse direction of such a layer

  // Returns how many steps of each sequence the part runs, of the stack's lengths.
  OptionalTensor lengths(const OptionalTensor& of_stack) const {
    return last_step && of_stack ? of_stack->clamp_max(1) : of_stack;
  }
};

// A stack of layers, as the operators lstm, gru and so on are given it.
struct Stack {
  CellKind cell;
  at::TensorList weights;  // each layer's, one after the other
  bool bias;
  int64_t layers;
  bool last;  // whether only the final layer's output at each sequence's last step is wanted

  LayerWeights layer(int64_t k) const {
    const size_t count = weights.size() / layers;
    return {weights.slice(k * count, count), bias};
  }
  int64_t directions() const { return static_cast<int64_t>(layer(0).directions()); }

  // Finds the calls that run the stack, in their order.
  std::vector<Part> parts() const {
    const int64_t D = directions();
    std::vector<Part> all;
    for (int64_t k = 0; k < layers - last; ++k) all.push_back({k, 0, D, false, false});
    for (int64_t d = 0; last && d < D; ++d) all.push_back({layers - 1, d, 1, true, d == 1});
    return all;
  }
  size_t first_weight(const Part& part) const {
    return part.layer * (weights.size() / layers) + part.direction * layer(0).per_direction();
  }
  at::TensorList weights_of(const Part& part) const {
    return weights.slice(first_weight(part), part.directions * layer(0).per_direction());
  }
  // Returns a part's share of a state (layers * D, B, H), or of its gradient.
  OptionalTensor share(const OptionalTensor& state, const Part& part) const {
    if (!state) return state;
    return state->narrow(0, part.layer * directions() + part.direction, part.directions);
  }
};

// Where the last steps (B, .) of sequences are in a tensor (T, B, .); of empty sequences it is step 0.
c10::List<OptionalTensor> last_steps(const Tensor& lengths) {
  c10::List<OptionalTensor> places;
  places.push_back((lengths - 1).clamp_min(0));
  places.push_back(at::arange(lengths.sym_size(0), lengths.options()));
  return places;
}

// Returns values or gradients (B, H) with zeros for empty sequences, whose last output is 0 while h_n is h0.
Tensor without_empty(const Tensor& t, const OptionalTensor& lengths) {
  return lengths ? t.masked_fill((*lengths == 0).unsqueeze(-1), 0) : t;
}

// Runs the parts of a stack, each by run_part(part, x, h0, c0, lengths), which returns y, h_n and c_n. Returns
// y (T, B, D, H), or the last outputs (B, D * H), and the final states; none with the last outputs of two directions.
template <class RunPart>
ThreeTensors run_stack(const Stack& stack, const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                       const OptionalTensor& lengths, const RunPart& run_part) {
  Tensor input = x, output;
  std::vector<Tensor> last_outputs, h_ns, c_ns;
  for (const Part& part : stack.parts()) {
    Tensor part_x = input;
    if (part.last_step) part_x = lengths ? at::index(input, last_steps(*lengths)).unsqueeze(0) : input.narrow(0, -1, 1);
    const auto [y, h_n, c_n] =
        run_part(part, part_x, stack.share(h0, part), stack.share(c0, part), part.lengths(lengths));
    h_ns.push_back(h_n), c_ns.push_back(c_n);
    if (part.last_step) {
      last_outputs.push_back(y.select(0, 0).select(1, 0));
    } else if (part.of_last) {
      last_outputs.push_back(without_empty(h_n.select(0, 0), lengths));
    } else {
      output = y;
      input = y.flatten(2);
    }
  }
  if (stack.last) output = at::cat(last_outputs, -1);
  const bool has_c = !birnn::state_is_output(stack.cell);
  if (stack.last && stack.directions() == 2) return {output, x.new_empty({0}), has_c ? x.new_empty({0}) : Tensor()};
  if (stack.layers == 1) return {output, h_ns[0], c_ns[0]};
  return {output, at::cat(h_ns), has_c ? at::cat(c_ns) : Tensor()};
}

// --- autograd -------------------------------------------------------------------------------------------------------

// Kernels see plain values only. This finds gradients that are a batch, as with autograd.grad(...,
// is_grads_batched=True) or torch.func.vmap, or that carry tangents.
bool transformed(const variable_list& grads) {
  constexpr c10::DispatchKeySet batched({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
  bool found = false;
  for (const Tensor& grad : grads) {
    if (!grad.defined()) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(!grad.key_set().has(c10::DispatchKey::FuncTorchGradWrapper),
                                "birnn_ext: torch.func's grad, vjp and jvp can't follow a graph that was made outside "
                                "of them; call the layer within the function that they transform");
    found |= grad.key_set().has_any(batched) || grad._fw_grad(/*level=*/0).defined();
  }
  return found;
}

struct StackFunction : torch::autograd::Function<StackFunction> {
  // The places of the arguments of forward, and of their gradients.
  static constexpr size_t kX = 0, kH0 = 1, kC0 = 2, kWeights = 6;
  static constexpr size_t kSavedOfPart = 4;  // tensors: its x, y, gates and cells

  // Returns y and h_n, then the gates of the last part; of an LSTM y, h_n, c_n, gates and cells. weights are those of
  // the stack.
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& h0,
                               const OptionalTensor& c0, const OptionalTensor& lengths, const Stack& stack,
                               c10::string_view save, at::TensorList weights) {
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list saved = {h0.value_or(Tensor()), c0.value_or(Tensor()), lengths.value_or(Tensor())};
    Tensor last_gates, last_cells;
    bool wanted = x.requires_grad() || (h0 && h0->requires_grad()) || (c0 && c0->requires_grad());
    const auto run_part = [&](const Part& part, const Tensor& part_x, const OptionalTensor& part_h0,
                              const OptionalTensor& part_c0, const OptionalTensor& part_lengths) -> ThreeTensors {
      // Layers below the first that is trained keep nothing.
      for (const Tensor& w : stack.weights_of(part)) wanted |= w.requires_grad();
      auto [y, h_n, c_n, gates, cells] = call_layer(stack.cell, part_x, stack.weights_of(part), stack.bias, part_h0,
                                                    part_c0, part_lengths, wanted ? save : "none");
      if (wanted)
        saved.insert(saved.end(), {part_x, y, gates, cells});
      else  // x alone, with which all is computed again if there is a second derivative
        saved.insert(saved.end(), {part.layer == 0 ? x : Tensor(), Tensor(), Tensor(), Tensor()});
      last_gates = gates, last_cells = cells;
      return {y, h_n, c_n};
    };
    const auto [y, h_n, c_n] = run_stack(stack, x, h0, c0, lengths, run_part);
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["stack"] =
        std::vector<int64_t>{int64_t(stack.cell), int64_t(weights.size()), stack.bias, stack.layers, stack.last};
    variable_list results = {y, h_n}, ours = {last_gates};
    if (c_n.defined()) results.push_back(c_n), ours.push_back(last_cells);
    variable_list all = results;
    all.insert(all.end(), ours.begin(), ours.end());
    if (stack.last && stack.directions() == 2) ours.insert(ours.end(), results.begin() + 1, results.end());
    ctx->mark_non_differentiable(ours);
    ctx->set_materialize_grads(false);
    return all;
  }

  // What forward was given, and has kept.
  struct Saved {
    variable_list all;
    Stack stack;
    OptionalTensor h0, c0, lengths;
    std::vector<Part> parts;

    explicit Saved(AutogradContext* ctx) : all(ctx->get_saved_variables()) {
      h0 = defined(all[0]), c0 = defined(all[1]), lengths = defined(all[2]);
      const std::vector<int64_t> kept = ctx->saved_data["stack"].toIntVector();
      stack = {CellKind(kept[0]), at::TensorList(all).slice(all.size() - kept[1]), kept[2] != 0, kept[3], kept[4] != 0};
      parts = stack.parts();
    }
    Saved(const Saved&) = delete;  // stack points into `all`

    const Tensor& x() const { return all[3]; }
    const Tensor& of_part(size_t n, size_t k) const { return all[3 + kSavedOfPart * n + k]; }
  };

  // grads[2] is that of c_n, or, of a cell without, undefined as that of its gates.
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Saved saved(ctx);
    variable_list result(kWeights + saved.stack.weights.size());
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;
    if (transformed(grads) || at::GradMode::is_enabled())
      differentiable_backward(saved, grads, result);
    else
      kernels_backward(ctx, saved, grads, result);
    return result;
  }

  struct ResultGradients {
    OptionalTensor dy, dh_n, dc_n;
  };

  // Finds the gradients of a part's results. grads are those of the stack's results, d_input is that of the input of
  // the layer above.
  static ResultGradients gradients_of_results(const Saved& saved, const Part& part, const variable_list& grads,
                                              const Tensor& d_input) {
    const Stack& stack = saved.stack;
    ResultGradients found{std::nullopt, stack.share(defined(grads[1]), part), stack.share(defined(grads[2]), part)};
    const OptionalTensor output = part.layer == stack.layers - 1 ? defined(grads[0]) : defined(d_input);
    if (!output) return found;
    const int64_t D = stack.directions(), H = stack.layer(0).w_hh(0).size(1);
    if (!part.of_last) {
      found.dy = output->dim() == 4 ? *output : output->unflatten(-1, {D, H});
      return found;
    }
    const Tensor own = output->narrow(-1, part.direction * H, H);  // (B, H)
    if (part.last_step) {
      found.dy = own.unsqueeze(0).unsqueeze(2);
    } else {
      const Tensor d = without_empty(own, saved.lengths).unsqueeze(0);
      found.dh_n = found.dh_n ? *found.dh_n + d : d;
    }
    return found;
  }

  // Adds gradients (B, I) of the sequences' last steps to those of all steps (T, B, I).
  static void add_to_last_steps(Tensor& all, const Tensor& last, const OptionalTensor& lengths) {
    if (!lengths) {
      all.select(0, -1).add_(last);
      return;
    }
    const auto places = last_steps(*lengths);
    all.index_put_(places, at::index(all, places) + last);
  }

  // Joins the parts' gradients of a state, of which some may have none.
  static Tensor of_all_parts(const Saved& saved, const Tensor& state, std::vector<Tensor>& gradients) {
    for (size_t n = 0; n < gradients.size(); ++n)
      if (!gradients[n].defined()) gradients[n] = at::zeros_like(*saved.stack.share(state, saved.parts[n]));
    return gradients.size() == 1 ? gradients[0] : at::cat(gradients);
  }

  static void kernels_backward(AutogradContext* ctx, const Saved& saved, const variable_list& grads,
                               variable_list& result) {
    const Stack& stack = saved.stack;
    // Inputs that are there count as variables, in the order of forward's arguments.
    const size_t weights_at = 1 + saved.h0.has_value() + saved.c0.has_value() + saved.lengths.has_value();
    const bool h0_grad = saved.h0 && ctx->needs_input_grad(1);
    const bool c0_grad = saved.c0 && ctx->needs_input_grad(1 + saved.h0.has_value());
    const auto any_weight = [&](size_t begin, size_t end) {
      for (size_t k = begin; k < end; ++k)
        if (ctx->needs_input_grad(weights_at + k)) return true;
      return false;
    };
    const bool x_grad = ctx->needs_input_grad(0);
    Tensor d_input, d_last_step;  // gradients of a part's x
    std::vector<Tensor> dh0(saved.parts.size()), dc0(saved.parts.size());
    for (size_t n = saved.parts.size(); n-- > 0;) {
      const Part& part = saved.parts[n];
      const auto [dy, dh_n, dc_n] = gradients_of_results(saved, part, grads, d_input);
      if (!part.last_step) d_input = Tensor();
      if (!dy && !dh_n && !dc_n) continue;
      const size_t first = stack.first_weight(part);
      const at::TensorList weights = stack.weights_of(part);
      const bool input_grad =
          x_grad || (part.layer > 0 && (h0_grad || c0_grad || any_weight(0, stack.first_weight({part.layer}))));
      const bool weight_grads = any_weight(first, first + weights.size()), state_grads = h0_grad || c0_grad;
      if (!input_grad && !weight_grads && !state_grads) continue;
      auto [dx, d_weights, part_dh0, part_dc0] = call_backward(
          stack.cell, saved.of_part(n, 0), weights, stack.bias, stack.share(saved.h0, part),
          stack.share(saved.c0, part), part.lengths(saved.lengths), saved.of_part(n, 1), saved.of_part(n, 2),
          saved.of_part(n, 3), dy, dh_n, dc_n, input_grad, weight_grads, state_grads);
      for (size_t k = 0; k < weights.size(); ++k)
        if (ctx->needs_input_grad(weights_at + first + k)) result[kWeights + first + k] = d_weights[k];
      dh0[n] = part_dh0, dc0[n] = part_dc0;
      if (!input_grad) continue;
      if (part.last_step) {
        d_last_step = dx.select(0, 0);
      } else {
        d_input = dx;
        if (d_last_step.defined() && part.of_last) add_to_last_steps(d_input, d_last_step, saved.lengths);
      }
    }
    if (x_grad) result[kX] = d_input;
    if (h0_grad) result[kH0] = of_all_parts(saved, *saved.h0, dh0);
    if (c0_grad) result[kC0] = of_all_parts(saved, *saved.c0, dc0);
  }

  // With create_graph, or transformed gradients, autograd differentiates the recurrence's operator. Aliases keep the
  // paths apart if one input depends on another.
  static void differentiable_backward(const Saved& saved, const variable_list& grads, variable_list& result) {
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
    const auto optional_input = [&](const OptionalTensor& t, size_t place) {
      return t ? OptionalTensor(input(*t, place)) : t;
    };
    const Tensor x = input(saved.x(), kX);
    const OptionalTensor h0 = optional_input(saved.h0, kH0), c0 = optional_input(saved.c0, kC0);
    std::vector<Tensor> weights;
    for (const Tensor& w : saved.stack.weights) weights.push_back(input(w, kWeights + weights.size()));
    const Stack stack{saved.stack.cell, weights, saved.stack.bias, saved.stack.layers, saved.stack.last};
    const auto run_part = [&](const Part& part, const Tensor& part_x, const OptionalTensor& part_h0,
                              const OptionalTensor& part_c0, const OptionalTensor& part_lengths) {
      return differentiable_layer(stack.cell, part_x, stack.weights_of(part), stack.bias, part_h0, part_c0,
                                  part_lengths);
    };
    const auto [y, h_n, c_n] = run_stack(stack, x, h0, c0, saved.lengths, run_part);
    const variable_list all = {y, h_n, c_n};
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

// Converts tensors to another type, all in one launch on a GPU.
struct CastFunction : torch::autograd::Function<CastFunction> {
  static std::vector<Tensor> cast(at::TensorList tensors, at::ScalarType type) {
    std::vector<Tensor> cast;
    for (const Tensor& t : tensors)
      cast.push_back(at::empty_like(t, t.options().dtype(type), at::MemoryFormat::Contiguous));
    at::_foreach_copy_(cast, tensors);
    return cast;
  }

  static variable_list forward(AutogradContext* ctx, at::ScalarType type, at::TensorList tensors) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["type"] = static_cast<int64_t>(tensors[0].scalar_type());
    ctx->set_materialize_grads(false);
    const std::vector<Tensor> result = cast(tensors, type);
    variable_list frozen;  // otherwise a layer that is not trained would compute gradients, and keep what they take
    for (size_t k = 0; k < result.size(); ++k)
      if (!tensors[k].requires_grad()) frozen.push_back(result[k]);
    ctx->mark_non_differentiable(frozen);
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto type = static_cast<at::ScalarType>(ctx->saved_data["type"].toInt());
    variable_list wanted, result(1);
    for (const Tensor& grad : grads)
      if (grad.defined()) wanted.push_back(grad);
    if (transformed(wanted) || at::GradMode::is_enabled())
      for (Tensor& grad : wanted) grad = grad.to(type);
    else if (!wanted.empty())
      wanted = cast(wanted, type);
    auto next = wanted.begin();
    for (const Tensor& grad : grads) result.push_back(grad.defined() ? *next++ : Tensor());
    return result;
  }
};

bool differentiates(const Tensor& x, at::TensorList weights, const OptionalTensor& h0, const OptionalTensor& c0) {
  bool wanted = x.requires_grad() || (h0 && h0->requires_grad()) || (c0 && c0->requires_grad());
  for (const Tensor& w : weights) wanted |= w.requires_grad();
  return wanted && at::GradMode::is_enabled();
}

struct Autograd {
  static FiveTensors layer(CellKind cell, const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                           const OptionalTensor& c0, const OptionalTensor& lengths, c10::string_view save) {
    if (!differentiates(x, weights, h0, c0)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      return call_layer(cell, x, weights, bias, h0, c0, lengths, save);
    }
    LayerWeights{weights, bias}.check_count(cell);
    const Stack stack{cell, weights, bias, /*layers=*/1, /*last=*/false};
    const auto out = StackFunction::apply(x, h0, c0, lengths, stack, save, weights);
    if (birnn::state_is_output(cell)) return {out[0], out[1], Tensor(), out[2], Tensor()};
    return {out[0], out[1], out[2], out[3], out[4]};
  }
};

void check_stack(const Tensor& x, const Stack& stack, const OptionalTensor& h0, const OptionalTensor& c0) {
  const char* op = name_of(stack.cell);
  TORCH_CHECK_VALUE(stack.layers > 0, op, ": layers must be at least 1, got ", stack.layers);
  TORCH_CHECK_VALUE(stack.weights.size() % stack.layers == 0, op, ": weights must be those of ", stack.layers,
                    " layers, got ", stack.weights.size(), " tensors");
  stack.layer(0).check_count(stack.cell);
  TORCH_CHECK_VALUE(x.dim() == 3, op, ": x must have shape (T, B, I), got ", x.sym_sizes());
  const int64_t states = stack.layers * stack.directions();
  for (const auto& [state, name] : {std::pair(&h0, "h0"), std::pair(&c0, "c0")})
    if (*state)
      TORCH_CHECK_VALUE((*state)->dim() == 3 && (*state)->sym_size(0) == states, op, ": ", name, " must have shape (",
                        states, ", B, H), got ", (*state)->sym_sizes());
}

ThreeTensors run(const Stack& given_stack, const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                 const OptionalTensor& lengths, bool recompute) {
  check_stack(x, given_stack, h0, c0);
  const auto& [cell, given, bias, layers, last] = given_stack;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // all has x's type
  const bool differentiate = differentiates(x, given, h0, c0);
  std::vector<Tensor> cast;
  if (x.element_size() < 4 && given[0].scalar_type() != x.scalar_type())
    cast = differentiate ? CastFunction::apply(x.scalar_type(), given) : CastFunction::cast(given, x.scalar_type());
  const Stack stack{cell, cast.empty() ? given : at::TensorList(cast), bias, layers, last};
  if (!differentiate) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto run_part = [&](const Part& part, const Tensor& part_x, const OptionalTensor& part_h0,
                              const OptionalTensor& part_c0, const OptionalTensor& part_lengths) -> ThreeTensors {
      auto [y, h_n, c_n, gates, cells] =
          call_layer(stack.cell, part_x, stack.weights_of(part), stack.bias, part_h0, part_c0, part_lengths, "none");
      return {y, h_n, c_n};
    };
    const auto [y, h_n, c_n] = run_stack(stack, x, h0, c0, lengths, run_part);
    return {stack.last ? y : y.flatten(2), h_n, c_n};
  }
  // As nn.LSTM's backward pass, ours keeps a copy of what is a view with the batch first, and of y. Users may then
  // change theirs in place.
  const auto out =
      StackFunction::apply(x.contiguous(), h0, c0, lengths, stack, recompute ? "cells" : "all", stack.weights);
  return {last ? out[0] : out[0].flatten(2).clone(), out[1], birnn::state_is_output(cell) ? Tensor() : out[2]};
}

ThreeTensors lstm(const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                  const OptionalTensor& c0, const OptionalTensor& lengths, int64_t layers, bool last, bool recompute) {
  return run({CellKind::lstm, weights, bias, layers, last}, x, h0, c0, lengths, recompute);
}

template <CellKind kCell>
std::tuple<Tensor, Tensor> h_stack(const Tensor& x, at::TensorList weights, bool bias, const OptionalTensor& h0,
                                   const OptionalTensor& lengths, int64_t layers, bool last, bool recompute) {
  const auto [y, h_n, none] = run({kCell, weights, bias, layers, last}, x, h0, {}, lengths, recompute);
  return {y, h_n};
}

}  // namespace

TORCH_LIBRARY_IMPL(birnn_ext, Autograd, m) {
  m.impl("lstm_layer", birnn::lstm_layer<Autograd>);
  birnn::for_each_h_cell([&](auto of) {
    using Cell = decltype(of);
    m.impl((std::string(Cell::kName) + "_layer").c_str(), birnn::h_layer<Autograd, Cell::kKind>);
  });
}
TORCH_LIBRARY_IMPL(birnn_ext, CompositeImplicitAutograd, m) {
  m.impl("lstm", lstm);
  birnn::for_each_h_cell([&](auto of) { m.impl(decltype(of)::kName, h_stack<decltype(of)::kKind>); });
}
