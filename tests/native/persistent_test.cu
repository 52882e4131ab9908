// One persistent forward and backward pass in a program without PyTorch, so that it can be built in two ways: as it is,
// and with -DBIRNN_WITHOUT_BARRIER, which drops the barrier between steps. tests/test_cuda_persistent.py checks that a
// race detector passes the first and reports the second.
#include <cstdio>
#include <vector>

#include "cuda/persistent.h"

using namespace birnn;
using namespace birnn::cuda;

namespace {

template <class T>
T* on_device(size_t count, float scale) {
  std::vector<T> host(count);
  for (size_t i = 0; i < count; ++i) host[i] = T(scale * (float(i * 7919 % 1000) / 500 - 1));
  T* device = nullptr;
  if (cudaMalloc(&device, count * sizeof(T)) != cudaSuccess) std::abort();
  cudaMemcpy(device, host.data(), count * sizeof(T), cudaMemcpyHostToDevice);
  return device;
}

bool report(const char* what, cudaError_t error) {
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  return error == cudaSuccess;
}

}  // namespace

int main() {
  const int64_t T = 5, B = 16, D = 2, H = 64;
  const int limit = 99 << 10;
  PersistentForward f{};
  static_cast<RecurrenceSizes&>(f) = {T, B, D, H};
  f.gates_x = on_device<float>(T * B * D * 4 * H, 1);
  f.w_hh[0] = on_device<float>(4 * H * H, 0.1f);
  f.w_hh[1] = on_device<float>(4 * H * H, 0.1f);
  f.y = on_device<float>(T * B * D * H, 0);
  f.h_n = on_device<float>(D * B * H, 0);
  f.c_n = on_device<float>(D * B * H, 0);
  f.gates = on_device<float>(T * B * D * 4 * H, 0);
  f.cells = on_device<float>(T * B * D * H, 0);
  f.plan = forward_plan(4, H, Exchange::cta, 1, limit);
  f.groups = int(D);
  f.wide = f.exact = true;
  if (!report("forward", persistent_forward(DType::f32, f, nullptr))) return 1;

  PersistentBackward b{};
  static_cast<RecurrenceSizes&>(b) = {T, B, D, H};
  b.w_hh[0] = f.w_hh[0];
  b.w_hh[1] = f.w_hh[1];
  b.gates = f.gates;
  b.cells = f.cells;
  b.dy = on_device<float>(T * B * D * H, 1);
  b.dy_stride_t = B * D * H;
  b.dy_stride_b = D * H;
  b.d_gates_x = on_device<float>(T * B * D * 4 * H, 0);
  b.plan = backward_plan(4, H, Exchange::cta, 1);
  b.groups = int(D);
  b.wide = b.exact = true;
  return report("backward", persistent_backward(DType::f32, b, nullptr)) ? 0 : 1;
}
