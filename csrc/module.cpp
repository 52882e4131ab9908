// The Python module birnn_ext._C: what was built, which kernels were chosen, how often they ran. Importing it registers
// the operators. The macros BIRNN_* come from setup.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "cpu/isa.h"
#include "op_common.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(BIRNN_CUDA_VERSION)
  info["cuda"] = BIRNN_CUDA_VERSION;
  info["cuda_architectures"] = BIRNN_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
#endif
  info["compiler"] = __VERSION__;
  info["cpu_isas"] = birnn::cpu::compiled_isas();
  info["cpu_isa"] = birnn::cpu::chosen_isa();
  return info;
}

py::dict op_calls() {
  py::dict calls;
  calls["cpu_forward"] = birnn::op_calls.cpu_forward.load();
  calls["cpu_backward"] = birnn::op_calls.cpu_backward.load();
  calls["cuda_forward"] = birnn::op_calls.cuda_forward.load();
  calls["cuda_backward"] = birnn::op_calls.cuda_backward.load();
  for (int k = 0; k < birnn::cuda::kAlgorithms; ++k)
    calls[(std::string("cuda_") + birnn::cuda::kAlgorithmNames[k]).c_str()] = birnn::op_calls.cuda_algorithms[k].load();
  return calls;
}

// exp, sigmoid or tanh of n floats at address x, to address y, by the chosen kernels' own function.
void cell_math(const std::string& name, uintptr_t x, uintptr_t y, int64_t n) {
  const auto& kernels = birnn::cpu::chosen_kernels(birnn::DType::f32);
  const auto function = name == "exp" ? kernels.exp : name == "sigmoid" ? kernels.sigmoid : kernels.tanh;
  function(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), n);
}

// What would run a layer on a GPU: (algorithm, CTAs of a group, bytes of shared memory forward and backward, the
// model's microseconds of a step forward and one back). Of one algorithm if it is named; None if that can't run the
// layer.
py::object cuda_choice(const std::string& dtype, int64_t H, int64_t B, int64_t D, int multiprocessors,
                       int shared_memory, int capability, const std::string& algorithm) {
  using namespace birnn;
  const cuda::Layer layer{dtype == "float64"   ? DType::f64
                          : dtype == "float32" ? DType::f32
                          : dtype == "float16" ? DType::f16
                                               : DType::bf16,
                          B, D, H};
  const cuda::Gpu gpu{multiprocessors, shared_memory, capability};
  cuda::Choice choice = cuda::choose(layer, gpu);
  for (int k = 0; k < cuda::kAlgorithms; ++k)
    if (algorithm == cuda::kAlgorithmNames[k]) choice = cuda::best_of(cuda::Algorithm(k), layer, gpu);
  if (!choice.possible) return py::none();
  int forward = 0, backward = 0;
  if (choice.algorithm != cuda::Algorithm::stepwise) {
    const int size = layer.dtype == DType::f32 ? 4 : 2;
    const auto exchange = cuda::exchange_of(choice.algorithm);
    forward = cuda::forward_plan(size, H, exchange, choice.ctas, shared_memory).bytes;
    backward = cuda::backward_plan(size, H, exchange, choice.ctas).bytes;
  }
  return py::make_tuple(cuda::kAlgorithmNames[int(choice.algorithm)], choice.ctas, forward, backward, choice.us);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  birnn::cpu::chosen_isa();  // a wrong BIRNN_CPU_ISA is an error at import, not at the first call
  m.def("build_info", &build_info);
  m.def("op_calls", &op_calls);
  m.def("cell_math", &cell_math);
  m.def("cuda_choice", &cuda_choice);
}
