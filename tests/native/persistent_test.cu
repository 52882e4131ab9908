// The persistent kernels in a program without PyTorch, for what can't be asked of the operators:
//   steps     one pass each way; built with -DBIRNN_WITHOUT_BARRIER, which drops the barrier between steps, a race
//             detector must report it
//   turns     grid with fewer groups than there are: the same results, bit by bit, as with all at once
//   resident  how many CTAs of a multiprocessor, and clusters, the device can run of what was compiled
// tests/test_cuda_persistent.py runs them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/persistent.h"

using namespace birnn;
using namespace birnn::cuda;

namespace {

constexpr int kLimit = 99 << 10;  // bytes of shared memory

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Device memory, filled with numbers or zeros. Never freed: the program is short.
template <class S>
S* on_device(size_t count, float scale) {
  std::vector<S> host(count);
  for (size_t i = 0; i < count; ++i) host[i] = S(scale * (float(i * 7919 % 1000) / 500 - 1));
  S* device = nullptr;
  check(cudaMalloc(&device, count * sizeof(S)), "cudaMalloc");
  check(cudaMemcpy(device, host.data(), count * sizeof(S), cudaMemcpyHostToDevice), "cudaMemcpy");
  return device;
}

template <class Plan>
int resident(DType dtype, const Plan& plan) {
  int count = 0;
  check(persistent_resident(dtype, plan, &count), "persistent_resident");
  return count;
}

// A layer and all that comes of it.
template <class S>
struct Layer {
  DType dtype;
  RecurrenceSizes sizes;
  S *gates_x, *w_hh, *h0, *dy;
  std::vector<std::vector<char>> results;

  Layer(DType type, int64_t T, int64_t B, int64_t D, int64_t H) : dtype(type), sizes{T, B, D, H} {
    gates_x = on_device<S>(T * B * D * 4 * H, 1);
    w_hh = on_device<S>(D * 4 * H * H, 0.1f);
    h0 = on_device<S>(D * B * H, 1);
    dy = on_device<S>(T * B * D * H, 1);
  }

  void keep(const void* device, size_t bytes) {
    results.emplace_back(bytes);
    check(cudaMemcpy(results.back().data(), device, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }

  // Forward and backward by `groups` groups of CTAs.
  void run(Exchange exchange, int ctas, int groups) {
    const auto [T, B, D, H] = sizes;
    const size_t states = D * B * H * sizeof(S), outputs = T * states, counters = size_t(groups) * kCounter;
    results.clear();

    PersistentForward f{};
    static_cast<RecurrenceSizes&>(f) = sizes;
    f.gates_x = gates_x;
    f.h0 = h0;
    f.y = on_device<S>(T * B * D * H, 0);
    f.h_n = on_device<S>(D * B * H, 0);
    f.c_n = on_device<S>(D * B * H, 0);
    f.gates = on_device<S>(T * B * D * 4 * H, 0);
    f.cells = on_device<float>(T * B * D * H, 0);
    f.plan = forward_plan(sizeof(S), H, exchange, ctas, kLimit);
    f.handed = on_device<char>(size_t(groups) * 2 * kRows * f.plan.chunks * kChunk, 0);

    PersistentBackward b{};
    static_cast<RecurrenceSizes&>(b) = sizes;
    b.gates = f.gates;
    b.cells = f.cells;
    b.dy = dy;
    b.dy_stride_t = B * D * H;
    b.dy_stride_b = D * H;
    b.d_gates_x = on_device<S>(T * B * D * 4 * H, 0);
    b.dh0 = on_device<S>(D * B * H, 0);
    b.dc0 = on_device<S>(D * B * H, 0);
    b.plan = backward_plan(sizeof(S), H, exchange, ctas);
    b.handed = on_device<float>(size_t(groups) * 2 * b.plan.pairs * ctas * kRows * kUnits, 0);

    for (int d = 0; d < D; ++d) f.w_hh[d] = b.w_hh[d] = w_hh + d * 4 * H * H;
    f.groups = b.groups = groups;
    f.wide = f.exact = b.wide = b.exact = true;
    f.arrivals = reinterpret_cast<unsigned*>(on_device<char>(counters, 0));
    b.arrivals = reinterpret_cast<unsigned*>(on_device<char>(counters, 0));
    if (!resident(dtype, f.plan) || !resident(dtype, b.plan)) check(cudaErrorInvalidConfiguration, "resident");
    check(persistent_forward(dtype, f, nullptr), "forward");
    check(cudaDeviceSynchronize(), "forward");
    check(persistent_backward(dtype, b, nullptr), "backward");
    check(cudaDeviceSynchronize(), "backward");

    keep(f.y, outputs);
    keep(f.h_n, states);
    keep(f.c_n, states);
    keep(f.gates, 4 * outputs);
    keep(f.cells, T * B * D * H * sizeof(float));
    keep(b.d_gates_x, 4 * outputs);
    keep(b.dh0, states);
    keep(b.dc0, states);
  }
};

template <class S>
bool turns(DType dtype) {
  bool good = true;
  for (int64_t T = 1; T <= 4; ++T) {
    Layer<S> layer(dtype, T, 40, 2, 48);  // three times 16 sequences
    layer.run(Exchange::grid, 3, 6);
    const auto expected = layer.results;
    for (const int groups : {2, 4}) {
      layer.run(Exchange::grid, 3, groups);
      const bool same = layer.results == expected;
      std::printf("%d bytes, T %d, %d groups: %s\n", int(sizeof(S)), int(T), groups, same ? "the same" : "DIFFERENT");
      good = good && same;
    }
  }
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "steps") {
    Layer<float>(DType::f32, 5, 16, 2, 64).run(Exchange::cta, 1, 2);
    return 0;
  }
  if (what == "turns") {
    const bool good[] = {turns<float>(DType::f32), turns<__half>(DType::f16), turns<__nv_bfloat16>(DType::bf16)};
    return good[0] && good[1] && good[2] ? 0 : 1;
  }
  if (what == "resident") {
    std::printf("cta %d\n", resident(DType::f32, forward_plan(4, 64, Exchange::cta, 1, kLimit)));
    std::printf("cluster %d\n", resident(DType::f32, forward_plan(4, 64, Exchange::cluster, 4, kLimit)));
    return 0;
  }
  std::printf("usage: %s steps|turns|resident\n", argv[0]);
  return 2;
}
