// A layer's gradients that are products over all steps. The recurrence has written dz as panels,
// [panel][slot][kTileVectors vectors][lane]. recurrence_kernel.h includes this file, once per ISA.

// dx_rows[k] += W_ih^T dz of slot k.
template <class Cell, class S>
void input_gradient(const S* dz, int64_t capacity, int64_t H, int64_t I, const S* ih_t, bool finite,
                    void* const* dx_rows, int64_t begin, int64_t end) {
  constexpr int L = kLanes<S>;
  const int64_t blocks = divide_up(H, L), vectors = divide_up(I, L), rows = Cell::kGates * blocks * L;
  constexpr bool kWhole = Cell::kGates % kTileVectors == 0;  // then the last panel is full, too
  for (int64_t v = 0, count; v < vectors; v += count) {
    count = tile_vectors(v, vectors);
    with_vectors(count, [&]<int N>() INLINE_LAMBDA {
      const S* panel = ih_t + v * rows * L;
      for (int64_t k = begin; k < end; k += kRows)
        with_rows<S>(end - k, [&]<int M>(int) INLINE_LAMBDA {
          Vec<S> acc[M][N];
          S* to[M];
          for (int m = 0; m < M; ++m) {
            to[m] = static_cast<S*>(dx_rows[k + m]) + v * L;
            for (int n = 0; n < N; ++n) acc[m][n] = load<S>(to[m] + n * L, I - (v + n) * L);
          }
          for (int64_t first = 0; first < rows; first += kTileVectors * L) {
            const S* a[M];
            for (int m = 0; m < M; ++m) a[m] = dz + first * capacity + (k + m) * kTileVectors * L;
            if (finite && all_zero(a[0], M * kTileVectors * L)) continue;
            multiply<S>(acc, a, panel + first * N * L,
                        kWhole ? kTileVectors * L : minimum(kTileVectors * L, rows - first));
          }
          for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) store<S>(to[m] + n * L, acc[m][n], I - (v + n) * L);
        });
    });
  }
}

constexpr int64_t kGroup = 64;  // slots of a split type that share a read of the weights

// The same for a split type, where the dz of some slots become factors first. scratch has gradient_scratch bytes.
template <class Cell, class S>
void input_gradient_split(const float* dz, int64_t capacity, int64_t H, int64_t I, const Factor<S>* ih_t,
                          void* const* dx_rows, int64_t begin, int64_t end, Factor<S>* scratch) {
  constexpr int L = kLanes<float>, M = kTileRows<S>;
  const int64_t dz_vectors = Cell::kGates * divide_up(H, L), vectors = divide_up(I, L);
  const int64_t plane = dz_vectors * L, row_size = 2 * plane;
  for (int64_t group = begin; group < end; group += kGroup) {
    const int64_t count = minimum(kGroup, end - group);
    for (int64_t k = 0; k < round_up(count, M); ++k)
      for (int64_t vector = 0; vector < dz_vectors; ++vector) {
        const int64_t panel = vector / kTileVectors, column = vector % kTileVectors;
        const float* from = dz + ((panel * capacity + group + k) * kTileVectors + column) * L;
        store_row<S>(scratch + k * row_size + vector * L, plane, k < count ? load_vector(from) : Vec<float>{});
      }
    for (int64_t v = 0, tile; v < vectors; v += tile) {
      tile = tile_vectors(v, vectors);
      with_vectors(tile, [&]<int N>() INLINE_LAMBDA {
        for (int64_t k = 0; k < count; k += M) {
          const int64_t wanted = minimum(M, count - k);
          const auto to = [&](int64_t m) INLINE_LAMBDA { return static_cast<float*>(dx_rows[group + k + m]) + v * L; };
          Vec<float> acc[M][N] = {};
          const Factor<S>* a[M];
          for (int64_t m = 0; m < M; ++m) a[m] = scratch + (k + m) * row_size;
          for (int64_t m = 0; m < wanted; ++m)
            for (int n = 0; n < N; ++n) acc[m][n] = load<float>(to(m) + n * L, I - (v + n) * L);
          multiply<S>(acc, a, ih_t + v * row_size * L, plane);
          for (int64_t m = 0; m < wanted; ++m)
            for (int n = 0; n < N; ++n) store<float>(to(m) + n * L, acc[m][n], I - (v + n) * L);
        }
      });
    }
  }
}

// The gradients of W_ih, W_hh and the biases are one product, dz^T [x, h, 1], if the input and the recurrent part of dz
// are equal. A tile holds kColumns columns of [x, h, 1] and kTileVectors vectors of gates.
template <class Cell, class S>
struct WeightGradients {
  static_assert(Cell::kAddsParts);
  using A = Accumulate<S>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>, kColumns = kTileRows<S>;
  static constexpr int64_t kSlots = 128;  // per partial sum, which keeps rounding errors from growing with T * B
  static constexpr int64_t kPanels = (512 << 10) / (kSlots * kTileVectors * kBytes);  // their dz fills half an L2 cache

  const WeightGradient& w;
  const int64_t I = w.I, H = w.H, blocks = divide_up(w.H, L), vectors = Cell::kGates * blocks;
  const int64_t panels = divide_up(vectors, kTileVectors), columns = w.I + w.H + 1;

  A* sums(int64_t tile, int64_t panel) const {
    return static_cast<A*>(w.sums) + (tile * panels + panel) * kColumns * kTileVectors * L;
  }

  INLINE A column(int64_t j, int64_t slot) const {
    if (j < I) return static_cast<const A*>(w.x_rows[slot])[j];
    if (j < I + H) return static_cast<const A*>(w.h_rows[slot])[j - I];
    return j == I + H;
  }

  // Gathers the values of a tile's columns, [slot][column].
  INLINE void gather(int64_t tile, int64_t first, int64_t count, A* to) const {
    const int64_t j = tile * kColumns;
    const bool in_x = j + kColumns <= I, in_h = j >= I && j + kColumns <= I + H;
    for (int64_t k = 0; k < count; ++k)
      if (in_x || in_h)
        __builtin_memcpy(to + k * kColumns,
                         in_x ? static_cast<const A*>(w.x_rows[first + k]) + j
                              : static_cast<const A*>(w.h_rows[first + k]) + (j - I),
                         kColumns * sizeof(A));
      else
        for (int m = 0; m < kColumns; ++m) to[k * kColumns + m] = column(j + m, first + k);
  }

  // Tells whether dz is 0 in some slots of kPanels panels.
  bool vanished(int64_t panel0, int64_t slot, int64_t count) const {
    for (int64_t panel = panel0; panel < minimum(panels, panel0 + kPanels); ++panel)
      if (!all_zero(static_cast<const A*>(w.dz) + (panel * w.capacity + slot) * kTileVectors * L,
                    count * kTileVectors * L))
        return false;
    return true;
  }

  // A split type's version, which makes factors of both: the dz of some slots become panels,
  // [panel][plane][slot / 2][vector][lane][slot % 2], and a tile's columns become rows.
  void add_split(Factor<S>* factors) const {
    alignas(64) A values[kSlots * kColumns];
    alignas(64) Factor<S> rows[kColumns * 2 * kSlots];
    constexpr int64_t kPanel = 2 * kSlots * kTileVectors * L;
    for (int64_t panel0 = 0; panel0 < panels; panel0 += kPanels)
      for (int64_t slot = 0; slot < w.count || (w.first && slot == 0); slot += kSlots) {
        const int64_t count = minimum(kSlots, w.count - slot), last = minimum(panels, panel0 + kPanels);
        const bool overwrite = w.first && slot == 0;
        if (!overwrite && vanished(panel0, slot, count)) continue;
        for (int64_t panel = panel0; panel < last; ++panel)
          for (int64_t k = 0; k < kSlots; k += 2)
            for (int64_t n = 0; n < kTileVectors; ++n) {
              const A* dz = static_cast<const A*>(w.dz) + ((panel * w.capacity + slot + k) * kTileVectors + n) * L;
              store_factors<S>(factors + (panel - panel0) * kPanel, kSlots, k, kTileVectors, n,
                               k < count ? load_vector(dz) : V{},
                               k + 1 < count ? load_vector(dz + kTileVectors * L) : V{});
            }
        for (int64_t tile = w.begin; tile < w.end; ++tile) {
          gather(tile, slot, count, values);
          for (int64_t k = 0; k < kSlots; k += L) {
            V v[L];
            for (int l = 0; l < L; ++l) v[l] = k + l < count ? load_vector(values + (k + l) * kColumns) : V{};
            transpose<A>(v);
            for (int l = 0; l < L; ++l) store_row<S>(rows + l * 2 * kSlots + k, kSlots, v[l]);
          }
          const Factor<S>* a[kColumns];
          for (int m = 0; m < kColumns; ++m) a[m] = rows + m * 2 * kSlots;
          for (int64_t panel = panel0; panel < last; ++panel) {
            A* to = sums(tile, panel);
            V acc[kColumns][kTileVectors] = {};
            multiply<S>(acc, a, factors + (panel - panel0) * kPanel, kSlots);
            for (int m = 0; m < kColumns; ++m)
              for (int n = 0; n < kTileVectors; ++n)
                store_vector(to + (m * kTileVectors + n) * L,
                             overwrite ? acc[m][n] : load_vector(to + (m * kTileVectors + n) * L) + acc[m][n]);
          }
        }
      }
  }

  // Returns how many bytes add_split and input_gradient_split need.
  static int64_t scratch(int64_t H) {
    const int64_t vectors = Cell::kGates * divide_up(H, L), panels = divide_up(vectors, kTileVectors);
    return maximum(minimum(panels, kPanels) * kSlots * kTileVectors, kGroup * vectors) * 2 * L * sizeof(Factor<S>);
  }

  void add() const {
    A values[kSlots * kColumns];
    for (int64_t panel0 = 0; panel0 < panels; panel0 += kPanels)
      for (int64_t slot = 0; slot < w.count || (w.first && slot == 0); slot += kSlots) {
        const int64_t count = minimum(kSlots, w.count - slot);
        const bool overwrite = w.first && slot == 0;
        if (!overwrite && vanished(panel0, slot, count)) continue;
        for (int64_t tile = w.begin; tile < w.end; ++tile) {
          gather(tile, slot, count, values);
          for (int64_t panel = panel0; panel < minimum(panels, panel0 + kPanels); ++panel) {
            A* to = sums(tile, panel);
            V acc[kColumns][kTileVectors] = {};
            multiply_with<kColumns, kTileVectors, A>(
                acc, [&](int m, int64_t k) INLINE_LAMBDA { return values[k * kColumns + m]; },
                static_cast<const A*>(w.dz) + (panel * w.capacity + slot) * kTileVectors * L, count);
            for (int m = 0; m < kColumns; ++m)
              for (int n = 0; n < kTileVectors; ++n)
                store_vector(to + (m * kTileVectors + n) * L,
                             overwrite ? acc[m][n] : load_vector(to + (m * kTileVectors + n) * L) + acc[m][n]);
          }
        }
      }
  }

  // Stores the columns first <= j < last of [x, h, 1] to a matrix (gates * H, last - first).
  void store_columns(int64_t first, int64_t last, A* matrix) const {
    const int64_t begin = maximum(first, w.begin * kColumns), end = minimum(last, w.end * kColumns);
    for (int64_t j = begin; j < end; j += L)
      for (int64_t vector = 0; vector < vectors; ++vector) {
        const int64_t gate = vector / blocks, unit = vector % blocks * L;
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

  void store(A* dw_ih, A* dw_hh, A* d_bias) const {
    store_columns(0, I, dw_ih);
    store_columns(I, I + H, dw_hh);
    store_columns(I + H, I + H + 1, d_bias);
  }
};
