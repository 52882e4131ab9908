// What a layer's gradients need beside the recurrence: products over all steps. Included once per ISA
// (recurrence_kernel.h). dz arrives as panels, [block][slot][4 vectors][lane], in which it was written.

// dx_rows[k] += W_ih^T dz of slot k.
template <class S>
void input_gradient(const S* dz, int64_t capacity, int64_t H, int64_t I, const S* ih_t, void* const* dx_rows,
                    int64_t begin, int64_t end) {
  constexpr int L = kLanes<S>;
  const int64_t blocks = divide_up(H, L), vectors = divide_up(I, L);
  for (int64_t v = 0, count; v < vectors; v += count) {
    count = tile_vectors(v, vectors);
    with_vectors(count, [&]<int N>() INLINE_LAMBDA {
      const S* panel = ih_t + v * 4 * blocks * L * L;
      for (int64_t k = begin; k < end; k += kRows)
        with_rows<S>(end - k, [&]<int M>(int) INLINE_LAMBDA {
          Vec<S> acc[M][N];
          S* to[M];
          for (int m = 0; m < M; ++m) {
            to[m] = static_cast<S*>(dx_rows[k + m]) + v * L;
            for (int n = 0; n < N; ++n) acc[m][n] = load<S>(to[m] + n * L, I - (v + n) * L);
          }
          for (int64_t block = 0; block < blocks; ++block) {
            const S* a[M];
            for (int m = 0; m < M; ++m) a[m] = dz + (block * capacity + k + m) * 4 * L;
            if (all_zero(a[0], M * 4 * L)) continue;
            multiply<S>(acc, a, panel + block * 4 * L * N * L, 4 * L);
          }
          for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) store<S>(to[m] + n * L, acc[m][n], I - (v + n) * L);
        });
    });
  }
}

// The gradients of W_ih, W_hh and the biases are one product, dz^T [x, h, 1]. A tile holds kRows columns of [x, h, 1]
// and 4 vectors of gates.
template <class S>
struct WeightGradients {
  static constexpr int L = kLanes<S>;
  static constexpr int64_t kSlots = 128;                                   // summed in one go
  static constexpr int64_t kBlocks = (512 << 10) / (kSlots * 4 * kBytes);  // whose dz then fills half of an L2 cache

  const WeightGradient& w;
  const int64_t I = w.I, H = w.H, blocks = divide_up(w.H, L), columns = w.I + w.H + 1;

  S* sums(int64_t tile, int64_t block) const {
    return static_cast<S*>(w.sums) + (tile * blocks + block) * kRows * 4 * L;
  }

  INLINE S column(int64_t j, int64_t slot) const {
    if (j < I) return static_cast<const S*>(w.x_rows[slot])[j];
    if (j < I + H) return static_cast<const S*>(w.h_rows[slot])[j - I];
    return j == I + H;
  }

  // The values of a tile's columns, [slot][column].
  INLINE void gather(int64_t tile, int64_t first, int64_t count, S* to) const {
    const int64_t j = tile * kRows;
    const bool in_x = j + kRows <= I, in_h = j >= I && j + kRows <= I + H;
    for (int64_t k = 0; k < count; ++k)
      if (in_x || in_h)
        __builtin_memcpy(to + k * kRows,
                         in_x ? static_cast<const S*>(w.x_rows[first + k]) + j
                              : static_cast<const S*>(w.h_rows[first + k]) + (j - I),
                         kRows * sizeof(S));
      else
        for (int m = 0; m < kRows; ++m) to[k * kRows + m] = column(j + m, first + k);
  }

  // Whether the dz of some slots are 0, in kBlocks blocks.
  bool vanished(int64_t block0, int64_t slot, int64_t count) const {
    for (int64_t block = block0; block < minimum(blocks, block0 + kBlocks); ++block)
      if (!all_zero(static_cast<const S*>(w.dz) + (block * w.capacity + slot) * 4 * L, count * 4 * L)) return false;
    return true;
  }

  void add() const {
    S values[kSlots * kRows];
    for (int64_t block0 = 0; block0 < blocks; block0 += kBlocks)
      for (int64_t slot = 0; slot < w.count || (w.first && slot == 0); slot += kSlots) {
        const int64_t count = minimum(kSlots, w.count - slot);
        const bool overwrite = w.first && slot == 0;
        if (!overwrite && vanished(block0, slot, count)) continue;
        for (int64_t tile = w.begin; tile < w.end; ++tile) {
          gather(tile, slot, count, values);
          for (int64_t block = block0; block < minimum(blocks, block0 + kBlocks); ++block) {
            S* to = sums(tile, block);
            Vec<S> acc[kRows][4];
            for (int m = 0; m < kRows; ++m)
              for (int n = 0; n < 4; ++n) acc[m][n] = overwrite ? Vec<S>{} : load_vector(to + (m * 4 + n) * L);
            multiply_with<kRows, 4, S>(
                acc, [&](int m, int64_t k) INLINE_LAMBDA { return values[k * kRows + m]; },
                static_cast<const S*>(w.dz) + (block * w.capacity + slot) * 4 * L, count);
            for (int m = 0; m < kRows; ++m)
              for (int n = 0; n < 4; ++n) store_vector(to + (m * 4 + n) * L, acc[m][n]);
          }
        }
      }
  }

  // Columns j of [x, h, 1], first <= j < last, to a matrix (4H, last - first).
  void store_columns(int64_t first, int64_t last, S* matrix) const {
    const int64_t begin = maximum(first, w.begin * kRows), end = minimum(last, w.end * kRows);
    for (int64_t j = begin; j < end; j += L)
      for (int64_t vector = 0; vector < 4 * blocks; ++vector) {
        const int64_t gate = vector / blocks, unit = vector % blocks * L;
        Vec<S> v[L];
        for (int k = 0; k < L; ++k) {
          const int64_t column = minimum(j + k, end - 1);
          v[k] = load_vector(sums(column / kRows, vector / 4) + (column % kRows * 4 + vector % 4) * L);
        }
        transpose<S>(v);
        const int64_t units = minimum(L, H - unit);
        for (int64_t l = 0; l < units; ++l)
          ::birnn::cpu::BIRNN_ISA::store<S>(matrix + (gate * H + unit + l) * (last - first) + j - first, v[l], end - j);
      }
  }

  void store(S* dw_ih, S* dw_hh, S* d_bias) const {
    store_columns(0, I, dw_ih);
    store_columns(I, I + H, dw_hh);
    store_columns(I + H, I + H + 1, d_bias);
  }
};
