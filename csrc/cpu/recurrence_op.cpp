// The CPU implementation of the operators. It checks arguments and passes raw pointers to recurrence.cpp, on OpenMP's
// threads.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <omp.h>
#include <pthread.h>
#include <torch/library.h>

#include <vector>

#include "../cell_op.h"
#include "../layer_call.h"
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

InputProjection projection(const LayerCall& layer, const Tensor& x, const void* (&w_hh)[2]) {
  InputProjection input{x.const_data_ptr(), layer.I, x.stride(0), x.stride(1), {}, {}, {}};
  layer.point(w_hh, input);
  for (int64_t d = 0; d < layer.D; ++d) input.w_ih[d] = layer.weights.w_ih(d).const_data_ptr();
  return input;
}

// The kernels need neighbouring features side by side in memory.
Tensor with_dense_rows(const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous(); }

struct Cpu {
  // Only CUDA's products need more than the call.
  template <class... Unused>
  static void run(birnn::Forward& call, const Unused&...) {
    check_lengths(call.params.lengths, call.params);
    for (const Tensor& t : {call.y, call.gates, call.cells})
      if (t.defined()) advise(t);
    recurrence_forward(call.cell, effective(call.dtype), call.params, max_threads(), parallel);
    ++op_calls.cpu_forward;
  }

  template <class... Unused>
  static void run(birnn::Backward& call, const Unused&...) {
    check_lengths(call.params.lengths, call.params);
    if (call.d_gates_x.defined()) advise(call.d_gates_x);
    recurrence_backward(call.cell, effective(call.dtype), call.params, max_threads(), parallel);
    ++op_calls.cpu_backward;
  }

  static FiveTensors layer(CellKind cell, const Tensor& x_, at::TensorList weights, bool bias, const OptionalTensor& h0,
                           const OptionalTensor& c0, const OptionalTensor& lengths, c10::string_view save) {
    const LayerCall layer(cell, x_, {weights, bias});
    const Tensor x = with_dense_rows(x_);
    birnn::Forward call(cell, layer.dtype, layer.sizes(), x.options(), h0, c0, lengths, save_named(save));
    call.params.input = projection(layer, x, call.params.w_hh);
    run(call);
    return call.results();
  }

  static LayerGradients layer_backward(CellKind cell, const Tensor& x_, at::TensorList weights, bool bias,
                                       const OptionalTensor& h0, const OptionalTensor& c0,
                                       const OptionalTensor& lengths, const Tensor& y, const Tensor& gates,
                                       const Tensor& cells, const OptionalTensor& dy, const OptionalTensor& dh_n,
                                       const OptionalTensor& dc_n, bool x_grad, bool weight_grads, bool state_grads) {
    const LayerCall layer(cell, x_, {weights, bias});
    const Tensor x = with_dense_rows(x_);
    birnn::Backward call(cell, layer.dtype, layer.sizes(), x.options(), h0, c0, lengths, y, gates, cells, dy, dh_n,
                         dc_n, state_grads);
    BackwardParams& p = call.params;
    p.input = projection(layer, x, p.w_hh);
    const Tensor dx = x_grad ? at::zeros(x.sizes(), x.options()) : at::empty({0}, x.options());
    if (x_grad) p.dx = dx.mutable_data_ptr();
    std::vector<Tensor> d_weights;
    for (const Tensor& w : weights)
      d_weights.push_back(weight_grads ? at::empty(w.sizes(), x.options()) : at::empty({0}, x.options()));
    const LayerWeights gradients{d_weights, bias};
    for (int64_t d = 0; weight_grads && d < layer.D; ++d) {
      p.dw_ih[d] = gradients.w_ih(d).mutable_data_ptr();
      p.dw_hh[d] = gradients.w_hh(d).mutable_data_ptr();
      if (bias) p.d_bias_ih[d] = gradients.bias_ih(d).mutable_data_ptr();
      if (bias) p.d_bias_hh[d] = gradients.bias_hh(d).mutable_data_ptr();
    }
    if (layer.B == 0 && weight_grads)
      for (const Tensor& gradient : d_weights) gradient.zero_();
    run(call);
    return {dx, d_weights, call.dh0, call.dc0};
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(birnn_ext, CPU, m) { register_cells<Cpu>(m); }

}  // namespace birnn::cpu
