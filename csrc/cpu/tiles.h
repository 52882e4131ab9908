// Register tiles and the panels of packed weights that feed them. recurrence_kernel.h includes this file, once per ISA.

INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

// --- the factors of a product ----------------------------------------------------------------------------------------

// bfloat16 is multiplied as such if the ISA can do it, in pairs of neighbouring k; all other types are multiplied in
// the accumulation type. K is padded with zeros to a multiple of kStep. With AMX a register tile always has 16 rows.
//
// float32 with products of 16 bits (PyTorch's precision "high") is a sum of two bfloat16, high and low, in two planes.
// A product is high * high + low * high + high * low.
template <class S>
constexpr bool kSplit = std::is_same_v<S, split_float>;
template <class S>
constexpr bool kPairs = BIRNN_ISA_BF16 && (std::is_same_v<S, bfloat16> || kSplit<S>);
template <class S>
constexpr bool kAmx = BIRNN_ISA_AMX && kPairs<S>;
template <class S>
constexpr int kStep = kAmx<S>     ? 32
                      : kPairs<S> ? 2
                                  : 1;
template <class S>
constexpr int kPlanes = kSplit<S> ? 2 : 1;
// Rows of x and y of these types become factors before they are multiplied.
template <class S>
constexpr bool kConverted = !std::is_same_v<S, Accumulate<S>>;
template <class S>
constexpr int kEven = kStep<S> > 2 ? kStep<S> : 2;  // panels are packed two k at a time
template <class S>
constexpr int kTileRows = kAmx<S> ? 16 : kRows;

template <class S>
using Factor = std::conditional_t<kPairs<S>, bfloat16, Accumulate<S>>;

INLINE int64_t round_up(int64_t n, int64_t multiple) { return divide_up(n, multiple) * multiple; }

template <class A>
INLINE Vec<A> load_vector(const A* p) {  // aligned to the vector's size
  Vec<A> v;
  __builtin_memcpy(&v, __builtin_assume_aligned(p, kBytes), sizeof(v));
  return v;
}

template <class A>
INLINE void store_vector(A* p, Vec<A> v) {
  __builtin_memcpy(__builtin_assume_aligned(p, kBytes), &v, sizeof(v));
}

// Stores a whole vector of A, as A or in a narrower type.
template <class A, class T>
INLINE Vec<A> load_aligned(const T* p) {
  if constexpr (std::is_same_v<A, T>)
    return load_vector(p);
  else
    return Storage<T>::template load<A>(p);
}

template <class A, class T>
INLINE void store_aligned(T* p, Vec<A> v) {
  if constexpr (std::is_same_v<A, T>)
    store_vector(p, v);
  else
    Storage<T>::template store<A>(p, v);
}

// Returns v - high, or 0 if that is NaN, as with an infinite high.
template <class A>
INLINE Vec<A> rest(Vec<A> v, Vec<A> high) {
  const Vec<A> low = v - high;
  return low == low ? low : Vec<A>{};
}

// Stores a vector to a row of factors, whose planes are `plane` values apart.
template <class S>
INLINE void store_row(Factor<S>* p, int64_t plane, Vec<Accumulate<S>> v) {
  using A = Accumulate<S>;
  store_aligned<A>(p, v);
  if constexpr (kSplit<S>) store_aligned<A>(p + plane, rest<A>(v, load_aligned<A>(p)));
}

// Counts the vectors of a slot's dz (see Slots).
INLINE int64_t slot_vectors(int64_t values, int64_t blocks) { return round_up(values * blocks, kTileVectors); }

// Returns where the backward pass leaves a vector of a slot's dz (see Slots), which has so many vectors.
template <class S>
INLINE int64_t dz_offset(int64_t vectors, int64_t capacity, int64_t vector, int64_t slot) {
  constexpr int L = kLanes<Accumulate<S>>;
  if constexpr (kPairs<S>) return (slot * kPlanes<S> * vectors + vector) * L;
  return ((vector / kTileVectors * capacity + slot) * kTileVectors + vector % kTileVectors) * L;
}

// Tells whether n values are all 0, n a multiple of the vector's lanes. Gradients that vanish over long sequences
// become 0, as denormals are flushed, and then their product can be skipped. The test ends at the first vector that is
// not 0.
template <class T>
INLINE bool all_zero(const T* p, int64_t n) {
  constexpr int64_t kWords = kBytes / 8, kValues = kBytes / sizeof(T);
  constexpr uint64_t kSigns = sizeof(T) == 2 ? 0x8000800080008000u : sizeof(T) == 4 ? 0x8000000080000000u : 1ull << 63;
  for (int64_t k = 0; k < n; k += kValues) {
    uint64_t words[kWords], any = 0;
    __builtin_memcpy(&words, p + k, sizeof(words));
    for (uint64_t word : words) any |= word & ~kSigns;
    if (any) return false;
  }
  return true;
}

// acc[m][n] += sum over k < K of a(m, k) * panel[k][n], in the order of k.
template <int M, int N, class A, class Element>
INLINE void multiply_with(Vec<A> (&acc)[M][N], const Element& a, const A* panel, int64_t K) {
  for (int64_t k = 0; k < K; ++k) {
    Vec<A> w[N];
    __builtin_memcpy(&w, __builtin_assume_aligned(panel + k * N * kLanes<A>, kBytes), sizeof(w));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const A value = a(m, k);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] += value * w[n];
    }
  }
}

#if BIRNN_ISA_BF16
// acc[m][n] += sum of a[m][k] * panel[k / 2][n][lane][k % 2], in pairs of bfloat16, in the order of k.
template <int M, int N>
INLINE void multiply_pairs(Vec<float> (&acc)[M][N], const bfloat16* const (&a)[M], const bfloat16* panel, int64_t K) {
  for (int64_t k = 0; k < K; k += 2) {
    __m512bh w[N];
    __builtin_memcpy(&w, __builtin_assume_aligned(panel + k * N * 16, kBytes), sizeof(w));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      int pair;
      __builtin_memcpy(&pair, a[m] + k, sizeof(pair));
      const auto value = (__m512bh)(VectorOf<int, 16>::type{} + pair);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = (Vec<float>)_mm512_dpbf16_ps((__m512)acc[m][n], value, w[n]);
    }
  }
}
#endif

#if BIRNN_ISA_AMX
#include "amx.h"
#else
struct TileRegisters {};
#endif

// acc[m][n] += sum over k < K of a[m][k] * panel[k][n], K a multiple of kStep. For AMX the a[m] are equally far apart.
// The planes of a split a[m] are `plane` values apart.
template <class S, int M, int N>
INLINE void multiply(Vec<Accumulate<S>> (&acc)[M][N], const Factor<S>* const (&a)[M], const Factor<S>* panel, int64_t K,
                     [[maybe_unused]] int64_t plane) {
#if BIRNN_ISA_AMX
  if constexpr (kAmx<S>) {
    TileSums<N> sums;
    sums.multiply(a[0], a[1] - a[0], panel, K);
    if constexpr (kSplit<S>) {
      sums.multiply(a[0] + plane, a[1] - a[0], panel, K);
      sums.multiply(a[0], a[1] - a[0], panel + K * N * 16, K);
    }
    return sums.add_to(acc);
  }
#endif
#if BIRNN_ISA_BF16
  if constexpr (kPairs<S> && !kAmx<S>) return multiply_pairs(acc, a, panel, K);
#endif
  if constexpr (!kPairs<S>)
    multiply_with<M, N, Accumulate<S>>(acc, [&](int m, int64_t k) INLINE_LAMBDA { return a[m][k]; }, panel, K);
}

template <int M, class F>
INLINE void with_at_most(int64_t m, const F& f) {
  if (m >= M)
    f.template operator()<M>(M);
  else if constexpr (M > 1)
    with_at_most<M - 1>(m, f);
}

// Calls f.template operator()<M>(count) for the next tile of `left` rows: it multiplies M rows, and count are wanted.
template <class S, class F>
INLINE void with_rows(int64_t left, const F& f) {
  if constexpr (kAmx<S>)
    f.template operator()<16>(static_cast<int>(minimum(left, 16)));
  else
    with_at_most<kRows>(left, f);
}

// Copies a tile's sums between memory and registers.
template <class V, int M, int N>
INLINE void copy(V (&to)[M][N], const V (&from)[M][N]) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) to[m][n] = from[m][n];
  }
}

// The type that stands for all types whose products are the same.
template <class S>
using Multiplied = std::conditional_t<kPairs<S>, S, Accumulate<S>>;

// Adds the product as above to sums [row][N vectors], for so many rows, at most kTileRows. It is a function of its own
// because only then GCC 12 keeps all sums in registers, and because all types and cells share it.
template <class S, int N>
__attribute__((noinline)) void multiply_rows(Vec<Accumulate<S>>* sums, int64_t rows, const Factor<S>* const* a_,
                                             const Factor<S>* panel, int64_t K, int64_t plane) {
  with_rows<S>(rows, [&]<int M>(int) INLINE_LAMBDA {
    const Factor<S>* a[M];
    for (int m = 0; m < M; ++m) a[m] = a_[m];
    auto& to = reinterpret_cast<Vec<Accumulate<S>>(&)[M][N]>(*sums);
    if constexpr (kAmx<S>) return multiply<S>(to, a, panel, K, plane);  // its sums are in tile registers
    Vec<Accumulate<S>> acc[M][N];
    copy(acc, to);
    multiply<S>(acc, a, panel, K, plane);
    copy(to, acc);
  });
}

// Returns the width of the tile that begins at vector v of `count`: kTileVectors, or 2 or 1 at the end.
static_assert(kTileVectors == 4);
INLINE int64_t tile_vectors(int64_t v, int64_t count) { return count - v >= 4 ? 4 : count - v >= 2 ? 2 : 1; }

// Calls f.template operator()<N>() for a tile of 4, 2 or 1 vectors.
template <class F>
INLINE void with_vectors(int64_t n, const F& f) {
  if (n == 4)
    f.template operator()<4>();
  else if (n == 2)
    f.template operator()<2>();
  else
    f.template operator()<1>();
}

// One stage of a transposition. It exchanges the s x s squares off the diagonal of each 2s x 2s square.
template <int s, class V, size_t... k>
INLINE void exchange(V& a, V& b, std::index_sequence<k...>) {
  constexpr int L = sizeof...(k);
  const V upper = __builtin_shufflevector(a, b, (k & s ? L + k - s : k)...);
  b = __builtin_shufflevector(a, b, (k & s ? L + k : k + s)...);
  a = upper;
}

template <class A, int s = 1>
INLINE void transpose(Vec<A> (&v)[kLanes<A>]) {
  if constexpr (s < kLanes<A>) {
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<A>; ++k)
      if (!(k & s)) exchange<s>(v[k], v[k + s], std::make_index_sequence<kLanes<A>>());
    transpose<A, 2 * s>(v);
  }
}

// Stores values k and k + 1 of a panel of K, N vectors wide, as factors: one after the other, or side by side.
template <class S>
INLINE void store_factors(Factor<S>* panel, int64_t K, int64_t k, int64_t N, int64_t n, Vec<Accumulate<S>> even,
                          Vec<Accumulate<S>> odd) {
  using V = Vec<Accumulate<S>>;
  constexpr int L = kLanes<Accumulate<S>>;
  if constexpr (kPairs<S>) {
    using U = typename VectorOf<uint32_t, L>::type;
    const auto rounded = [](V v) INLINE_LAMBDA { return bit_cast<U>(v) + 0x7fffu + ((bit_cast<U>(v) >> 16) & 1u); };
    for (int plane = 0; plane < kPlanes<S>; ++plane) {
      const U high_even = rounded(even) & 0xffff0000u, high_odd = rounded(odd) & 0xffff0000u;
      const U pair = (high_even >> 16) | high_odd;
      __builtin_memcpy(panel + (plane * K * N + k * N + 2 * n) * L, &pair, sizeof(pair));
      even = rest<Accumulate<S>>(even, bit_cast<V>(high_even));
      odd = rest<Accumulate<S>>(odd, bit_cast<V>(high_odd));
    }
  } else {
    store_vector(panel + (k * N + n) * L, even);
    store_vector(panel + ((k + 1) * N + n) * L, odd);
  }
}

// Packs one block of w (gates * H, K) into panels [block][k: K][gate][lane], with pairs
// [block][k / 2][gate][lane][k % 2]. K is rounded up to packed_rows.
template <class S>
constexpr int64_t packed_rows(int64_t K) {
  return (K + kEven<S> - 1) / kEven<S> * kEven<S>;
}

template <class S>
void pack(const void* w_, int64_t gates, int64_t H, int64_t K, int64_t block, void* panels) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  const S* w = static_cast<const S*>(w_);
  const int64_t rows = packed_rows<S>(K), vectors = gates * unit_vectors(gates);
  Factor<S>* panel = static_cast<Factor<S>*>(panels) + block * rows * vectors * L * kPlanes<S>;
  for (int64_t n = 0; n < vectors; ++n)
    for (int64_t k = 0; k < rows; k += L) {
      const int64_t g = n % gates, unit = (block * unit_vectors(gates) + n / gates) * L;
      Vec<A> v[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l)
        v[l] = unit + l < H && k < K ? load<A>(w + (g * H + unit + l) * K + k, K - k) : Vec<A>{};
      transpose<A>(v);
      const int64_t columns = minimum(L, rows - k);
      for (int64_t j = 0; j < columns; j += 2) store_factors<S>(panel, rows, k + j, vectors, n, v[j], v[j + 1]);
    }
}

// Packs one vector of columns of w (gates * H, columns) into panels
// [tile of columns][k: gate, block, lane][vector of the tile][lane], with pairs as above. There are transposed_rows k.
template <class S>
constexpr int64_t transposed_rows(int64_t gates, int64_t H) {
  constexpr int L = kLanes<Accumulate<S>>;
  return packed_rows<S>(gates * ((H + L - 1) / L * L));
}

template <class S>
bool pack_transposed(const void* w_, int64_t gates, int64_t H, int64_t columns, int64_t vector, void* panels) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  const int64_t vectors = divide_up(columns, L), padded = round_up(H, L), rows = transposed_rows<S>(gates, H);
  int64_t tile = 0, N = tile_vectors(0, vectors);
  for (; tile + N <= vector; N = tile_vectors(tile, vectors)) tile += N;
  Factor<S>* panel = static_cast<Factor<S>*>(panels) + tile * rows * L * kPlanes<S>;
  const S* w = static_cast<const S*>(w_) + vector * L;
  Vec<A> zeros = {};  // sums 0 * w, which is NaN if some w is not finite
  const auto row = [&](int64_t g, int64_t unit) INLINE_LAMBDA {
    const Vec<A> values = unit < H ? load<A>(w + (g * H + unit) * columns, columns - vector * L) : Vec<A>{};
    zeros += values * 0;
    return values;
  };
  for (int64_t g = 0; g < gates; ++g)
    for (int64_t unit = 0; unit < padded; unit += 2)
      store_factors<S>(panel, rows, g * padded + unit, N, vector - tile, row(g, unit), row(g, unit + 1));
  for (int64_t k = gates * padded; k < rows; k += 2)
    store_factors<S>(panel, rows, k, N, vector - tile, Vec<A>{}, Vec<A>{});
  return all_zero(reinterpret_cast<const A*>(&zeros), L);
}
