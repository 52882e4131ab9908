#include "backward.cuh"

BIRNN_BACKWARD_KERNELS(__nv_bfloat16, BIRNN_BACKWARD_ROWS_16)
