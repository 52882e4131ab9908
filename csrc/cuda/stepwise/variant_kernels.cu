// A block owns a row, one direction of one sequence, as layer norm sums over all of its units; a thread owns every
// kThreads-th unit.
#include <type_traits>

#include "../../core/variant_row.h"
#include "../cell_math.cuh"
#include "variant_kernels.h"

namespace birnn::cuda {
namespace {

constexpr int kThreads = 128, kWarp = 32, kWarps = kThreads / kWarp;

template <class S>
struct Row {
  using A = Accumulate<S>;
  using V = A;
  using M = Math<A>;
  A* shared;  // a value for each warp

  template <class F>
  __device__ void each(int64_t n, const F& f) const {
#pragma unroll 1  // rows are short, and ptxas would spill
    for (int64_t u = threadIdx.x; u < n; u += kThreads) f(u, 1);
  }
  template <class T>
  __device__ V load(const void* p, int64_t at, int64_t) const {
    if constexpr (std::is_same_v<T, bool>)
      return A(static_cast<const bool*>(p)[at]);
    else
      return convert(static_cast<const T*>(p)[at], A());
  }
  template <class T>
  __device__ void store(void* p, int64_t at, V v, int64_t) const {
    static_cast<T*>(p)[at] = convert(v, T());
  }
  template <class T>
  __device__ void store_one(void* p, int64_t at, T value) const {
    if (threadIdx.x == 0) static_cast<T*>(p)[at] = value;
  }
  __device__ V only(V v, int64_t) const { return v; }
  __device__ A sum(V v) const {
    for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    __syncthreads();  // whoever still reads the sums before
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = v;
    __syncthreads();
    A total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += shared[warp];
    return total;
  }
  __device__ A inverse_root(A a) const { return rsqrt(a); }
};

enum class Pass { forward, forward_projected, backward_output, backward };

template <Pass pass, class S, class Params>
__global__ void __launch_bounds__(kThreads) pass_kernel(const Params p) {
  __shared__ Accumulate<S> shared[kWarps];
  const Row<S> row{shared};
  if constexpr (pass == Pass::forward) variant_forward_row<S, S>(p, row, blockIdx.x);
  if constexpr (pass == Pass::forward_projected) variant_forward_projected_row<S, S>(p, row, blockIdx.x);
  if constexpr (pass == Pass::backward_output) variant_backward_output_row<S, S>(p, row, blockIdx.x);
  if constexpr (pass == Pass::backward) variant_backward_row<S, S>(p, row, blockIdx.x);
}

template <Pass pass, class Params>
cudaError_t launch(DType dtype, const Params& p, cudaStream_t stream) {
  const auto rows = unsigned(p.D * p.B);
  switch (dtype) {
    case DType::f64:
      pass_kernel<pass, double><<<rows, kThreads, 0, stream>>>(p);
      break;
    case DType::f32:
      pass_kernel<pass, float><<<rows, kThreads, 0, stream>>>(p);
      break;
    case DType::f16:
      pass_kernel<pass, __half><<<rows, kThreads, 0, stream>>>(p);
      break;
    case DType::bf16:
      pass_kernel<pass, __nv_bfloat16><<<rows, kThreads, 0, stream>>>(p);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t variant_forward(DType dtype, const VariantForward& p, cudaStream_t stream) {
  return launch<Pass::forward>(dtype, p, stream);
}

cudaError_t variant_forward_projected(DType dtype, const VariantForward& p, cudaStream_t stream) {
  return launch<Pass::forward_projected>(dtype, p, stream);
}

cudaError_t variant_backward_output(DType dtype, const VariantBackward& p, cudaStream_t stream) {
  return launch<Pass::backward_output>(dtype, p, stream);
}

cudaError_t variant_backward(DType dtype, const VariantBackward& p, cudaStream_t stream) {
  return launch<Pass::backward>(dtype, p, stream);
}

}  // namespace birnn::cuda
