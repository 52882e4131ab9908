#include "backward.cuh"

BIRNN_BACKWARD_KERNELS(float, BIRNN_BACKWARD_ROWS_32)
