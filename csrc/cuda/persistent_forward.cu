// The forward pass of the algorithm `persistent` (persistent.h): all steps of a layer in one launch.
//
// A warp holds the rows of W_hh for the four gates of a tile's 16 units (or, where a tile has several warps, a part of
// each row) as operands of mma, the first chunks in registers, the others in shared memory. In each step it
//   1. multiplies h_{t-1}, which is in shared memory,
//   2. adds gates_x, which was fetched during the step before, and does the cell on its accumulators,
//   3. writes the gates over gates_x, and from there, and from c and h, whole pieces to global memory,
//   4. hands its h to all CTAs of the group; one barrier.
#include "persistent.cuh"
#include "persistent_launch.h"

namespace birnn::cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) forward_kernel(const __grid_constant__ PersistentForward p) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) char memory[];
  constexpr int kStep = kChunk / int(sizeof(S));  // elements of a chunk
  const auto& plan = p.plan;
  // computed where they are wanted, not kept: registers are for weights
  const auto rank = [&] { return int(blockIdx.x) % plan.ctas; };
  const auto group = [&] { return int(blockIdx.x) / plan.ctas; };
  const int d = group() % int(p.D);
  int lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
  const int warp = threadIdx.x / 32, tile = warp / plan.splits, split = warp % plan.splits;
  int unit0 = (rank() * plan.tiles + tile) * kUnits;
  const bool leads = split == 0;  // does the tile's cells
  const int H = int(p.H), T = int(p.T);
  const int64_t rows_of_step = p.B * p.D;  // of (T, B, D)

  // ---- weights
  const int first_chunk = split * plan.warp_chunks;
  const int chunks = max(0, min(plan.warp_chunks, plan.chunks - first_chunk));
  uint4* const weights_memory =
      reinterpret_cast<uint4*>(memory) + warp * max(0, plan.warp_chunks - kRegisterChunks) * 8 * 32 + lane;
  uint4 weights[kRegisterChunks][2][4];
  const auto load_weights = [&](uint4(&to)[2][4], int chunk) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int gate = n % 4, unit = unit0 + n / 4 * 8 + g;
      const S* row = static_cast<const S*>(p.w_hh[d]) + (int64_t(gate) * H + unit) * H;
      to[n / 4][gate] = unit < H
                            ? factor<S>(load_piece(row, (first_chunk + chunk) * kStep + t4 * kPerPiece<S>, H, p.wide))
                            : uint4{0, 0, 0, 0};
    }
  };
#pragma unroll
  for (int i = 0; i < kRegisterChunks; ++i)
    if (i < chunks) load_weights(weights[i], i);
  for (int i = kRegisterChunks; i < chunks; ++i) {
    uint4 w[2][4];
    load_weights(w, i);
#pragma unroll
    for (int n = 0; n < 8; ++n) weights_memory[((i - kRegisterChunks) * 8 + n) * 32] = w[n / 4][n % 4];
  }

  // ---- shared memory
  char* const stage = memory + plan.stage + tile * plan.tile_stage;
  char* const stage_c = stage + 4 * kPlane<S>;
  char* const stage_h = stage_c + kPlane<float>;
  const auto h_buffer = [&](int s) { return memory + plan.h + s % plan.h_buffers * kRows * plan.h_stride; };
  const auto h_piece = [&](char* buffer, int row, int piece) {
    return buffer + row * plan.h_stride + (piece ^ (row & 2)) * kPiece;
  };
  int exchanges = 0;  // so far, over all turns

  for (int b0 = group() / int(p.D) * kRows; b0 < p.B; b0 += p.groups / int(p.D) * kRows) {
    const auto length = [&](int row) -> int {
      if (b0 + row >= p.B) return 0;
      return int(p.lengths ? p.lengths[b0 + row] : p.T);
    };
    const int lengths[2] = {length(g), length(g + 8)};  // of the lane's two sequences

    // Moves gates_x of step s towards the stage.
    const auto fetch = [&](int s) {
      const int64_t t = d == 0 ? s : T - 1 - s;
#pragma unroll 1
      for (int gate = 0; gate < 4; ++gate)
        for_pieces<S>(lane, [&](int row, int piece) {
          if (b0 + row >= p.B) return;
          const S* from =
              static_cast<const S*>(p.gates_x) + (t * rows_of_step + (b0 + row) * p.D + d) * 4 * H + gate * H;
          fetch_piece(stage + gate * kPlane<S> + piece_at<S>(row, piece), from, unit0 + piece * kPerPiece<S>, H,
                      p.wide);
        });
    };
    // Writes a plane of the stage to the lane's pieces of a tensor; 0 in sequences that have no step t.
    const auto put = [&](auto* to, int64_t width, int64_t t, const char* plane) {
      using E = std::remove_pointer_t<decltype(to)>;
      for_pieces<E>(lane, [&](int row, int piece) {
        if (b0 + row >= p.B) return;
        const bool there = !p.lengths || t < p.lengths[b0 + row];
        store_piece(to + (t * rows_of_step + (b0 + row) * p.D + d) * width, unit0 + piece * kPerPiece<E>, H, p.wide,
                    plane + piece_at<E>(row, piece), there);
      });
    };

    // ---- the state before the first step
    __syncthreads();  // the turn before is done with shared memory
    for (int i = threadIdx.x * kPiece; i < plan.sums - plan.h; i += blockDim.x * kPiece)
      *reinterpret_cast<uint4*>(memory + plan.h + i) = {0, 0, 0, 0};
    __syncthreads();
    if (p.h0)
      for (int i = threadIdx.x; i < kRows * plan.chunks * (kChunk / kPiece); i += blockDim.x) {
        const int row = i / (plan.chunks * (kChunk / kPiece)), piece = i % (plan.chunks * (kChunk / kPiece));
        if (b0 + row >= p.B) continue;
        const S* from = static_cast<const S*>(p.h0) + (d * p.B + b0 + row) * H;
        *reinterpret_cast<uint4*>(h_piece(h_buffer(0), row, piece)) =
            factor<S>(load_piece(from, piece * kPerPiece<S>, H, p.wide));
      }
    if (leads) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = g + k % 2 * 8, unit = k / 2 * 8 + t4 * 2;
        const int64_t at = (d * p.B + b0 + row) * H + unit0 + unit;
        float2 h = {0, 0}, c = {0, 0};
        if (b0 + row < p.B && unit0 + unit < H) {
          if (p.h0) h.x = factor<S>(convert(static_cast<const S*>(p.h0)[at], 0.f));
          if (p.c0) c.x = convert(static_cast<const S*>(p.c0)[at], 0.f);
        }
        if (b0 + row < p.B && unit0 + unit + 1 < H) {
          if (p.h0) h.y = factor<S>(convert(static_cast<const S*>(p.h0)[at + 1], 0.f));
          if (p.c0) c.y = convert(static_cast<const S*>(p.c0)[at + 1], 0.f);
        }
        store_pair<S>(stage_h + pair_at<S>(row, unit), h);
        store_pair<float>(stage_c + pair_at<float>(row, unit), c);
      }
      fetch(0);
    }
    if (plan.exchange == Exchange::cluster)
      cluster_arrive(), cluster_wait();
    else
      __syncthreads();

    for (int s = 0; s < T; ++s) {
      const int t = d == 0 ? s : T - 1 - s;

      // ---- 1. products, for 8 units at a time: registers are for weights
      const char* const h = h_buffer(s);
      const auto rows = [&](int chunk) {
        const int piece = ((first_chunk + chunk) * 4 + t4) ^ (g & 2);
        return operand<S>(*reinterpret_cast<const uint4*>(h + g * plan.h_stride + piece * kPiece),
                          *reinterpret_cast<const uint4*>(h + (g + 8) * plan.h_stride + piece * kPiece));
      };
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        float sums[4][4] = {};
        if (s > 0 || p.h0) {
#pragma unroll
          for (int i = 0; i < kRegisterChunks; ++i)
            if (i < chunks) {
              auto& w = weights[i][block];
#pragma unroll
              for (int n = 0; n < 4; ++n) opaque(w[n]);
              multiply<S>(sums, rows(i), w, p.exact);
            }
#pragma unroll 1
          for (int i = kRegisterChunks; i < chunks; ++i) {
            const auto a = rows(i);
            uint4 w[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) w[n] = weights_memory[(((i - kRegisterChunks) * 2 + block) * 4 + n) * 32];
            multiply<S>(sums, a, w, p.exact);
          }
        }
        if (plan.splits > 1) {
          const auto part = [&](int k) {
            return reinterpret_cast<float4*>(memory + plan.sums) + lane +
                   ((tile * (plan.splits - 1) + k) * 2 + block) * 4 * 32;
          };
          if (!leads)
#pragma unroll
            for (int n = 0; n < 4; ++n) part(split - 1)[n * 32] = {sums[n][0], sums[n][1], sums[n][2], sums[n][3]};
          __syncthreads();
          if (leads)
            for (int k = 0; k < plan.splits - 1; ++k)
#pragma unroll
              for (int n = 0; n < 4; ++n) {
                const float4 more = part(k)[n * 32];
                sums[n][0] += more.x, sums[n][1] += more.y, sums[n][2] += more.z, sums[n][3] += more.w;
              }
        }
        // all of the group have read h_{t-1}, whose place h_t takes: waited for below
        const bool replaces = block == 1 && plan.h_buffers == 1 && s + 1 < T;
        if (replaces && plan.exchange == Exchange::cluster) cluster_arrive();
        if (replaces && plan.exchange == Exchange::cta) __syncthreads();
        if (!leads) continue;

        // ---- 2. cells
        if (block == 0) {
          wait_for_copies();
          __syncwarp();
        }
        forget(lane, g, t4, unit0);
        const int unit = block * 8 + t4 * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = g + half * 8;
          if (t >= lengths[half]) continue;  // h and c stay as they are
          char* const z = stage + pair_at<S>(row, unit);
          char* const c_at = stage_c + pair_at<float>(row, unit);
          const float2 z_x[4] = {load_pair<S>(z), load_pair<S>(z + kPlane<S>), load_pair<S>(z + 2 * kPlane<S>),
                                 load_pair<S>(z + 3 * kPlane<S>)};
          float2 c = load_pair<float>(c_at), h_t;
          const auto sum = [&](int gate, int u) { return sums[gate][half * 2 + u]; };
          float x[] = {z_x[0].x + sum(0, 0), z_x[1].x + sum(1, 0), z_x[2].x + sum(2, 0), z_x[3].x + sum(3, 0)};
          float y[] = {z_x[0].y + sum(0, 1), z_x[1].y + sum(1, 1), z_x[2].y + sum(2, 1), z_x[3].y + sum(3, 1)};
          h_t.x = factor<S>(Lstm::forward<Math<float>>(x, c.x));
          h_t.y = factor<S>(Lstm::forward<Math<float>>(y, c.y));
          // padding stays 0: gates would be the next step's gates_x, and an infinite h makes NaN of it
          if (unit0 + unit >= H) x[0] = x[1] = x[2] = x[3] = c.x = h_t.x = 0;
          if (unit0 + unit + 1 >= H) y[0] = y[1] = y[2] = y[3] = c.y = h_t.y = 0;
          store_pair<S>(z, {x[0], y[0]});
          store_pair<S>(z + kPlane<S>, {x[1], y[1]});
          store_pair<S>(z + 2 * kPlane<S>, {x[2], y[2]});
          store_pair<S>(z + 3 * kPlane<S>, {x[3], y[3]});
          store_pair<float>(c_at, c);
          store_pair<S>(stage_h + pair_at<S>(row, unit), h_t);
        }
      }

      if (leads) {
        __syncwarp();
        forget(lane, g, t4, unit0);
        // ---- 3. results, and the next step's gates_x in the place of the gates
        if (p.gates)
#pragma unroll 1
          for (int gate = 0; gate < 4; ++gate)
            put(static_cast<S*>(p.gates) + gate * H, 4 * p.H, t, stage + gate * kPlane<S>);
        if (p.cells) put(static_cast<float*>(p.cells), p.H, t, stage_c);
        put(static_cast<S*>(p.y), p.H, t, stage_h);
        if (s + 1 < T) fetch(s + 1);
      }
      if (s + 1 == T) break;

      // ---- 4. h for the group
      if (plan.h_buffers == 1 && plan.exchange == Exchange::cluster) cluster_wait();
      if (leads && unit0 < H)
        for_pieces<S>(lane, [&](int row, int piece) {
          const uint4 v = *reinterpret_cast<const uint4*>(stage_h + piece_at<S>(row, piece));
          const int column = unit0 / kPerPiece<S> + piece;
          char* const at = h_piece(h_buffer(s + 1), row, column);
          if (plan.exchange == Exchange::cta) {
            *reinterpret_cast<uint4*>(at) = v;
          } else if (plan.exchange == Exchange::cluster) {
            for (int k = 0; k < plan.ctas; ++k) store_remote(at, (rank() + k) % plan.ctas, v);
          } else {
            const int64_t handed = (int64_t(group()) * 2 + (exchanges & 1)) * kRows + row;
            store_global(static_cast<char*>(p.handed) + handed * plan.chunks * kChunk + column * kPiece, v);
          }
        });
#if defined(BIRNN_WITHOUT_BARRIER)  // to see that a test would notice
      continue;
#endif
      if (plan.exchange == Exchange::cta) {
        __syncthreads();
      } else if (plan.exchange == Exchange::cluster) {
        cluster_arrive(), cluster_wait();
      } else {
        grid_barrier(p.arrivals + group() * (kCounter / sizeof(unsigned)), unsigned(exchanges + 1) * plan.ctas);
        const int pieces = int(divide_up(H, kUnits)) * kUnits / kPerPiece<S>;
        for (int i = threadIdx.x; i < kRows * pieces; i += blockDim.x) {
          const int row = i / pieces, piece = i % pieces;
          const int64_t handed = (int64_t(group()) * 2 + (exchanges & 1)) * kRows + row;
          const auto* from = static_cast<const char*>(p.handed) + handed * plan.chunks * kChunk + piece * kPiece;
          // not from the L1 cache, which may hold what stood there before
          *reinterpret_cast<uint4*>(h_piece(h_buffer(0), row, piece)) = __ldcg(reinterpret_cast<const uint4*>(from));
        }
        ++exchanges;
        __syncthreads();
      }
    }

    // ---- the final state
    if (leads) {
      for_pieces<S>(lane, [&](int row, int piece) {
        if (b0 + row < p.B)
          store_piece(static_cast<S*>(p.h_n) + (d * p.B + b0 + row) * H, unit0 + piece * kPerPiece<S>, H, p.wide,
                      stage_h + piece_at<S>(row, piece));
      });
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = g + k % 2 * 8, unit = k / 2 * 8 + t4 * 2;
        if (b0 + row >= p.B) continue;
        const float2 c = load_pair<float>(stage_c + pair_at<float>(row, unit));
        S* const to = static_cast<S*>(p.c_n) + (d * p.B + b0 + row) * H + unit0 + unit;
        if (unit0 + unit < H) to[0] = convert(c.x, S());
        if (unit0 + unit + 1 < H) to[1] = convert(c.y, S());
      }
    }
  }
#else
  __trap();  // not launched: persistent_resident() finds none
#endif
}

const void* kernel(DType dtype) {
  return dtype == DType::f16    ? reinterpret_cast<const void*>(forward_kernel<__half>)
         : dtype == DType::bf16 ? reinterpret_cast<const void*>(forward_kernel<__nv_bfloat16>)
                                : reinterpret_cast<const void*>(forward_kernel<float>);
}

}  // namespace

cudaError_t persistent_resident(DType dtype, const ForwardPlan& plan, int* count) {
  return resident(kernel(dtype), plan.exchange, plan.ctas, plan.warps() * 32, plan.bytes, count);
}

cudaError_t persistent_forward(DType dtype, const PersistentForward& p, cudaStream_t stream) {
  return launch(kernel(dtype), p.plan.exchange, p.plan.ctas, p.groups, p.plan.warps() * 32, p.plan.bytes, &p, stream);
}

}  // namespace birnn::cuda
