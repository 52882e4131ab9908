#include "forward.cuh"

namespace birnn::cuda {

template <>
const void* forward_kernel_of<float>(int row) {
#define BIRNN_ROW(exchange, ...) \
  reinterpret_cast<const void*>(forward_kernel<float, ForwardTraits<Exchange::exchange, __VA_ARGS__>>),
  static const void* const kernels[] = {BIRNN_FORWARD_ROWS_32(BIRNN_ROW)};
#undef BIRNN_ROW
  return kernels[row];
}

}  // namespace birnn::cuda
