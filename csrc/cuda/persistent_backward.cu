// The backward pass of the algorithm `persistent` (persistent.h): all steps of a layer in one launch.
//
// A CTA keeps its units' rows of W_hh, four gates each, as operands of mma whose columns are all units of the layer; a
// warp has some pairs of column blocks (tiles of 16 units), and of each a chain of chunks: its items, the first in
// registers, the others in shared memory. In each step
//   1. every warp multiplies the CTA's dz of the step before, which leaves parts of W_hh^T dz for its tiles,
//   2. the parts go to the CTAs that own the tiles; one barrier (none where there is one CTA only),
//   3. warp k sums the parts of the CTA's tile k, in the order of their sources, and does the cell backwards; dz takes
//      the place of the gates in shared memory, and whole pieces of it go to global memory,
//   4. a barrier of the CTA; then the step after next fetches its gates to where the dz before was.
#include "persistent.cuh"
#include "persistent_launch.h"

namespace birnn::cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) backward_kernel(const __grid_constant__ PersistentBackward p) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) char memory[];
  constexpr int kGatePlane = dz_plane(sizeof(S));
  constexpr bool kKeepsCells = keeps_cells(sizeof(S));
  const auto& plan = p.plan;
  // computed where they are wanted, not kept: registers are for weights
  const auto rank = [&] { return int(blockIdx.x) % plan.ctas; };
  const auto group = [&] { return int(blockIdx.x) / plan.ctas; };
  const int d = group() % int(p.D);
  int lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
  const int warp = threadIdx.x / 32;
  int unit0 = (rank() * plan.tiles + warp) * kUnits;  // of the tile whose cells this warp does
  const bool has_tile = warp < plan.tiles;
  const int H = int(p.H), T = int(p.T);
  const int64_t rows_of_step = p.B * p.D;  // of (T, B, D)

  // ---- weights: of column 8 n + g of a pair, the CTA's rows in the order of dz (tile, gate, unit)
  const int pairs = max(0, min(plan.warp_pairs, plan.pairs - warp * plan.warp_pairs));
  const int items = pairs * plan.chunks;
  uint4* const weights_memory =
      reinterpret_cast<uint4*>(memory) + warp * max(0, plan.warp_pairs * plan.chunks - kRegisterItems) * 2 * 32 + lane;
  uint4 weights[kRegisterItems][2];
  const auto load_weights = [&](uint4(&to)[2], int item) {
    const int pair = warp * plan.warp_pairs + item / plan.chunks;
    const int k = (item % plan.chunks * 4 + t4) * kPerPiece<S>;  // of 4 * 16 values a tile
    const int tile = k / (4 * kUnits), gate = k / kUnits % 4;
    const int unit = (rank() * plan.tiles + tile) * kUnits + k % kUnits;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = pair * kUnits + n * 8 + g;
      const S* from = static_cast<const S*>(p.w_hh[d]) + (int64_t(gate) * H + unit) * H + column;
      union {
        uint4 piece;
        S values[kPerPiece<S>];
      };
#pragma unroll
      for (int e = 0; e < kPerPiece<S>; ++e)
        values[e] = unit + e < H && column < H ? from[int64_t(e) * H] : convert(0.f, S());
      to[n] = factor<S>(piece);
    }
  };
#pragma unroll
  for (int i = 0; i < kRegisterItems; ++i)
    if (i < items) load_weights(weights[i], i);
  for (int i = kRegisterItems; i < items; ++i) {
    uint4 w[2];
    load_weights(w, i);
#pragma unroll
    for (int n = 0; n < 2; ++n) weights_memory[((i - kRegisterItems) * 2 + n) * 32] = w[n];
  }

  // ---- shared memory
  const auto dz_buffer = [&](int s) { return memory + plan.dz + (s & 1) * plan.tiles * 4 * kGatePlane; };
  const auto cells_of = [&](int s) {  // c before step s was done; of two steps, where c after it is needed too
    return memory + plan.cells + ((kKeepsCells ? s & 1 : 0) * plan.tiles + warp) * kPlane<float>;
  };
  const auto dc_at = [&](int k) {  // of the lane's k-th pair of cells: gradient of c
    return reinterpret_cast<float*>(memory + plan.dc) + ((warp * 4 + k) * 32 + lane) * 2;
  };
  const auto dy_plane = [&] { return memory + plan.dy + warp * kPlane<S>; };
  int round = 0;  // exchanges so far, the present one included

  for (int b0 = group() / int(p.D) * kRows; b0 < p.B; b0 += p.groups / int(p.D) * kRows) {
    const auto length_of = [&](int row) -> int {
      if (b0 + row >= p.B) return 0;
      return p.lengths ? int(p.lengths[b0 + row]) : T;
    };

    // Moves what step s needs towards shared memory: gates, the cell state before it, dy.
    const auto fetch = [&](int s) {
      const int64_t t = d == 0 ? T - 1 - s : s, before = d == 0 ? t - 1 : t + 1;
      char* const gates = dz_buffer(s) + warp * 4 * kGatePlane;
#pragma unroll 1
      for (int gate = 0; gate < 4; ++gate)
        for_pieces<S>(lane, [&](int row, int piece) {
          if (b0 + row >= p.B) return;
          const S* from = static_cast<const S*>(p.gates) + (t * rows_of_step + (b0 + row) * p.D + d) * 4 * H + gate * H;
          fetch_piece(gates + gate * kGatePlane + piece_at<S>(row, piece), from, unit0 + piece * kPerPiece<S>, H,
                      p.wide);
        });
      if (before >= 0 && before < T)
        for_pieces<float>(lane, [&](int row, int piece) {
          if (b0 + row >= p.B) return;
          const float* from = static_cast<const float*>(p.cells) + (before * rows_of_step + (b0 + row) * p.D + d) * H;
          fetch_piece(cells_of(s) + piece_at<float>(row, piece), from, unit0 + piece * 4, H, p.wide);
        });
      if (p.dy)
        for_pieces<S>(lane, [&](int row, int piece) {
          if (b0 + row >= p.B) return;
          const S* from = static_cast<const S*>(p.dy) + t * p.dy_stride_t + (b0 + row) * p.dy_stride_b + d * H;
          fetch_piece(dy_plane() + piece_at<S>(row, piece), from, unit0 + piece * kPerPiece<S>, H, p.wide);
        });
    };
    // The lane's element of a state (D, B, H): k is which of four pairs, u which of the pair. f(its place, k, u).
    const auto for_state = [&](auto f) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const int row = b0 + g + k % 2 * 8, unit = unit0 + k / 2 * 8 + t4 * 2 + u;
          if (row < p.B && unit < H) f((d * p.B + row) * H + unit, k, u);
        }
    };

    // ---- before the first step
    __syncthreads();  // the turn before is done with shared memory
    for (int i = threadIdx.x * kPiece; i < plan.bytes - plan.dz; i += blockDim.x * kPiece)
      *reinterpret_cast<uint4*>(memory + plan.dz + i) = {0, 0, 0, 0};
    __syncthreads();
    if (has_tile) {
      if (p.dc_n)
        for_state([&](int64_t at, int k, int u) { dc_at(k)[u] = convert(static_cast<const S*>(p.dc_n)[at], 0.f); });
      const int64_t t = d == 0 ? T - 1 : 0;
      for_pieces<float>(lane, [&](int row, int piece) {
        if (!kKeepsCells || b0 + row >= p.B) return;
        const float* from = static_cast<const float*>(p.cells) + (t * rows_of_step + (b0 + row) * p.D + d) * H;
        fetch_piece(cells_of(-1) + piece_at<float>(row, piece), from, unit0 + piece * 4, H, p.wide);
      });
      fetch(0);
    }
    if (plan.exchange == Exchange::cluster) cluster_arrive(), cluster_wait();

#pragma unroll 1
    for (int s = 0; s < T + (p.dh0 ? 1 : 0); ++s) {  // step T makes dh0 alone
      if (s > 0) ++round;
      const auto received = [&](int source, int tile) {
        return reinterpret_cast<float*>(memory + plan.received) +
               (((round & 1) * plan.ctas + source) * plan.tiles + tile) * (kRows * kUnits) + lane * 4;
      };
      const auto handed = [&](int pair, int source) {
        return p.handed +
               (((int64_t(group()) * 2 + (round & 1)) * plan.pairs + pair) * plan.ctas + source) * (kRows * kUnits) +
               lane * 4;
      };

      // ---- 1. products, 2. parts of sums to their owners
      float sums[2][4] = {};  // units 0-7 and 8-15 of a pair, as mma leaves them
      if (s > 0) {
        const char* const dz = dz_buffer(s - 1);
        const auto rows = [&](int chunk) {
          const char* at;
          if constexpr (sizeof(S) == 4)
            at = dz + chunk * kGatePlane + piece_at<S>(g, t4);
          else
            at = dz + (chunk * 2 + t4 / 2) * kGatePlane + piece_at<S>(g, t4 % 2);
          // row g + 8 is swizzled as row g
          return operand<S>(*reinterpret_cast<const uint4*>(at),
                            *reinterpret_cast<const uint4*>(at + 8 * kUnits * sizeof(S)));
        };
        int chunk = 0, pair = warp * plan.warp_pairs;
        const auto finish_item = [&] {
          if (++chunk < plan.chunks || plan.exchange == Exchange::cta) return;  // cta: the pair is the warp's own tile
          forget(lane);
          const int owner = pair / plan.tiles, tile = pair % plan.tiles;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const uint4 v = {__float_as_uint(sums[n][0]), __float_as_uint(sums[n][1]), __float_as_uint(sums[n][2]),
                             __float_as_uint(sums[n][3])};
            if (plan.exchange == Exchange::grid)
              store_global(handed(pair, rank()) + n * 128, v);
            else
              store_remote(received(rank(), tile) + n * 128, owner, v);
            sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
          }
          chunk = 0;
          ++pair;
        };
#pragma unroll
        for (int i = 0; i < kRegisterItems; ++i)
          if (i < items) {
            opaque(weights[i][0]);
            opaque(weights[i][1]);
            multiply<S>(sums, rows(chunk), weights[i], p.exact);
            finish_item();
          }
#pragma unroll 1
        for (int i = kRegisterItems; i < items; ++i) {
          const uint4 w[2] = {weights_memory[((i - kRegisterItems) * 2 + 0) * 32],
                              weights_memory[((i - kRegisterItems) * 2 + 1) * 32]};
          multiply<S>(sums, rows(chunk), w, p.exact);
          finish_item();
        }
        if (plan.exchange == Exchange::cluster)
          cluster_arrive(), cluster_wait();
        else if (plan.exchange == Exchange::grid)
          grid_barrier(p.arrivals + group() * (kCounter / sizeof(unsigned)), unsigned(round) * plan.ctas);
      }

      // ---- 3. cells
      if (has_tile) {
        forget(lane, g, t4, unit0);
        if (s > 0 && unit0 < H && plan.exchange != Exchange::cta)  // after its last pair every warp's sums are 0
#pragma unroll 1
          for (int source = 0; source < plan.ctas; ++source)
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              float4 part;
              if (plan.exchange == Exchange::grid)  // not from the L1 cache, which may hold what stood there before
                part = __ldcg(reinterpret_cast<const float4*>(handed(unit0 / kUnits, source) + n * 128));
              else
                part = *reinterpret_cast<const float4*>(received(source, warp) + n * 128);
              sums[n][0] += part.x, sums[n][1] += part.y, sums[n][2] += part.z, sums[n][3] += part.w;
            }
        if (s == T) {
          for_state([&](int64_t at, int k, int u) {
            float v = sums[k / 2][k % 2 * 2 + u];
            // a sequence without steps hands its gradient through
            if (p.dh_n && length_of(g + k % 2 * 8) == 0) v += convert(static_cast<const S*>(p.dh_n)[at], 0.f);
            static_cast<S*>(p.dh0)[at] = convert(v, S());
          });
          break;
        }
        const int t = d == 0 ? T - 1 - s : s;
        wait_for_copies();
        __syncwarp();
        char* const gates = dz_buffer(s) + warp * 4 * kGatePlane;
        const char* const dz_before = dz_buffer(s - 1) + warp * 4 * kGatePlane;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          forget(g, t4, unit0);
          const int half = k % 2, row = g + half * 8, unit = k / 2 * 8 + t4 * 2, length = length_of(row);
          char* const at = gates + pair_at<S>(row, unit);
          if (t >= length) {  // dz stays as it is: dh0 will be made of the sequence's own first step
            if (b0 + row < p.B)
#pragma unroll
              for (int gate = 0; gate < 4; ++gate)
                *reinterpret_cast<Pair<S>*>(at + gate * kGatePlane) =
                    *reinterpret_cast<const Pair<S>*>(dz_before + gate * kGatePlane + pair_at<S>(row, unit));
            continue;
          }
          const bool last = t == (d == 0 ? length - 1 : 0);   // the sequence's last step: dh_n arrives
          const bool begin = t == (d == 0 ? 0 : length - 1);  // its first: the cell came from c0
          const int64_t state = (d * p.B + b0 + row) * H + unit0 + unit;
          const float2 i = load_pair<S>(at), f = load_pair<S>(at + kGatePlane), o = load_pair<S>(at + 3 * kGatePlane),
                       z = load_pair<S>(at + 2 * kGatePlane);
          float2 c_before = load_pair<float>(cells_of(s) + pair_at<float>(row, unit));
          const float2 dy = load_pair<S>(dy_plane() + pair_at<S>(row, unit));
          float2 dh_t = {sums[k / 2][half * 2] + dy.x, sums[k / 2][half * 2 + 1] + dy.y};
          const auto state_pair = [&](const void* from) {
            const S* at = static_cast<const S*>(from) + state;
            return float2{unit0 + unit < H ? convert(at[0], 0.f) : 0.f,
                          unit0 + unit + 1 < H ? convert(at[1], 0.f) : 0.f};
          };
          if (last && p.dh_n) {
            const float2 more = state_pair(p.dh_n);
            dh_t.x += more.x, dh_t.y += more.y;
          }
          if (begin) c_before = p.c0 ? state_pair(p.c0) : float2{0, 0};
          const float2 c = kKeepsCells ? load_pair<float>(cells_of(s - 1) + pair_at<float>(row, unit))
                                       : float2{f.x * c_before.x + i.x * z.x, f.y * c_before.y + i.y * z.y};
          float2 dc = *reinterpret_cast<const float2*>(dc_at(k));
          const float values_x[] = {i.x, f.x, z.x, o.x}, values_y[] = {i.y, f.y, z.y, o.y};
          float x[4], y[4];
          Lstm::backward<Math<float>>(values_x, c.x, c_before.x, dh_t.x, dc.x, x);
          Lstm::backward<Math<float>>(values_y, c.y, c_before.y, dh_t.y, dc.y, y);
          *reinterpret_cast<float2*>(dc_at(k)) = dc;
          // padding stays 0, or an infinite sum would make NaN of it
          if (unit0 + unit >= H) x[0] = x[1] = x[2] = x[3] = 0;
          if (unit0 + unit + 1 >= H) y[0] = y[1] = y[2] = y[3] = 0;
          store_pair<S>(at, {factor<S>(x[0]), factor<S>(y[0])});
          store_pair<S>(at + kGatePlane, {factor<S>(x[1]), factor<S>(y[1])});
          store_pair<S>(at + 2 * kGatePlane, {factor<S>(x[2]), factor<S>(y[2])});
          store_pair<S>(at + 3 * kGatePlane, {factor<S>(x[3]), factor<S>(y[3])});
        }
        __syncwarp();
        forget(lane);
#pragma unroll 1
        for (int gate = 0; gate < 4; ++gate)
          for_pieces<S>(lane, [&](int row, int piece) {
            if (b0 + row >= p.B) return;
            const bool there = !p.lengths || t < p.lengths[b0 + row];
            S* const to = static_cast<S*>(p.d_gates_x) + (t * rows_of_step + (b0 + row) * p.D + d) * 4 * H + gate * H;
            store_piece(to, unit0 + piece * kPerPiece<S>, H, p.wide,
                        gates + gate * kGatePlane + piece_at<S>(row, piece), there);
          });
      }
      if (s == T) break;
#if !defined(BIRNN_WITHOUT_BARRIER)  // to see that a test would notice
      __syncthreads();
#endif
      // ---- 4. the next step's data, in the place of what has been used
      if (has_tile && s + 1 < T) fetch(s + 1);
    }

    if (has_tile && p.dc0)
      for_state([&](int64_t at, int k, int u) { static_cast<S*>(p.dc0)[at] = convert(dc_at(k)[u], S()); });
  }
#else
  __trap();  // not launched: persistent_resident() finds none
#endif
}

const void* kernel(DType dtype) {
  return dtype == DType::f16    ? reinterpret_cast<const void*>(backward_kernel<__half>)
         : dtype == DType::bf16 ? reinterpret_cast<const void*>(backward_kernel<__nv_bfloat16>)
                                : reinterpret_cast<const void*>(backward_kernel<float>);
}

}  // namespace

cudaError_t persistent_resident(DType dtype, const BackwardPlan& plan, int* count) {
  return resident(kernel(dtype), plan.exchange, plan.ctas, plan.warps * 32, plan.bytes, count);
}

cudaError_t persistent_backward(DType dtype, const PersistentBackward& p, cudaStream_t stream) {
  return launch(kernel(dtype), p.plan.exchange, p.plan.ctas, p.groups, p.plan.warps * 32, p.plan.bytes, &p, stream);
}

}  // namespace birnn::cuda
