// The Python module birnn_ext._C tells what was built, which kernels were chosen and how often they ran. Importing it
// registers the operators. setup.py defines the macros BIRNN_*.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cuda/algorithm_calls.h"
#include "op_common.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(BIRNN_CUDA_VERSION)
  info["cuda"] = BIRNN_CUDA_VERSION;
  info["cuda_architectures"] = BIRNN_CUDA_ARCHITECTURES;
  info["cuda_missing"] = py::none();
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
  info["cuda_missing"] = BIRNN_CUDA_MISSING;
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
    calls[(std::string("cuda_") + birnn::cuda::kAlgorithmNames[k]).c_str()] = birnn::cuda::algorithm_calls[k].load();
  return calls;
}

birnn::DType dtype_named(const std::string& name) {
  using birnn::DType;
  static const std::map<std::string, DType> dtypes = {
      {"float64", DType::f64}, {"float32", DType::f32}, {"float16", DType::f16}, {"bfloat16", DType::bf16}};
  const auto type = dtypes.find(name);
  if (type == dtypes.end()) throw py::value_error("dtype must be float64, float32, float16 or bfloat16, got " + name);
  return type->second;
}

// Applies the chosen kernels' sigmoid or tanh to n values at address x; writes to address y.
void cell_math(const std::string& name, const std::string& dtype, uintptr_t x, uintptr_t y, int64_t n) {
  if (name != "sigmoid" && name != "tanh") throw py::value_error("name must be sigmoid or tanh, got " + name);
  const birnn::DType type = dtype_named(dtype);
  const auto& kernels = birnn::cpu::chosen_kernels(type);
  (name == "sigmoid" ? kernels.sigmoid : kernels.tanh)(type, reinterpret_cast<const void*>(x),
                                                       reinterpret_cast<void*>(y), n);
}

// Says what would run a layer on a GPU, as a dictionary, which birnn_ext/_C.pyi describes.
py::object cuda_choice(const std::string& dtype, int64_t H, int64_t B, int64_t D, int multiprocessors,
                       int shared_memory, int capability, const std::string& algorithm, int largest_cluster,
                       const std::string& cell_name) {
  using namespace birnn;
  const DType type = dtype_named(dtype);
  if (H < 1 || B < 1 || D < 1 || D > 2 || multiprocessors < 1)
    throw py::value_error("H, B and multiprocessors must be positive, and D 1 or 2");
  const auto wished = cuda::algorithm_named(algorithm);
  if (!wished && !algorithm.empty()) throw py::value_error("unknown algorithm " + algorithm);

  const auto cell =
      std::find_if(std::begin(kCells), std::end(kCells), [&](CellKind k) { return cell_name == name_of(k); });
  if (cell == std::end(kCells)) throw py::value_error("cell must be lstm, gru, rnn_tanh or rnn_relu, got " + cell_name);

  const auto fits = [&](const auto& plan) {
    return plan.exchange != cuda::Exchange::cluster || plan.ctas <= largest_cluster;
  };
  const cuda::Choice choice = cuda::choose({*cell, type, 1, B, D, H}, {multiprocessors, shared_memory, capability},
                                           wished ? std::vector{*wished} : cuda::all_algorithms(), fits);
  if (!choice.possible) return py::none();
  using namespace py::literals;
  py::dict result("algorithm"_a = cuda::kAlgorithmNames[int(choice.algorithm)], "us"_a = choice.us);
  if (choice.algorithm != cuda::Algorithm::stepwise) {
    const int size = size_of(type);
    const auto described = [&](const auto& plan) {
      return py::dict("row"_a = plan.row, "ctas"_a = plan.ctas, "warps"_a = plan.warps, "bytes"_a = plan.bytes,
                      "sequences"_a = cuda::row_of(size, plan).sequences(), "ticks"_a = cuda::step_ticks(size, plan));
    };
    result["forward"] = described(choice.forward);
    result["backward"] = described(choice.backward);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  birnn::cpu::chosen_isa();  // a wrong BIRNN_CPU_ISA is an error at import, not at the first call
  m.def("build_info", &build_info);
  m.def("op_calls", &op_calls);
  m.def("cell_math", &cell_math, py::arg("name"), py::arg("dtype"), py::arg("x"), py::arg("y"), py::arg("n"));
  m.def("cuda_choice", &cuda_choice, py::arg("dtype"), py::arg("H"), py::arg("B"), py::arg("D"),
        py::arg("multiprocessors"), py::arg("shared_memory"), py::arg("capability"), py::arg("algorithm") = "",
        py::arg("largest_cluster") = birnn::cuda::kMaxCluster, py::arg("cell") = "lstm");
}
