// The CPU recurrence kernels, forward and backward, compiled once per ISA: a kernels_<isa>.cpp sets the compiler's
// target, defines BIRNN_ISA (namespace), BIRNN_ISA_BYTES (vector size) and BIRNN_ISA_ROWS (rows of a register tile) and
// includes this file.
//
// How the work is laid out. A chain (one direction of some sequences) goes through all its time steps without waiting
// for anybody. At each step it needs (rows x H) * (H x 4H). The product is cut into register tiles of kRows sequences x
// 4 vectors, whose accumulators stay in registers until the cell update has been done on them: pre-activations never
// visit memory. Going forward the 4 vectors are the 4 gates of the same units; going backward (rows x 4H) * (4H x H)
// they are 4 neighbouring vectors of units. Blocks of units are the outer loop, so that a panel of packed weights
// (H x 4 vectors) stays in the L1 cache while all rows use it.
//
// Each result is summed in the order of k whatever the tile, so results do not depend on how rows are cut into chains.

#include <cstdint>

#include "../core/lstm_cell.h"
#include "kernels.h"

#define INLINE inline __attribute__((always_inline))

namespace birnn::cpu::BIRNN_ISA {
namespace {

constexpr int kBytes = BIRNN_ISA_BYTES;
constexpr int kRows = BIRNN_ISA_ROWS;

#include "simd.h"

template <class S>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class S>
using Accumulate = typename AccumulateOf<S>::type;

// Sequences in which gradients vanish fill the backward pass with denormals, on which arithmetic is 10-100 times
// slower.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040); }  // FTZ, DAZ
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t(1) << 24)));  // FZ
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  FlushDenormals() {}
#endif
};

INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// acc[m][n] += sum over k < K of a[m][k] * panel[k][n]
template <int M, int N, class A>
INLINE void multiply(Vec<A> (&acc)[M][N], const A* const (&a)[M], const A* panel, int64_t K) {
  for (int64_t k = 0; k < K; ++k) {
    Vec<A> w[N];
    __builtin_memcpy(&w, __builtin_assume_aligned(panel + k * N * kLanes<A>, kBytes), sizeof(w));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] += a[m][k] * w[n];
    }
  }
}

// Calls f.template operator()<m>() for a run-time 1 <= m <= M.
template <int M, class F>
INLINE void with_rows(int64_t m, const F& f) {
  if (m >= M)
    f.template operator()<M>();
  else if constexpr (M > 1)
    with_rows<M - 1>(m, f);
}

// How many of a chain's sequences, longest first, have a step t.
INLINE int64_t active_rows(const Chain& chain, const int64_t* lengths, int64_t t, int64_t hint) {
  if (!lengths) return chain.count;
  while (hint > 0 && lengths[chain.rows[hint - 1]] <= t) --hint;
  while (hint < chain.count && lengths[chain.rows[hint]] > t) ++hint;
  return hint;
}

// --- forward
// ----------------------------------------------------------------------------------------------------------

// panels: [block][k: H][gate: 4][lane]
template <class S>
void pack_forward(const void* w_hh_, int64_t H, int64_t block, void* panels_) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  const S* w_hh = static_cast<const S*>(w_hh_);
  A* panel = static_cast<A*>(panels_) + block * H * 4 * L;
  const int64_t units = H - block * L < L ? H - block * L : L;
  for (int g = 0; g < 4; ++g) {
    const S* rows = w_hh + (g * H + block * L) * H;
    for (int64_t k = 0; k < H; ++k) {
      S lane[L] = {};
      for (int64_t l = 0; l < units; ++l) lane[l] = rows[l * H + k];
      const Vec<A> v = Storage<S>::template load<A>(lane);
      __builtin_memcpy(panel + (k * 4 + g) * L, &v, sizeof(v));
    }
  }
}

template <class S>
struct Forward {
  using A = Accumulate<S>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const ForwardParams& p;
  const Chain& chain;
  const A* panels;
  const int64_t d = chain.direction, H = p.H, B = p.B, D = p.D, padded = divide_up(p.H, L) * L;
  A* h[2];  // [row][padded] of the previous and of this step, alternating
  A* c;     // [row][padded]

  Forward(const ForwardParams& params, const Chain& ch, const A* packed, A* scratch)
      : p(params), chain(ch), panels(packed) {
    h[0] = scratch;
    h[1] = h[0] + chain.count * padded;
    c = h[1] + chain.count * padded;
  }

  // Asks for the gates_x of the tile after this one: its rows lie D * 4H values apart, where no hardware prefetcher
  // looks, and arrive during this tile's product.
  INLINE void prefetch_gates_x(int64_t t, int64_t first, int64_t block) {
    if (first >= chain.count) {
      first = 0;
      if (++block * L >= H) {
        block = 0;
        t += d == 0 ? 1 : -1;
        if (t < 0 || t >= p.T) return;
      }
    }
    const int64_t end = first + kRows < chain.count ? first + kRows : chain.count;
    for (int64_t r = first; r < end; ++r) {
      const S* gates_x = static_cast<const S*>(p.gates_x) + ((t * B + chain.rows[r]) * D + d) * 4 * H + block * L;
      for (int g = 0; g < 4; ++g) __builtin_prefetch(gates_x + g * H);
    }
  }

  // One step of M rows from `first` on, for the units of one block.
  template <int M>
  INLINE void tile(int64_t t, int64_t s, int64_t first, int64_t block, bool product) {
    const int64_t unit = block * L, n = H - unit;
    const A* h_prev = h[s & 1] + first * padded;
    A* h_next = h[(s + 1) & 1] + first * padded + unit;
    A* c_rows = c + first * padded + unit;

    V acc[M][4];
    int64_t row[M];  // index of (t, b, d), in units of a row of y
    for (int m = 0; m < M; ++m) {
      row[m] = (t * B + chain.rows[first + m]) * D + d;
      const S* gates_x = static_cast<const S*>(p.gates_x) + row[m] * 4 * H + unit;
      for (int g = 0; g < 4; ++g) acc[m][g] = load<A>(gates_x + g * H, n);
    }
    prefetch_gates_x(t, first + M, block);
    if (product) {
      const A* a[M];
      for (int m = 0; m < M; ++m) a[m] = h_prev + m * padded;
      multiply(acc, a, panels + block * H * 4 * L, H);
    }
    for (int m = 0; m < M; ++m) {
      Gates<V> gates{acc[m][0], acc[m][1], acc[m][2], acc[m][3]};
      V c_row;
      __builtin_memcpy(&c_row, c_rows + m * padded, sizeof(V));
      const V h_row = lstm_cell_forward<Math<A>>(gates, c_row);
      __builtin_memcpy(c_rows + m * padded, &c_row, sizeof(V));
      __builtin_memcpy(h_next + m * padded, &h_row, sizeof(V));
      store<A>(static_cast<S*>(p.y) + row[m] * H + unit, h_row, n);
      if (p.gates) {
        S* saved = static_cast<S*>(p.gates) + row[m] * 4 * H + unit;
        store<A>(saved, gates.i, n);
        store<A>(saved + H, gates.f, n);
        store<A>(saved + 2 * H, gates.g, n);
        store<A>(saved + 3 * H, gates.o, n);
        store<A>(static_cast<A*>(p.cells) + row[m] * H + unit, c_row, n);
      }
    }
  }

  // The initial state, in both buffers of h: a sequence of the reverse direction starts at any step.
  void start() {
    const S* h0 = static_cast<const S*>(p.h0);
    const S* c0 = static_cast<const S*>(p.c0);
    for (int64_t r = 0; r < chain.count; ++r) {
      const int64_t state = (d * B + chain.rows[r]) * H;
      for (int64_t unit = 0; unit < padded; unit += L) {
        const V h_row = h0 ? load<A>(h0 + state + unit, H - unit) : V{};
        const V c_row = c0 ? load<A>(c0 + state + unit, H - unit) : V{};
        __builtin_memcpy(h[0] + r * padded + unit, &h_row, sizeof(V));
        __builtin_memcpy(h[1] + r * padded + unit, &h_row, sizeof(V));
        __builtin_memcpy(c + r * padded + unit, &c_row, sizeof(V));
      }
    }
  }

  // The final state. Row r took its last step at iteration `last`, and wrote h into the other buffer.
  void finish() {
    for (int64_t r = 0; r < chain.count; ++r) {
      const int64_t b = chain.rows[r], length = p.lengths ? p.lengths[b] : p.T;
      const int64_t last = d == 0 ? length - 1 : p.T - 1;
      for (int64_t unit = 0; unit < H; unit += L) {
        V h_row, c_row;
        __builtin_memcpy(&h_row, h[(last + 1) & 1] + r * padded + unit, sizeof(V));
        __builtin_memcpy(&c_row, c + r * padded + unit, sizeof(V));
        store<A>(static_cast<S*>(p.h_n) + (d * B + b) * H + unit, h_row, H - unit);
        store<A>(static_cast<S*>(p.c_n) + (d * B + b) * H + unit, c_row, H - unit);
      }
      for (int64_t t = length; t < p.T; ++t) {
        const int64_t row = (t * B + b) * D + d;
        __builtin_memset(static_cast<S*>(p.y) + row * H, 0, H * sizeof(S));
        if (p.gates) {
          __builtin_memset(static_cast<S*>(p.gates) + row * 4 * H, 0, 4 * H * sizeof(S));
          __builtin_memset(static_cast<A*>(p.cells) + row * H, 0, H * sizeof(A));
        }
      }
    }
  }

  void run() {
    start();
    int64_t rows = 0;
    for (int64_t s = 0; s < p.T; ++s) {
      const int64_t t = d == 0 ? s : p.T - 1 - s;
      rows = active_rows(chain, p.lengths, t, rows);
      const bool product = s > 0 || p.h0;
      for (int64_t block = 0; block * L < H; ++block)
        for (int64_t first = 0; first < rows; first += kRows)
          with_rows<kRows>(rows - first, [&]<int M>() { tile<M>(t, s, first, block, product); });
    }
    finish();
  }
};

// --- backward
// ---------------------------------------------------------------------------------------------------------

// Vectors of units in the tile that begins at vector `v` of `count`: 4, and at the end 2 or 1.
INLINE int64_t tile_vectors(int64_t v, int64_t count) { return count - v >= 4 ? 4 : count - v >= 2 ? 2 : 1; }

// panels: [tile][k: 4H][vector of the tile][lane]; packs the vector `block`.
template <class S>
void pack_backward(const void* w_hh_, int64_t H, int64_t block, void* panels_) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  int64_t v = 0, N = tile_vectors(0, divide_up(H, L));
  for (; v + N <= block; N = tile_vectors(v, divide_up(H, L))) v += N;
  A* panel = static_cast<A*>(panels_) + (v * 4 * H + (block - v)) * L;
  const S* w_hh = static_cast<const S*>(w_hh_) + block * L;
  for (int64_t k = 0; k < 4 * H; ++k) {
    const Vec<A> w = load<A>(w_hh + k * H, H - block * L);
    __builtin_memcpy(panel + k * N * L, &w, sizeof(w));
  }
}

template <class S>
struct Backward {
  using A = Accumulate<S>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const BackwardParams& p;
  const Chain& chain;
  const A* panels;
  const int64_t d = chain.direction, H = p.H, B = p.B, D = p.D, padded = divide_up(p.H, L) * L;
  A* dz[2];  // [row][gate][padded] of the previous and of this step, alternating
  A* dc;     // [row][padded]

  Backward(const BackwardParams& params, const Chain& ch, const A* packed, A* scratch)
      : p(params), chain(ch), panels(packed) {
    dz[0] = scratch;
    dz[1] = dz[0] + chain.count * 4 * padded;
    dc = dz[1] + chain.count * 4 * padded;
  }

  int64_t length(int64_t b) const { return p.lengths ? p.lengths[b] : p.T; }

  // acc[m] = W_hh^T dz of M rows, for N vectors of units from vector v on; dz_rows: each row's 4 gates.
  template <int M, int N>
  INLINE void product(V (&acc)[M][N], const A* const (&dz_rows)[M], int64_t v) {
    for (int g = 0; g < 4; ++g) {
      const A* a[M];
      for (int m = 0; m < M; ++m) a[m] = dz_rows[m] + g * padded;
      multiply(acc, a, panels + (v * 4 + g * N) * H * L, H);
    }
  }

  template <int M, int N>
  INLINE void tile(int64_t t, int64_t s, int64_t first, int64_t v) {
    V acc[M][N] = {};
    if (s > 0) {
      const A* dz_rows[M];
      for (int m = 0; m < M; ++m) dz_rows[m] = dz[(s + 1) & 1] + (first + m) * 4 * padded;
      product(acc, dz_rows, v);
    }
    const S* dy = static_cast<const S*>(p.dy);
    const S* dh_n = static_cast<const S*>(p.dh_n);
    for (int m = 0; m < M; ++m) {
      const int64_t b = chain.rows[first + m], row = (t * B + b) * D + d;
      const bool last = t == (d == 0 ? length(b) - 1 : 0);   // the sequence's last step: dh_n arrives
      const bool begin = t == (d == 0 ? 0 : length(b) - 1);  // its first: the cell came from c0
      const int64_t prev = d == 0 ? row - B * D : row + B * D;
      for (int n = 0; n < N; ++n) {
        const int64_t unit = (v + n) * L, left = H - unit;
        V dh = acc[m][n];
        if (dy) dh += load<A>(dy + row * H + unit, left);
        if (dh_n && last) dh += load<A>(dh_n + (d * B + b) * H + unit, left);
        V c_prev = {};
        if (!begin)
          c_prev = load<A>(static_cast<const A*>(p.cells) + prev * H + unit, left);
        else if (p.c0)
          c_prev = load<A>(static_cast<const S*>(p.c0) + (d * B + b) * H + unit, left);
        const S* saved = static_cast<const S*>(p.gates) + row * 4 * H + unit;
        const Gates<V> gates{load<A>(saved, left), load<A>(saved + H, left), load<A>(saved + 2 * H, left),
                             load<A>(saved + 3 * H, left)};
        A* dc_row = dc + (first + m) * padded + unit;
        V dc_value;
        __builtin_memcpy(&dc_value, dc_row, sizeof(V));
        const V c = load<A>(static_cast<const A*>(p.cells) + row * H + unit, left);
        const Gates<V> dgates = lstm_cell_backward<Math<A>>(gates, c, c_prev, dh, dc_value);
        __builtin_memcpy(dc_row, &dc_value, sizeof(V));
        const V all[4] = {dgates.i, dgates.f, dgates.g, dgates.o};
        A* dz_row = dz[s & 1] + (first + m) * 4 * padded + unit;
        S* d_gates_x = static_cast<S*>(p.d_gates_x) + row * 4 * H + unit;
        for (int g = 0; g < 4; ++g) {
          __builtin_memcpy(dz_row + g * padded, &all[g], sizeof(V));
          store<A>(d_gates_x + g * H, all[g], left);
        }
      }
    }
  }

  // dh0 = W_hh^T dz of each row's first step (which the row left in one of the two buffers).
  template <int M, int N>
  INLINE void initial_tile(int64_t first, int64_t v) {
    const A* dz_rows[M];
    for (int m = 0; m < M; ++m) {
      const int64_t s = d == 0 ? p.T - 1 : length(chain.rows[first + m]) - 1;  // the iteration of its first step
      dz_rows[m] = dz[s & 1] + (first + m) * 4 * padded;
    }
    V acc[M][N] = {};
    product(acc, dz_rows, v);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n)
        store<A>(static_cast<S*>(p.dh0) + (d * B + chain.rows[first + m]) * H + (v + n) * L, acc[m][n],
                 H - (v + n) * L);
  }

  // Calls f.template operator()<M, N>(first, v) for all tiles of the first `rows` rows.
  template <class F>
  INLINE void for_each_tile(int64_t rows, const F& f) {
    const int64_t vectors = padded / L;
    for (int64_t v = 0, N; v < vectors; v += N) {
      N = tile_vectors(v, vectors);
      for (int64_t first = 0; first < rows; first += kRows)
        with_rows<kRows>(rows - first, [&]<int M>() {
          if (N == 4)
            f.template operator()<M, 4>(first, v);
          else if (N == 2)
            f.template operator()<M, 2>(first, v);
          else
            f.template operator()<M, 1>(first, v);
        });
    }
  }

  void start() {
    __builtin_memset(dz[0], 0, 2 * chain.count * 4 * padded * sizeof(A));  // rows that begin later have had no dz yet
    const S* dc_n = static_cast<const S*>(p.dc_n);
    for (int64_t r = 0; r < chain.count; ++r)
      for (int64_t unit = 0; unit < padded; unit += L) {
        const V value = dc_n && unit < H ? load<A>(dc_n + (d * B + chain.rows[r]) * H + unit, H - unit) : V{};
        __builtin_memcpy(dc + r * padded + unit, &value, sizeof(V));
      }
  }

  void finish() {
    for (int64_t r = 0; r < chain.count; ++r) {
      const int64_t b = chain.rows[r];
      for (int64_t t = length(b); t < p.T; ++t)
        __builtin_memset(static_cast<S*>(p.d_gates_x) + ((t * B + b) * D + d) * 4 * H, 0, 4 * H * sizeof(S));
    }
    if (!p.dh0) return;
    const int64_t begun = active_rows(chain, p.lengths, 0, 0);
    for_each_tile(begun, [&]<int M, int N>(int64_t first, int64_t v) { initial_tile<M, N>(first, v); });
    for (int64_t r = begun; r < chain.count; ++r) {  // a sequence without steps hands its gradient through
      const int64_t state = (d * B + chain.rows[r]) * H;
      if (p.dh_n)
        __builtin_memcpy(static_cast<S*>(p.dh0) + state, static_cast<const S*>(p.dh_n) + state, H * sizeof(S));
      else
        __builtin_memset(static_cast<S*>(p.dh0) + state, 0, H * sizeof(S));
    }
    for (int64_t r = 0; r < chain.count; ++r)
      for (int64_t unit = 0; unit < H; unit += L) {
        V value;
        __builtin_memcpy(&value, dc + r * padded + unit, sizeof(V));
        store<A>(static_cast<S*>(p.dc0) + (d * B + chain.rows[r]) * H + unit, value, H - unit);
      }
  }

  void run() {
    start();
    int64_t rows = 0;
    for (int64_t s = 0; s < p.T; ++s) {
      const int64_t t = d == 0 ? p.T - 1 - s : s;
      rows = active_rows(chain, p.lengths, t, rows);
      for_each_tile(rows, [&]<int M, int N>(int64_t first, int64_t v) { tile<M, N>(t, s, first, v); });
    }
    finish();
  }
};

// --- the table
// --------------------------------------------------------------------------------------------------------

template <class F>
void with_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64:
      return f(double());
    case DType::f32:
      return f(float());
    case DType::f16:
      return f(_Float16());
    case DType::bf16:
      return f(bfloat16());
  }
}

void math_sigmoid(const float* x, float* y, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes<float>)
    store<float>(y + k, Math<float>::sigmoid(load<float>(x + k, n - k)), n - k);
}

void math_tanh(const float* x, float* y, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes<float>)
    store<float>(y + k, Math<float>::tanh(load<float>(x + k, n - k)), n - k);
}

int64_t lanes(DType dtype) { return dtype == DType::f64 ? kLanes<double> : kLanes<float>; }

int64_t accumulate_bytes(DType dtype) { return dtype == DType::f64 ? sizeof(double) : sizeof(float); }

void pack_forward(DType dtype, const void* w_hh, int64_t H, int64_t block, void* panels) {
  with_storage(dtype, [&]<class S>(S) { pack_forward<S>(w_hh, H, block, panels); });
}

void pack_backward(DType dtype, const void* w_hh, int64_t H, int64_t block, void* panels) {
  with_storage(dtype, [&]<class S>(S) { pack_backward<S>(w_hh, H, block, panels); });
}

void forward(DType dtype, const ForwardParams& p, const Chain& chain, const void* panels, void* scratch) {
  FlushDenormals flush;
  with_storage(dtype, [&]<class S>(S) {
    using A = Accumulate<S>;
    Forward<S>(p, chain, static_cast<const A*>(panels), static_cast<A*>(scratch)).run();
  });
}

void backward(DType dtype, const BackwardParams& p, const Chain& chain, const void* panels, void* scratch) {
  FlushDenormals flush;
  with_storage(dtype, [&]<class S>(S) {
    using A = Accumulate<S>;
    Backward<S>(p, chain, static_cast<const A*>(panels), static_cast<A*>(scratch)).run();
  });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    BIRNN_ISA_NAME, lanes, accumulate_bytes, pack_forward, pack_backward, forward, backward, math_sigmoid, math_tanh,
};

}  // namespace birnn::cpu::BIRNN_ISA
