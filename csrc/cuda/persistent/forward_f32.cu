#include "forward.cuh"

BIRNN_FORWARD_KERNELS(float, BIRNN_FORWARD_ROWS_32)
