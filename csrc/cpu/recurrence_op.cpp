// The CPU implementation of the operators. It checks arguments and passes raw pointers to recurrence.cpp, on OpenMP's
// threads.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <omp.h>
#include <pthread.h>
#include <torch/library.h>

#include <vector>

#include "../op_common.h"
#include "isa.h"
#include "memory.h"
#include "recurrence.h"

namespace birnn::cpu {
namespace {

// OpenMP's threads do not survive a fork, and a child that waits for them hangs. So a child runs the kernels, and
// PyTorch's own operations around them, on one thread.
std::atomic<bool> forked{false}, threads_started{false};
const int watch_forks = pthread_atfork(nullptr, nullptr, [] {
  forked = true;
  if (threads_started) at::set_num_threads(1);
});

int64_t max_threads() { return forked || at::in_parallel_region() ? 1 : at::get_num_threads(); }

int64_t parallel(int64_t threads, const std::function<void(int64_t)>& work) {
  if (threads == 1) {
    work(0);
    return 1;
  }
  threads_started = true;
  int64_t got = threads;
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    if (omp_get_num_threads() == threads) {
      work(omp_get_thread_num());
    } else {
#pragma omp single
      got = omp_get_num_threads();
    }
  }
  return got;
}

// Chooses float32 with products of 16 bits if torch.set_float32_matmul_precision allows it and the CPU gains from it.
DType effective(DType dtype) {
  const bool allowed = at::globalContext().float32MatmulPrecision() != at::Float32MatmulPrecision::HIGHEST;
  return dtype == DType::f32 && allowed && has_high_precision() ? DType::f32_high : dtype;
}

void advise(const Tensor& t) { advise_huge_pages(t.mutable_data_ptr(), static_cast<int64_t>(t.nbytes())); }

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors run(birnn::Forward& call) {
  check_lengths(call.params.lengths, call.params);
  for (const Tensor& t : {call.y, call.gates, call.cells}) advise(t);
  recurrence_forward(effective(call.dtype), call.params, max_threads(), parallel);
  ++op_calls.cpu_forward;
  return call.results();
}

FiveTensors lstm_recurrence(const Tensor& gates_x, const Tensor& w_hh, const OptionalTensor& h0,
                            const OptionalTensor& c0, const OptionalTensor& lengths, bool save) {
  birnn::Forward call(gates_x, w_hh, h0, c0, lengths, save);
  return run(call);
}

std::tuple<Tensor, Tensor, Tensor> lstm_recurrence_backward(const Tensor& w_hh, const OptionalTensor& c0,
                                                            const OptionalTensor& lengths, const Tensor& gates,
                                                            const Tensor& cells, const OptionalTensor& dy,
                                                            const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                                            bool state_grads) {
  birnn::Backward call(w_hh, c0, lengths, gates, cells, dy, dh_n, dc_n, state_grads);
  check_lengths(call.params.lengths, call.params);
  advise(call.d_gates_x);
  recurrence_backward(effective(call.dtype), call.params, max_threads(), parallel);
  ++op_calls.cpu_backward;
  return call.results();
}

// --- a layer with its input projection -------------------------------------------------------------------------------

// Checks the weights of a layer, and holds them.
struct Layer {
  int64_t T, B, I, D, H;
  DType dtype;
  std::vector<Tensor> weights;  // contiguous; w_ih, w_hh (, bias_ih, bias_hh) of each direction
  int64_t per_direction;

  Layer(const Tensor& x, at::TensorList given, bool bias, bool saved) : per_direction(bias ? 4 : 2) {
    TORCH_CHECK_VALUE(x.dim() == 3, "lstm_layer: x must have shape (T, B, I), got ", x.sizes());
    TORCH_CHECK_VALUE(x.size(0) > 0 && x.size(2) > 0,
                      "lstm_layer: x must have at least one time step and one feature, got shape ", x.sizes());
    dtype = dtype_of(x, "x");
    TORCH_CHECK_TYPE(!saved || dtype == DType::f64 || dtype == DType::f32,
                     "lstm_layer: x must be float64 or float32 for a backward pass, got ", x.scalar_type());
    const auto count = static_cast<int64_t>(given.size());
    TORCH_CHECK_VALUE(count == per_direction || count == 2 * per_direction, "lstm_layer: weights must be ",
                      per_direction, " or ", 2 * per_direction, " tensors, got ", count);
    TORCH_CHECK_VALUE(given[1].dim() == 2 && given[1].size(1) > 0, "lstm_layer: w_hh must have shape (4H, H), got ",
                      given[1].sizes());
    T = x.size(0), B = x.size(1), I = x.size(2), D = count / per_direction, H = given[1].size(1);
    for (int64_t k = 0; k < count; ++k) {
      static constexpr const char* names[] = {"w_ih", "w_hh", "bias_ih", "bias_hh"};
      const int64_t which = k % per_direction;
      const Tensor& w = given[k];
      if (which < 2)
        check(w, names[which], {4 * H, which == 0 ? I : H}, x.scalar_type(), x.device());
      else
        check(w, names[which], {4 * H}, x.scalar_type(), x.device());
      weights.push_back(w.contiguous());
    }
  }

  InputProjection projection(const Tensor& x, const void* (&w_hh)[2]) const {
    InputProjection input{x.const_data_ptr(), I, x.stride(0), x.stride(1), {}, {}, {}};
    for (int64_t d = 0; d < D; ++d) {
      const Tensor* own = &weights[d * per_direction];
      input.w_ih[d] = own[0].const_data_ptr();
      w_hh[d] = own[1].const_data_ptr();
      if (per_direction == 4) {
        input.bias_ih[d] = own[2].const_data_ptr();
        input.bias_hh[d] = own[3].const_data_ptr();
      }
    }
    return input;
  }
};

// The kernels need neighbouring features side by side in memory.
Tensor with_dense_rows(const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous(); }

FiveTensors lstm_layer(const Tensor& x_, at::TensorList weights, bool bias, const OptionalTensor& h0,
                       const OptionalTensor& c0, const OptionalTensor& lengths, int64_t save) {
  TORCH_CHECK_VALUE(0 <= save && save <= 2, "lstm_layer: save must be 0, 1 or 2, got ", save);
  const Layer layer(x_, weights, bias, save != 0);
  const Tensor x = with_dense_rows(x_);
  birnn::Forward call(layer.dtype, {layer.T, layer.B, layer.D, layer.H}, x.options(), h0, c0, lengths, save == 1,
                      save != 0);
  call.params.input = layer.projection(x, call.params.w_hh);
  return run(call);
}

std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor> lstm_layer_backward(
    const Tensor& x_, at::TensorList weights, bool bias, const OptionalTensor& h0, const OptionalTensor& c0,
    const OptionalTensor& lengths, const Tensor& y_, const Tensor& gates, const Tensor& cells, const OptionalTensor& dy,
    const OptionalTensor& dh_n, const OptionalTensor& dc_n, bool x_grad, bool weight_grads, bool state_grads) {
  const Layer layer(x_, weights, bias, true);
  const Tensor x = with_dense_rows(x_), y = y_.contiguous();
  const auto [T, B, I, D, H] = std::tie(layer.T, layer.B, layer.I, layer.D, layer.H);
  check(y, "y", {T, B, D, H}, x.scalar_type(), x.device());
  birnn::Backward call(layer.dtype, {T, B, D, H}, x.options(), c0, lengths, gates, cells, dy, dh_n, dc_n, state_grads);
  check_lengths(call.params.lengths, call.params);
  check(h0, "h0", {D, B, H}, x.scalar_type(), x.device());

  BackwardParams& p = call.params;
  p.input = layer.projection(x, p.w_hh);
  p.h0 = call.inputs.pointer(h0);
  p.y = y.const_data_ptr();
  const Tensor dx = x_grad ? at::zeros({T, B, I}, x.options()) : at::empty({0}, x.options());
  if (x_grad) p.dx = dx.mutable_data_ptr();
  std::vector<Tensor> d_weights;
  for (size_t k = 0; k < weights.size(); ++k)
    d_weights.push_back(weight_grads ? at::empty(weights[k].sizes(), x.options()) : at::empty({0}, x.options()));
  std::vector<Tensor> d_biases;
  for (int64_t d = 0; weight_grads && d < D; ++d) {
    const Tensor* own = &d_weights[d * layer.per_direction];
    p.dw_ih[d] = own[0].mutable_data_ptr();
    p.dw_hh[d] = own[1].mutable_data_ptr();
    d_biases.push_back(bias ? own[2] : at::empty({4 * H}, x.options()));
    p.d_bias[d] = d_biases[d].mutable_data_ptr();
    if (B == 0)
      for (int64_t k = 0; k < layer.per_direction; ++k) own[k].zero_();
  }
  recurrence_backward(effective(layer.dtype), p, max_threads(), parallel);
  for (int64_t d = 0; weight_grads && bias && d < D; ++d) d_weights[4 * d + 3].copy_(d_weights[4 * d + 2]);
  ++op_calls.cpu_backward;
  return {dx, d_weights, call.dh0, call.dc0};
}

}  // namespace

TORCH_LIBRARY_IMPL(birnn_ext, CPU, m) {
  m.impl("lstm_recurrence", lstm_recurrence);
  m.impl("lstm_recurrence_backward", lstm_recurrence_backward);
  m.impl("lstm_layer", lstm_layer);
  m.impl("lstm_layer_backward", lstm_layer_backward);
}

}  // namespace birnn::cpu
