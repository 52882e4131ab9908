// How the persistent kernels are launched: as CTAs on their own, all resident together, or in clusters.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace birnn::cuda {
namespace {

struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  LaunchConfig(Exchange exchange, int ctas, int groups, int threads, int bytes, cudaStream_t stream) {
    config.gridDim = dim3(unsigned(ctas) * unsigned(groups));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = exchange == Exchange::cta ? 0 : 1;
    if (exchange == Exchange::cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = unsigned(ctas);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
};

// Always as much as the device has, not as a plan needs: threads that launch the same kernel with other plans share the
// attribute.
cudaError_t allow(const void* kernel, Exchange exchange, int ctas) {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && exchange == Exchange::cluster && ctas > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

// CTAs that a multiprocessor can hold at once (cta, grid), or clusters that the device can (cluster). None if the
// kernel was compiled for less than it takes: a GPU may run PTX for an older one.
cudaError_t resident(const void* kernel, Exchange exchange, int ctas, int threads, int bytes, int* count) {
  *count = 0;
  cudaFuncAttributes compiled = {};
  cudaError_t error = cudaFuncGetAttributes(&compiled, kernel);
  if (error != cudaSuccess || compiled.ptxVersion < (exchange == Exchange::cluster ? 90 : 80)) return error;
  error = allow(kernel, exchange, ctas);
  if (error != cudaSuccess) return error;
  if (exchange == Exchange::cluster) {
    const LaunchConfig launch(exchange, ctas, 1, threads, bytes, nullptr);
    return cudaOccupancyMaxActiveClusters(count, kernel, &launch.config);
  }
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(count, kernel, threads, size_t(bytes));
}

cudaError_t launch(const void* kernel, Exchange exchange, int ctas, int groups, int threads, int bytes,
                   const void* params, cudaStream_t stream) {
  const LaunchConfig launch(exchange, ctas, groups, threads, bytes, stream);
  void* args[] = {const_cast<void*>(params)};
  return cudaLaunchKernelExC(&launch.config, kernel, args);
}

const void* kernel(DType dtype, const ForwardPlan& plan) {
  return dtype == DType::f16    ? forward_kernel_of<__half>(plan.row)
         : dtype == DType::bf16 ? forward_kernel_of<__nv_bfloat16>(plan.row)
                                : forward_kernel_of<float>(plan.row);
}
const void* kernel(DType dtype, const BackwardPlan& plan) {
  return dtype == DType::f16    ? backward_kernel_of<__half>(plan.row)
         : dtype == DType::bf16 ? backward_kernel_of<__nv_bfloat16>(plan.row)
                                : backward_kernel_of<float>(plan.row);
}

}  // namespace

cudaError_t persistent_resident(DType dtype, const ForwardPlan& plan, int* count) {
  return resident(kernel(dtype, plan), plan.exchange, plan.ctas, plan.warps * kWarp, plan.bytes, count);
}
cudaError_t persistent_resident(DType dtype, const BackwardPlan& plan, int* count) {
  return resident(kernel(dtype, plan), plan.exchange, plan.ctas, plan.warps * kWarp, plan.bytes, count);
}

cudaError_t persistent_forward(DType dtype, const PersistentForward& p, cudaStream_t stream) {
  return launch(kernel(dtype, p.plan), p.plan.exchange, p.plan.ctas, p.groups, p.plan.warps * kWarp, p.plan.bytes, &p,
                stream);
}
cudaError_t persistent_backward(DType dtype, const PersistentBackward& p, cudaStream_t stream) {
  return launch(kernel(dtype, p.plan), p.plan.exchange, p.plan.ctas, p.groups, p.plan.warps * kWarp, p.plan.bytes, &p,
                stream);
}

}  // namespace birnn::cuda
