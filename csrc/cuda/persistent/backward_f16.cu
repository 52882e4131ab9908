#include "backward.cuh"

BIRNN_BACKWARD_KERNELS(__half, BIRNN_BACKWARD_ROWS_16)
