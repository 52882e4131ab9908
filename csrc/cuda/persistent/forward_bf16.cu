#include "forward.cuh"

BIRNN_FORWARD_KERNELS(__nv_bfloat16, BIRNN_FORWARD_ROWS_16)
