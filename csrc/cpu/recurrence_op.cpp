// The CPU implementation of the operators: checks, then hands raw pointers to recurrence.cpp on torch's threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../op_common.h"
#include "recurrence.h"

namespace birnn::cpu {
namespace {

void parallel_for(int64_t n, const std::function<void(int64_t)>& task) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) task(k);
  });
}

void check_lengths(const int64_t* lengths, const RecurrenceSizes& sizes) {
  for (int64_t b = 0; lengths && b < sizes.B; ++b)
    TORCH_CHECK_VALUE(0 <= lengths[b] && lengths[b] <= sizes.T,
                      "lstm_recurrence: lengths must be between 0 and T = ", sizes.T, ", got lengths[", b,
                      "] = ", lengths[b]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_recurrence(const Tensor& gates_x, const Tensor& w_hh,
                                                                   const OptionalTensor& h0, const OptionalTensor& c0,
                                                                   const OptionalTensor& lengths, bool save) {
  birnn::Forward call(gates_x, w_hh, h0, c0, lengths, save);
  check_lengths(call.params.lengths, call.params);
  recurrence_forward(call.dtype, call.params, at::get_num_threads(), parallel_for);
  ++op_calls.cpu_forward;
  return call.results();
}

std::tuple<Tensor, Tensor, Tensor> lstm_recurrence_backward(const Tensor& w_hh, const OptionalTensor& c0,
                                                            const OptionalTensor& lengths, const Tensor& gates,
                                                            const Tensor& cells, const OptionalTensor& dy,
                                                            const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                                            bool state_grads) {
  birnn::Backward call(w_hh, c0, lengths, gates, cells, dy, dh_n, dc_n, state_grads);
  check_lengths(call.params.lengths, call.params);
  recurrence_backward(call.dtype, call.params, at::get_num_threads(), parallel_for);
  ++op_calls.cpu_backward;
  return call.results();
}

}  // namespace

TORCH_LIBRARY_IMPL(birnn_ext, CPU, m) {
  m.impl("lstm_recurrence", lstm_recurrence);
  m.impl("lstm_recurrence_backward", lstm_recurrence_backward);
}

}  // namespace birnn::cpu
