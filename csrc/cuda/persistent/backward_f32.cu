#include "backward.cuh"

namespace birnn::cuda {

template <>
const void* backward_kernel_of<float>(int row) {
#define BIRNN_ROW(exchange, ...) \
  reinterpret_cast<const void*>(backward_kernel<float, BackwardTraits<Exchange::exchange, __VA_ARGS__>>),
  static const void* const kernels[] = {BIRNN_BACKWARD_ROWS_32(BIRNN_ROW)};
#undef BIRNN_ROW
  return kernels[row];
}

}  // namespace birnn::cuda
