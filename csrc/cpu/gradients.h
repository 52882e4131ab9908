// A layer's gradients that are products over all steps. The recurrence has written dz as factors; dz_offset says where.
// recurrence_kernel.h includes this file, once per ISA.

// Adds W_ih^T dz of some slots from `slot` on to sums [row][N vectors], where a slot has so many vectors of dz, and the
// first K values are those of the input parts. All types share this function.
template <class S, int N>
__attribute__((noinline)) void multiply_slots(Vec<Accumulate<S>>* sums, int64_t rows, const Factor<S>* dz,
                                              int64_t vectors, int64_t capacity, int64_t slot, const Factor<S>* panel,
                                              int64_t K, bool finite) {
  constexpr int L = kLanes<Accumulate<S>>;
  const int64_t width = kPairs<S> ? K : kTileVectors * L;  // of a panel of dz
  const int64_t row = kPairs<S> ? kPlanes<S> * vectors * L : width;
  with_rows<S>(rows, [&]<int M>(int) INLINE_LAMBDA {
    auto& to = reinterpret_cast<Vec<Accumulate<S>>(&)[M][N]>(*sums);
    Vec<Accumulate<S>> acc[M][N];
    copy(acc, to);
    for (int64_t first = 0; first < K; first += width) {
      const Factor<S>* a[M];
      for (int m = 0; m < M; ++m) a[m] = dz + dz_offset<S>(vectors, capacity, first / L, slot + m);
      if (finite && all_zero(a[0], M * row)) continue;
      multiply<S>(acc, a, panel + first * N * L, minimum(width, K - first), vectors * L);
    }
    copy(to, acc);
  });
}

// dx_rows[k] += W_ih^T dz of slot k.
template <class S>
void input_gradient(CellKind cell, const Factor<S>* dz, int64_t capacity, int64_t H, int64_t I, const Factor<S>* ih_t,
                    bool finite, void* const* dx_rows, int64_t begin, int64_t end) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  const int64_t dz_vectors = slot_vectors(values_of(cell), divide_up(H, L)), K = transposed_rows<S>(gates_of(cell), H);
  const int64_t vectors = divide_up(I, L);
  for (int64_t v = 0, count; v < vectors; v += count) {
    count = tile_vectors(v, vectors);
    for (int64_t k = begin; k < end; k += kTileRows<S>) {
      const int64_t rows = minimum(end - k, kTileRows<S>);
      Vec<A> sums[kTileRows<S> * kTileVectors];
      const auto to = [&](int64_t m, int64_t n) INLINE_LAMBDA { return static_cast<S*>(dx_rows[k + m]) + (v + n) * L; };
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < count; ++n) sums[m * count + n] = load<A>(to(m, n), I - (v + n) * L);
      with_vectors(count, [&]<int N>() INLINE_LAMBDA {
        multiply_slots<Multiplied<S>, N>(sums, rows, dz, dz_vectors, capacity, k, ih_t + v * K * L * kPlanes<S>, K,
                                         finite);
      });
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < count; ++n) store<A>(to(m, n), sums[m * count + n], I - (v + n) * L);
    }
  }
}

// The same for so few slots that a packed W_ih would be read once: its rows are the panel as they are. This takes the
// vectors begin <= v < end of columns, which are whole.
template <class S>
void input_gradient_unpacked(CellKind cell, const S* dz, int64_t capacity, int64_t count, int64_t H, int64_t I,
                             const S* w_ih, void* const* dx_rows, int64_t begin, int64_t end) {
  constexpr int L = kLanes<S>;
  const int64_t blocks = divide_up(H, L), dz_vectors = slot_vectors(values_of(cell), blocks);
  for (int64_t v = begin, width = 0; v < end; v += width) {
    width = tile_vectors(v, end);
    with_vectors(width, [&]<int N>() INLINE_LAMBDA {
      for (int64_t k = 0; k < count; k += kTileRows<S>)
        with_rows<S>(count - k, [&]<int M>(int) INLINE_LAMBDA {
          Vec<S> acc[M][N];
          S* to[M];
          for (int m = 0; m < M; ++m) {
            to[m] = static_cast<S*>(dx_rows[k + m]) + v * L;
            for (int n = 0; n < N; ++n) acc[m][n] = load<S>(to[m] + n * L, L);
          }
          for (int64_t vector = 0; vector < gates_of(cell) * blocks; ++vector) {
            const int64_t unit = vector % blocks * L;
            const S* w = w_ih + (vector / blocks * H + unit) * I + v * L;
            const S* a[M];
            for (int m = 0; m < M; ++m) a[m] = dz + dz_offset<S>(dz_vectors, capacity, vector, k + m);
            for (int64_t l = 0; l < minimum(L, H - unit); ++l, w += I) {
              Vec<S> row[N];
              for (int n = 0; n < N; ++n) row[n] = load<S>(w + n * L, L);
#pragma GCC unroll 8
              for (int m = 0; m < M; ++m)
                for (int n = 0; n < N; ++n) acc[m][n] += a[m][l] * row[n];
            }
          }
          for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) store<S>(to[m] + n * L, acc[m][n], L);
        });
    });
  }
}

// The gradients of W_ih, W_hh and the biases are one product, dz^T [x, h, 1]. A tile holds kColumns columns of [x, h,
// 1] and kTileVectors vectors of dz. If a cell has gates whose parts are apart, tiles skip the panels that do not
// matter: with columns of x alone those of recurrent parts, with columns of h alone those of input parts.
template <class S>
struct WeightGradients {
  using A = Accumulate<S>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>, kColumns = kTileRows<S>;
  static constexpr int kStride = kPairs<S> ? L : kColumns;  // of gathered columns, which pairs transpose
  static constexpr int64_t kSlots = 128;  // per partial sum, which keeps rounding errors from growing with T * B
  static constexpr int64_t kPanels = (512 << 10) / (kSlots * kTileVectors * kBytes);  // their dz fills half an L2 cache
  static constexpr int64_t kPanel = kPairs<S> ? kPlanes<S> * kSlots * kTileVectors * L : 0;  // values of a paired one

  const WeightGradient& w;
  const int64_t I = w.I, H = w.H, blocks = divide_up(w.H, L), vectors = slot_vectors(values_of(w.cell), blocks);
  const int64_t panels = vectors / kTileVectors, columns = w.I + w.H + 1;

  // Returns how many bytes add() needs.
  static int64_t scratch(CellKind cell, int64_t H) {
    return minimum(slot_vectors(values_of(cell), divide_up(H, L)) / kTileVectors, kPanels) * kPanel * sizeof(Factor<S>);
  }

  A* sums(int64_t tile, int64_t panel) const {
    return static_cast<A*>(w.sums) + (tile * panels + panel) * kColumns * kTileVectors * L;
  }

  const Factor<S>* dz(int64_t vector, int64_t slot) const {
    return static_cast<const Factor<S>*>(w.dz) + dz_offset<S>(vectors, w.capacity, vector, slot);
  }

  static INLINE A value(const S& s) {
    if constexpr (std::is_same_v<S, bfloat16>)
      return bit_cast<float>(uint32_t(s.bits) << 16);
    else if constexpr (kSplit<S>)
      return s.value;
    else
      return s;
  }

  INLINE A column(int64_t j, int64_t slot) const {
    if (j < I) return value(static_cast<const S*>(w.x_rows[slot])[j]);
    if (j < I + H) return value(static_cast<const S*>(w.h_rows[slot])[j - I]);
    return j == I + H;
  }

  // Gathers the values of a tile's columns, [slot][column].
  INLINE void gather(int64_t tile, int64_t first, int64_t count, A* to) const {
    const int64_t j = tile * kColumns;
    const bool in_x = j + kColumns <= I, in_h = j >= I && j + kColumns <= I + H;
    for (int64_t k = 0; k < count; ++k, to += kStride)
      if (in_x || in_h) {
        const S* from = in_x ? static_cast<const S*>(w.x_rows[first + k]) + j
                             : static_cast<const S*>(w.h_rows[first + k]) + (j - I);
        for (int m = 0; m < kColumns; ++m) to[m] = value(from[m]);
      } else {
        for (int m = 0; m < kColumns; ++m) to[m] = column(j + m, first + k);
      }
  }

  // Tells whether no gradient needs the products of a tile with a panel.
  bool skips(int64_t tile, int64_t panel) const {
    const int64_t j = tile * kColumns, first = panel * kTileVectors, last = first + kTileVectors;
    const int64_t gates = gates_of(w.cell), apart = values_of(w.cell) - gates;
    return j + kColumns <= I
               ? first >= gates * blocks
               : j >= I && j + kColumns <= I + H && first >= (gates - apart) * blocks && last <= gates * blocks;
  }

  // Tells whether dz is 0 in some slots of the panels panel0 <= panel < last.
  bool vanished(int64_t panel0, int64_t last, int64_t slot, int64_t count) const {
    if constexpr (kPairs<S>) return all_zero(dz(0, slot), count * kPlanes<S> * vectors * L);
    for (int64_t panel = panel0; panel < last; ++panel)
      if (!all_zero(dz(panel * kTileVectors, slot), count * kTileVectors * L)) return false;
    return true;
  }

  // Brings the dz of K slots, of which there are `count`, into pairs: [panel][plane][slot / 2][vector][lane][slot % 2].
  INLINE void pair_dz(int64_t panel0, int64_t last, int64_t slot, int64_t count, int64_t K, Factor<S>* to) const {
    for (int64_t panel = panel0; panel < last; ++panel, to += kPanel)
      for (int64_t k = 0; k < K; k += 2)
        for (int64_t n = 0; n < kTileVectors; ++n)
          for (int64_t plane = 0; plane < kPlanes<S>; ++plane) {
            const Factor<S>* from = dz(panel * kTileVectors + n, slot + k) + plane * vectors * L;
            store_factors<bfloat16>(to + plane * K * kTileVectors * L, K, k, kTileVectors, n,
                                    k < count ? load_aligned<A>(from) : V{},
                                    k + 1 < count ? load_aligned<A>(from + kPlanes<S> * vectors * L) : V{});
          }
  }

  // Turns gathered columns into rows of factors, [column][plane][slot], with zeros beyond `count`.
  INLINE void pair_columns(const A* values, int64_t count, int64_t K, Factor<S>* rows) const {
    for (int64_t k = 0; k < K; k += L) {
      V v[L];
      for (int l = 0; l < L; ++l) v[l] = k + l < count ? load_vector(values + (k + l) * kStride) : V{};
      transpose<A>(v);
      for (int m = 0; m < kColumns; ++m) store_row<S>(rows + m * kPlanes<S> * kSlots + k, K, v[m]);
    }
  }

  // Adds the products of all slots to the sums. scratch has scratch() bytes.
  void add([[maybe_unused]] Factor<S>* scratch) const {
    alignas(64) A values[kSlots * kStride];
    alignas(64) Factor<S> rows[kPairs<S> ? kColumns * kPlanes<S> * kSlots : 1];
    for (int64_t panel0 = 0; panel0 < panels; panel0 += kPanels)
      for (int64_t slot = 0; slot < w.count || (w.first && slot == 0); slot += kSlots) {
        const int64_t count = minimum(kSlots, w.count - slot), last = minimum(panels, panel0 + kPanels);
        const int64_t K = round_up(count, maximum(kStep<S>, L));  // slots that are multiplied as pairs
        const bool overwrite = w.first && slot == 0;
        if (!overwrite && vanished(panel0, last, slot, count)) continue;
        if constexpr (kPairs<S>) pair_dz(panel0, last, slot, count, K, scratch);
        for (int64_t tile = w.begin; tile < w.end; ++tile) {
          gather(tile, slot, count, values);
          if constexpr (kPairs<S>) pair_columns(values, count, K, rows);
          for (int64_t panel = panel0; panel < last; ++panel) {
            if (skips(tile, panel)) continue;
            A* to = sums(tile, panel);
            V acc[kColumns][kTileVectors] = {};
            if constexpr (kPairs<S>) {
              const Factor<S>* a[kColumns];
              for (int m = 0; m < kColumns; ++m) a[m] = rows + m * kPlanes<S> * kSlots;
              multiply<S>(acc, a, scratch + (panel - panel0) * kPanel, K, K);
            } else {
              multiply_with<kColumns, kTileVectors, A>(
                  acc, [&](int m, int64_t k) INLINE_LAMBDA { return values[k * kColumns + m]; },
                  dz(panel * kTileVectors, slot), count);
            }
            for (int m = 0; m < kColumns; ++m)
              for (int n = 0; n < kTileVectors; ++n)
                store_vector(to + (m * kTileVectors + n) * L,
                             overwrite ? acc[m][n] : load_vector(to + (m * kTileVectors + n) * L) + acc[m][n]);
          }
        }
      }
  }

  // Stores the columns first <= j < last of [x, h, 1] to a matrix (gates * H, last - first), for one of the two parts.
  void store_columns(bool recurrent, int64_t first, int64_t last, S* matrix) const {
    const int64_t begin = maximum(first, w.begin * kColumns), end = minimum(last, w.end * kColumns);
    for (int64_t j = begin; j < end; j += L)
      for (int64_t row = 0; row < gates_of(w.cell) * blocks; ++row) {
        const int64_t gate = row / blocks, unit = row % blocks * L;
        const int64_t vector = recurrent ? recurrent_value_of(w.cell, int(gate)) * blocks + row % blocks : row;
        V v[L];
        for (int k = 0; k < L; ++k) {
          const int64_t column = minimum(j + k, end - 1);
          v[k] = load_vector(sums(column / kColumns, vector / kTileVectors) +
                             (column % kColumns * kTileVectors + vector % kTileVectors) * L);
        }
        transpose<A>(v);
        const int64_t units = minimum(L, H - unit);
        for (int64_t l = 0; l < units; ++l)
          ::birnn::cpu::BIRNN_ISA::store<A>(matrix + (gate * H + unit + l) * (last - first) + j - first, v[l], end - j);
      }
  }

  void store(S* dw_ih, S* dw_hh, S* d_bias_ih, S* d_bias_hh) const {
    store_columns(false, 0, I, dw_ih);
    store_columns(true, I, I + H, dw_hh);
    if (d_bias_ih) store_columns(false, I + H, I + H + 1, d_bias_ih);
    if (d_bias_hh) store_columns(true, I + H, I + H + 1, d_bias_hh);
  }
};
