// How the persistent kernels are launched: as CTAs on their own, all resident together, or in clusters.
#pragma once

#include "persistent.h"

namespace birnn::cuda {

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
inline cudaError_t allow(const void* kernel, Exchange exchange, int ctas) {
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
inline cudaError_t resident(const void* kernel, Exchange exchange, int ctas, int threads, int bytes, int* count) {
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

inline cudaError_t launch(const void* kernel, Exchange exchange, int ctas, int groups, int threads, int bytes,
                          const void* params, cudaStream_t stream) {
  const LaunchConfig launch(exchange, ctas, groups, threads, bytes, stream);
  void* args[] = {const_cast<void*>(params)};
  return cudaLaunchKernelExC(&launch.config, kernel, args);
}

}  // namespace birnn::cuda
