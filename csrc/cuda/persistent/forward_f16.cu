#include "forward.cuh"

BIRNN_FORWARD_KERNELS(__half, BIRNN_FORWARD_ROWS_16)
