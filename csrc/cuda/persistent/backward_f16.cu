#include "backward.cuh"

namespace birnn::cuda {

template <>
const void* backward_kernel_of<__half>(int row) {
#define BIRNN_ROW(exchange, ...) \
  reinterpret_cast<const void*>(backward_kernel<__half, BackwardTraits<Exchange::exchange, __VA_ARGS__>>),
  static const void* const kernels[] = {BIRNN_BACKWARD_ROWS_16(BIRNN_ROW)};
#undef BIRNN_ROW
  return kernels[row];
}

}  // namespace birnn::cuda
