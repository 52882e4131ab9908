// Register tiles and the panels of packed weights that feed them. Included once per ISA (recurrence_kernel.h).

INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

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

// Whether n values are all 0, n a multiple of the vector's lanes. Gradients that vanish over long sequences become 0, as
// denormals are flushed; a product with them need not be computed. Where they have not vanished, this ends at once.
template <class A>
INLINE bool all_zero(const A* p, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes<A>) {
    const auto nonzero = load_vector(p + k) != 0;
    uint64_t words[kBytes / 8], any = 0;
    __builtin_memcpy(&words, &nonzero, sizeof(words));
    for (uint64_t word : words) any |= word;
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

// The same where a[m] points to row m.
template <int M, int N, class A>
INLINE void multiply(Vec<A> (&acc)[M][N], const A* const (&a)[M], const A* panel, int64_t K) {
  multiply_with<M, N, A>(acc, [&](int m, int64_t k) { return a[m][k]; }, panel, K);
}

// Calls f.template operator()<m>() for a run-time 1 <= m <= M.
template <int M, class F>
INLINE void with_rows(int64_t m, const F& f) {
  if (m >= M)
    f.template operator()<M>();
  else if constexpr (M > 1)
    with_rows<M - 1>(m, f);
}

// Vectors of columns in the tile that begins at vector v of `count`: 4, and at the end 2 or 1.
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

// One stage of a transposition: exchanges the s x s squares off the diagonal of each 2s x 2s square.
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

// w (4H, K) -> panels [block][k: K][gate][lane], of one block.
template <class S>
void pack(const void* w_, int64_t H, int64_t K, int64_t block, void* panels) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  const S* w = static_cast<const S*>(w_);
  A* panel = static_cast<A*>(panels) + block * K * 4 * L;
  for (int g = 0; g < 4; ++g)
    for (int64_t k = 0; k < K; k += L) {
      Vec<A> v[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l)
        v[l] = block * L + l < H ? load<A>(w + (g * H + block * L + l) * K + k, K - k) : Vec<A>{};
      transpose<A>(v);
      const int64_t columns = minimum(L, K - k);
      for (int64_t j = 0; j < columns; ++j) store_vector(panel + ((k + j) * 4 + g) * L, v[j]);
    }
}

// w (4H, columns) -> panels [tile of columns][k: gate, block, lane][vector of the tile][lane], of one vector of columns.
template <class S>
void pack_transposed(const void* w_, int64_t H, int64_t columns, int64_t vector, void* panels) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  const int64_t vectors = divide_up(columns, L), padded = divide_up(H, L) * L;
  int64_t tile = 0, N = tile_vectors(0, vectors);
  for (; tile + N <= vector; N = tile_vectors(tile, vectors)) tile += N;
  A* to = static_cast<A*>(panels) + (tile * 4 * padded + (vector - tile)) * L;
  const S* w = static_cast<const S*>(w_) + vector * L;
  for (int64_t g = 0; g < 4; ++g)
    for (int64_t unit = 0; unit < padded; ++unit)
      store_vector(to + (g * padded + unit) * N * L,
                   unit < H ? load<A>(w + (g * H + unit) * columns, columns - vector * L) : Vec<A>{});
}
