// How the persistent kernels are launched: as CTAs on their own, all resident together, or in clusters.
#pragma once

#include <initializer_list>

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

inline cudaError_t allow(const void* kernel, Exchange exchange, int ctas, int bytes) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && exchange == Exchange::cluster && ctas > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

// CTAs that a multiprocessor can hold at once (cta, grid), or clusters that the device can (cluster).
inline cudaError_t resident(const void* kernel, Exchange exchange, int ctas, int threads, int bytes, int* count) {
  *count = 0;
  const cudaError_t error = allow(kernel, exchange, ctas, bytes);
  if (error != cudaSuccess) return error;
  if (exchange == Exchange::cluster) {
    const LaunchConfig launch(exchange, ctas, 1, threads, bytes, nullptr);
    return cudaOccupancyMaxActiveClusters(count, kernel, &launch.config);
  }
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(count, kernel, threads, size_t(bytes));
}

inline cudaError_t launch(const void* kernel, Exchange exchange, int ctas, int groups, int threads, int bytes,
                          const void* params, cudaStream_t stream) {
  const cudaError_t error = allow(kernel, exchange, ctas, bytes);
  if (error != cudaSuccess) return error;
  const LaunchConfig launch(exchange, ctas, groups, threads, bytes, stream);
  void* args[] = {const_cast<void*>(params)};
  return cudaLaunchKernelExC(&launch.config, kernel, args);
}

}  // namespace birnn::cuda
