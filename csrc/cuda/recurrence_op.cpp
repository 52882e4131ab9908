// The operators on CUDA. The algorithm `stepwise` (stepwise/stepwise_op.h) or one of `persistent-*`
// (persistent/kernels.h) runs them. All only launch, so they can be captured into a CUDA graph.
#include "recurrence_op.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/stack.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/version.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <initializer_list>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "../op_common.h"
#include "algorithm_calls.h"
#include "choice.h"
#include "persistent/kernels.h"
#include "stepwise/stepwise_op.h"

namespace birnn::cuda {
namespace {

// ---- persistent

// Returns how many groups of CTAs the device runs at once; 0 if not even one (of each direction, in grid).
template <class Plan>
int64_t resident_groups(DType dtype, const Plan& plan, int64_t D, int multiprocessors) {
  int count = 0;
  const cudaError_t error = persistent_resident(dtype, plan, &count);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it is this function's answer, not the next launch's
    return 0;
  }
  if (plan.exchange != Exchange::grid) return count;
  return int64_t(count) * multiprocessors / plan.ctas / D * D;
}

struct Run {
  Choice choice;
  int64_t forward_groups, backward_groups;  // resident at once
};

// Returns the algorithms that BIRNN_CUDA_ALGO names, with commas between; all if it is not set.
std::vector<Algorithm> wished_algorithms(const char* wish) {
  std::vector<Algorithm> wished;
  std::istringstream names(wish ? wish : "");
  for (std::string name; std::getline(names, name, ',');) {
    const auto space = [](unsigned char c) { return std::isspace(c) != 0; };
    name.erase(std::remove_if(name.begin(), name.end(), space), name.end());
    if (name.empty()) continue;
    const std::optional<Algorithm> algorithm = algorithm_named(name);
    TORCH_CHECK_VALUE(algorithm,
                      "BIRNN_CUDA_ALGO must name some of stepwise, persistent-cta, persistent-grid and "
                      "persistent-cluster, with commas between; got '",
                      wish, "'");
    wished.push_back(*algorithm);
  }
  return wished.empty() ? all_algorithms() : wished;
}

// Decides how to run a layer: by the best of the algorithms that may run it and can.
Run decide(const Layer& layer) {
  const char* wish = std::getenv("BIRNN_CUDA_ALGO");
  const auto* device = at::cuda::getCurrentDeviceProperties();
  using Key = std::tuple<int, CellKind, DType, bool, int64_t, int64_t, int64_t, std::string>;
  const Key key{at::cuda::current_device(),
                layer.cell,
                layer.dtype,
                layer.T > kMostSteps,
                layer.B,
                layer.D,
                layer.H,
                wish ? wish : ""};
  static std::mutex mutex;
  static std::map<Key, Run> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() > 1000) known.clear();
  const auto found = known.find(key);
  if (found != known.end()) return found->second;

  const Gpu gpu{device->multiProcessorCount, int(device->sharedMemPerBlockOptin), device->major * 10 + device->minor};
  const auto resident = [&](const auto& plan) {
    return resident_groups(layer.dtype, plan, layer.D, gpu.multiprocessors);
  };
  Run run{choose(layer, gpu, wished_algorithms(wish), [&](const auto& plan) { return resident(plan) > 0; })};
  TORCH_CHECK(run.choice.possible, "BIRNN_CUDA_ALGO=", wish, " can't run this layer: ", name_of(layer.cell),
              ", hidden_size ", layer.H, ", batch ", layer.B, ", ", layer.D, " direction(s), on ", device->name,
              " (compute capability ", device->major, ".", device->minor, ", ", gpu.multiprocessors,
              " multiprocessors with ", gpu.shared_memory,
              " bytes of shared memory for a block). persistent-* run the LSTM and the GRU in float32, float16 and "
              "bfloat16 from compute capability 8.0, persistent-cluster from 9.0, built for it, as long as the weights "
              "fit on the chip. "
              "stepwise runs every layer: BIRNN_CUDA_ALGO=",
              wish, ",stepwise falls back to it");
  if (run.choice.algorithm != Algorithm::stepwise) {
    run.forward_groups = resident(run.choice.forward);
    run.backward_groups = resident(run.choice.backward);
  }
  return known[key] = run;
}

// Returns the largest access in bytes, 16 or less, that all of these addresses and distances allow.
int access_of(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> distances) {
  uintptr_t bits = kPiece;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  for (const int64_t distance : distances) bits |= uintptr_t(distance);
  return int(bits & (~bits + 1));
}

// Tells whether float32 products must have float32's accuracy; otherwise PyTorch's switches allow TF32.
bool full_float32(DType dtype) {
  if (dtype != DType::f32) return true;
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision != at::Float32Precision::TF32;
#elif TORCH_VERSION_MINOR == 9
  return at::globalContext().float32Precision("cuda", "matmul") != "tf32";
#else
  return !at::globalContext().allowTF32CuBLAS();
#endif
}

// Allocates what goes from CTA to CTA through global memory, with the groups' counters before it.
template <class Params>
Tensor grid_exchange(Params& p, int turns, int64_t bytes, const at::TensorOptions& options, cudaStream_t stream) {
  if (p.plan.exchange != Exchange::grid) return {};
  const int64_t groups = int64_t(p.groups) * turns, counters = groups * kCounter;
  Tensor memory = at::empty({counters + groups * 2 * bytes}, options.dtype(at::kByte));
  auto* base = static_cast<char*>(memory.mutable_data_ptr());
  C10_CUDA_CHECK(cudaMemsetAsync(base, 0, size_t(counters), stream));
  p.grid = {base + counters, reinterpret_cast<unsigned*>(base), int(bytes)};
  return memory;
}

int groups_of(const RecurrenceSizes& sizes, Exchange exchange, int batch, int64_t resident) {
  const int64_t wanted = sizes.D * divide_up(sizes.B, batch);
  return int(exchange == Exchange::grid ? std::min(wanted, resident) : wanted);
}

void persistent(birnn::Forward& call, const Run& run, cudaStream_t stream) {
  const int size = int(call.y.element_size());
  PersistentForward p{call.params, run.choice.forward};
  const ForwardRow& row = row_of(size, p.plan);
  p.groups = groups_of(p, p.plan.exchange, row.batch(), run.forward_groups);
  p.access = access_of({p.gates_x}, {p.H * size});
  p.weights_aligned = access_of({p.w_hh[0], p.w_hh[1]}, {p.H * size}) >= 8;
  p.full_float32 = full_float32(call.dtype);
  const Tensor memory =
      grid_exchange(p, row.turns, h_stride(p.plan.h_blocks, row.sequences(), size), call.y.options(), stream);
  C10_CUDA_CHECK(persistent_forward(call.dtype, p, stream));
}

void persistent(birnn::Backward& call, const Run& run, cudaStream_t stream) {
  const int size = int(call.d_gates_x.element_size());
  PersistentBackward p{call.params, run.choice.backward};
  const BackwardRow& row = row_of(size, p.plan);
  p.groups = groups_of(p, p.plan.exchange, row.batch(), run.backward_groups);
  p.access = access_of({p.gates, p.cells, p.dy}, {p.H * size, p.dy_stride_t * size, p.dy_stride_b * size});
  p.full_float32 = full_float32(call.dtype);
  const int64_t bytes = p.plan.ctas * received_bytes(p.plan.ctas * row.splits, row.own_tiles(size), row.eights);
  const Tensor memory = grid_exchange(p, row.turns, bytes, call.d_gates_x.options(), stream);
  C10_CUDA_CHECK(persistent_backward(call.dtype, p, stream));
}

// Returns W_hh (D, gates * H, H), for GEMMs.
Tensor stacked(at::TensorList w_hh) { return w_hh[0].dim() == 3 ? w_hh[0] : at::stack(w_hh); }

}  // namespace

void run(birnn::Forward& call, at::TensorList w_hh, const OptionalTensor& h0, const OptionalTensor& c0,
         const OptionalTensor& lengths) {
  const auto [T, B, D, H] = static_cast<const RecurrenceSizes&>(call.params);
  const c10::cuda::CUDAGuard guard(call.y.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  check_lengths_on_device(lengths, call.params);
  const Run chosen = B > 0 ? decide({call.cell, call.dtype, T, B, D, H}) : Run{};
  if (chosen.choice.algorithm == Algorithm::stepwise)
    stepwise_forward(call, stacked(w_hh), h0, c0, stream);
  else
    persistent(call, chosen, stream);
  ++op_calls.cuda_forward;
  count(chosen.choice.algorithm);
}

void run(birnn::Backward& call, at::TensorList w_hh, const OptionalTensor& lengths, const OptionalTensor& dh_n,
         const OptionalTensor& dc_n) {
  const auto [T, B, D, H] = static_cast<const RecurrenceSizes&>(call.params);
  const c10::cuda::CUDAGuard guard(call.d_gates_x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Run chosen = B > 0 ? decide({call.cell, call.dtype, T, B, D, H}) : Run{};
  if (chosen.choice.algorithm == Algorithm::stepwise)
    stepwise_backward(call, stacked(w_hh), lengths, dh_n, dc_n, stream);
  else
    persistent(call, chosen, stream);
  ++op_calls.cuda_backward;
  count(chosen.choice.algorithm);
}

}  // namespace birnn::cuda
