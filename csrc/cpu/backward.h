// The backward pass of a chain. recurrence_kernel.h includes this file, once per ISA.

template <class Cell, class S>
struct Backward {
  using A = Accumulate<S>;
  using V = Vec<A>;
  using State = SavedState<Cell, S>;
  static constexpr int L = kLanes<A>, kGates = Cell::kGates, kValues = Cell::kValues;

  const BackwardParams& p;
  const Chain& chain;
  const Panels& panels;
  const Slots& slots;
  const Member& member;
  const StepOrder<int64_t> order{chain.direction, p.T};
  const int64_t d = chain.direction, H = p.H, B = p.B, D = p.D, blocks = divide_up(H, L), padded = blocks * L;
  const int64_t plane = transposed_rows<S>(kGates, H), row_size = plane * kPlanes<S>;
  const int64_t slot_size = slot_vectors(kValues, blocks) * L;
  int64_t begin, end;         // this member's blocks: whole tiles
  A* dc;                      // [row][padded]
  A* zeros;                   // (H)
  A* gates;                   // [step][block][value][lane]: recomputed
  Factor<S>*x_rows, *h_rows;  // x and h of recomputed steps as factors, for a converted type
  Factor<S>* dz[2];  // of recurrent parts, [row][plane][gate][padded] of the previous and of this step, alternating

  Backward(const BackwardParams& params, const Chain& ch, const Panels& packed, const Slots& out, int64_t steps_at_once,
           const Member& who)
      : p(params), chain(ch), panels(packed), slots(out), member(who) {
    const int64_t tiles = divide_up(blocks, kTileVectors);
    begin = member.index * tiles / member.count * kTileVectors;
    end = minimum(blocks, (member.index + 1) * tiles / member.count * kTileVectors);
    dc = static_cast<A*>(chain.scratch);
    zeros = dc + chain.count * padded;
    gates = zeros + padded;
    dz[0] = reinterpret_cast<Factor<S>*>(gates + (p.gates ? 0 : kValues * chain.count * steps_at_once) * padded);
    dz[1] = dz[0] + round_up(chain.count, kTileRows<S>) * row_size;
    x_rows = dz[1] + round_up(chain.count, kTileRows<S>) * row_size;
    h_rows = x_rows + row_values(p.input.I, chain.count * steps_at_once);
  }

  static int64_t scratch(const BackwardParams& p, int64_t rows, int64_t steps) {
    const int64_t padded = round_up(p.H, L);
    return (rows + 1 + (p.gates ? 0 : kValues * rows * steps)) * padded * sizeof(A) +
           (2 * round_up(rows, kTileRows<S>) * transposed_rows<S>(kGates, p.H) * kPlanes<S> +
            (kConverted<S> && !p.gates ? row_values(p.input.I, rows * steps) + row_values(p.H, rows * steps) : 0)) *
               sizeof(Factor<S>);
  }

  // Counts the values that rows of n values take as factors.
  static int64_t row_values(int64_t n, int64_t rows) {
    return round_up(rows, kTileRows<S>) * factor_row<S>(n) * kPlanes<S>;
  }

  int64_t length(int64_t b) const { return length_of(p.lengths, b, p.T); }

  // Adds W_hh^T dz of some rows to sums [row][vector], for `count` vectors of units from vector v on.
  INLINE void product(V* sums, int64_t rows, const Factor<S>* from, int64_t v, int64_t count) {
    if (!*panels.not_finite && all_zero(from, rows * row_size)) return;
    const Factor<S>* a[kTileRows<S>];
    for (int m = 0; m < (kAmx<S> ? kTileRows<S> : rows); ++m) a[m] = from + m * row_size;
    const Factor<S>* panel = static_cast<const Factor<S>*>(panels.hh_t) + v * row_size * L;
    with_vectors(count,
                 [&]<int N>() INLINE_LAMBDA { multiply_rows<Multiplied<S>, N>(sums, rows, a, panel, plane, plane); });
  }

  INLINE void tile(int64_t rows, int64_t t, int64_t s, int64_t first, int64_t v, int64_t count, const A* gate_rows) {
    V sums[kTileRows<S> * kTileVectors] = {};
    if (s > 0) product(sums, rows, dz[(s + 1) & 1] + first * row_size, v, count);
    const S* dy = static_cast<const S*>(p.dy);
    const S* dh_n = static_cast<const S*>(p.dh_n);
    for (int m = 0; m < rows; ++m) {
      const int64_t b = chain.rows[first + m], row = (t * B + b) * D + d;
      const bool first_step = t == order.first(length(b)), last_step = t == order.last(length(b));
      const int64_t row_before = row + (order.before(t) - t) * B * D;
      const int64_t slot = slots.dz ? slots.offsets[t] + chain.rank + (first + m) * chain.rank_step - slots.first : 0;
      for (int64_t n = 0; n < count; ++n) {
        const int64_t unit = (v + n) * L, left = H - unit;
        V dh = sums[m * count + n];
        if (dy) dh += load<A>(dy + t * p.dy_stride_t + b * p.dy_stride_b + d * H + unit, left);
        if (dh_n && last_step) dh += load<A>(dh_n + (d * B + b) * H + unit, left);
        V c_prev = {};
        if (!first_step)
          c_prev = load<A>(static_cast<const State*>(p.cells) + row_before * H + unit, left);
        else if (p.c0)
          c_prev = load<A>(static_cast<const S*>(p.c0) + (d * B + b) * H + unit, left);
        V values[kValues], dz_values[kValues];
        if (gate_rows) {
          const A* from = gate_rows + ((first + m) * padded + (v + n) * L) * kValues;
          BIRNN_UNROLL
          for (int k = 0; k < kValues; ++k) values[k] = load_vector(from + k * L);
        } else {
          const S* from = static_cast<const S*>(p.gates) + row * kValues * H + unit;
          BIRNN_UNROLL
          for (int k = 0; k < kValues; ++k) values[k] = load<A>(from + k * H, left);
        }
        A* dc_row = dc + (first + m) * padded + unit;
        V dc_value = load_vector(dc_row);
        const V c = load<A>(static_cast<const State*>(p.cells) + row * H + unit, left);
        Cell::template backward<Math<A>>(values, c, c_prev, dh, dc_value, dz_values);
        store_vector(dc_row, dc_value);
        Factor<S>* dz_row = dz[s & 1] + (first + m) * row_size + unit;
        BIRNN_UNROLL
        for (int g = 0; g < kGates; ++g) store_row<S>(dz_row + g * padded, plane, dz_values[Cell::recurrent_value(g)]);
        BIRNN_UNROLL
        for (int k = 0; k < kValues; ++k)
          if (slots.dz) {
            const int64_t at = dz_offset<S>(slot_size / L, slots.capacity, k * blocks + v + n, slot);
            store_row<S>(static_cast<Factor<S>*>(slots.dz) + at, slot_size, dz_values[k]);
          } else {
            S* to =
                k < kGates ? static_cast<S*>(p.d_gates_x) + (row * kGates + k) * H : static_cast<S*>(p.d_q) + row * H;
            store<A>(to + unit, dz_values[k], left);
          }
      }
    }
  }

  // dh0 = W_hh^T dz of each row's first step, and the state's gradient, if the state is the output. finish() has moved
  // that dz to dz[0].
  INLINE void initial_tile(int64_t rows, int64_t first, int64_t v, int64_t count) {
    V sums[kTileRows<S> * kTileVectors] = {};
    product(sums, rows, dz[0] + first * row_size, v, count);
    for (int m = 0; m < rows; ++m)
      for (int64_t n = 0; n < count; ++n) {
        const int64_t unit = (v + n) * L;
        V dh = sums[m * count + n];
        if (Cell::kStateIsOutput) dh += load_vector(dc + (first + m) * padded + unit);
        store<A>(static_cast<S*>(p.dh0) + (d * B + chain.rows[first + m]) * H + unit, dh, H - unit);
      }
  }

  // Calls f(count of rows, first, v, count of vectors) for all tiles of the first `rows` rows.
  template <class F>
  INLINE void for_each_tile(int64_t rows, const F& f) {
    for (int64_t v = begin, count; v < end; v += count) {
      count = tile_vectors(v, blocks);
      for (int64_t first = 0; first < rows; first += kTileRows<S>)
        f(minimum(rows - first, kTileRows<S>), first, v, count);
    }
  }

  void start() {
    const S* dc_n = static_cast<const S*>(p.dc_n);
    for (int64_t r = chain.count; r < round_up(chain.count, kTileRows<S>); ++r)  // AMX multiplies these, too
      if (member.index == 0 && kAmx<S>)
        for (Factor<S>* buffer : dz) __builtin_memset(buffer + r * row_size, 0, row_size * sizeof(Factor<S>));
    for (int64_t r = 0; r < chain.count; ++r) {
      for (int64_t k = kGates * padded; k < plane && member.index == 0; k += L)
        for (Factor<S>* buffer : dz) store_row<S>(buffer + r * row_size + k, plane, V{});
      for (int64_t unit = begin * L; unit < end * L; unit += L) {
        for (int64_t g = 0; g < kGates; ++g)
          for (Factor<S>* buffer : dz)  // a row that begins later has no dz yet
            store_row<S>(buffer + r * row_size + g * padded + unit, plane, V{});
        store_vector(dc + r * padded + unit, dc_n ? load<A>(dc_n + (d * B + chain.rows[r]) * H + unit, H - unit) : V{});
      }
    }
    for (int64_t unit = begin * L; unit < end * L; unit += L) store_vector(zeros + unit, V{});
  }

  void finish() {
    const int64_t unit0 = begin * L, units = maximum(0, minimum(H, end * L) - unit0);
    const auto clear = [&](void* gradients, int64_t r, int64_t t, int64_t gates) {  // S (T, B, D, gates * H)
      for (int64_t g = 0; g < gates; ++g)
        __builtin_memset(static_cast<S*>(gradients) + (((t * B + chain.rows[r]) * D + d) * gates + g) * H + unit0, 0,
                         units * sizeof(S));
    };
    for (int64_t r = 0; r < chain.count && p.d_gates_x; ++r)
      for (int64_t t = length(chain.rows[r]); t < p.T; ++t) {
        clear(p.d_gates_x, r, t, kGates);
        clear(p.d_q, r, t, kValues - kGates);
      }
    if (!p.dh0) return;
    const int64_t begun = active_rows(chain, p.lengths, 0, 0);
    for (int64_t r = 0; r < begun; ++r) {  // a row's last iteration left its dz in one of the two buffers
      const int64_t s = order.backward(order.first(length(chain.rows[r])));
      for (int64_t g = 0; (s & 1) && g < kGates * kPlanes<S>; ++g) {
        const int64_t at = r * row_size + g / kGates * plane + g % kGates * padded + unit0;
        __builtin_memcpy(dz[0] + at, dz[1] + at, (end - begin) * L * sizeof(Factor<S>));
      }
    }
    member.barrier->wait(member.count);
    for_each_tile(begun, [&](int64_t rows, int64_t first, int64_t v, int64_t count)
                             INLINE_LAMBDA { initial_tile(rows, first, v, count); });
    for (int64_t r = begun; r < chain.count; ++r) {  // a sequence without steps hands its gradient through
      const int64_t state = (d * B + chain.rows[r]) * H + unit0;
      if (p.dh_n)
        __builtin_memcpy(static_cast<S*>(p.dh0) + state, static_cast<const S*>(p.dh_n) + state, units * sizeof(S));
      else
        __builtin_memset(static_cast<S*>(p.dh0) + state, 0, units * sizeof(S));
    }
    for (int64_t r = 0; r < chain.count && !Cell::kStateIsOutput; ++r)
      for (int64_t unit = unit0; unit < end * L; unit += L)
        store<A>(static_cast<S*>(p.dc0) + (d * B + chain.rows[r]) * H + unit, load_vector(dc + r * padded + unit),
                 H - unit);
  }

  // Recomputes the gates of some steps from x, h and the weights. No step waits for another, as all h are known.
  void recompute(const Steps& steps) {
    const InputProjection& in = p.input;
    const auto x_of = [&](const Cursor& at) INLINE_LAMBDA {
      return static_cast<const S*>(in.x) + order.backward(at.s) * in.stride_t + chain.rows[at.row] * in.stride_b;
    };
    const auto h_of = [&](const Cursor& at) INLINE_LAMBDA -> const S* {
      const int64_t b = chain.rows[at.row], t = order.backward(at.s);
      if (t != order.first(length(b))) return static_cast<const S*>(p.y) + ((order.before(t) * B + b) * D + d) * H;
      return p.h0 ? static_cast<const S*>(p.h0) + (d * B + b) * H : reinterpret_cast<const S*>(zeros);
    };
    if constexpr (kConverted<S>) {
      if (member.index == 0) {
        gather_rows<S>(steps, in.I, x_of, x_rows);
        gather_rows<S>(steps, H, h_of, h_rows);
      }
      member.barrier->wait(member.count);
    }
    const auto x_factors = [&](const Cursor& at, int64_t k) INLINE_LAMBDA -> const Factor<S>* {
      if constexpr (kConverted<S>)
        return x_rows + k * factor_row<S>(in.I) * kPlanes<S>;
      else
        return x_of(at);
    };
    const auto h_factors = [&](const Cursor& at, int64_t k) INLINE_LAMBDA -> const Factor<S>* {
      if constexpr (kConverted<S>)
        return h_rows + k * factor_row<S>(H) * kPlanes<S>;
      else
        return h_of(at);
    };
    project<Cell, S>(in, d, H, begin, end, panels, steps, x_factors, &h_factors, gates);
  }

  // Runs the iterations s_begin <= s < s_end.
  void run(int64_t steps_at_once, int64_t s_begin, int64_t s_end) {
    if (s_begin == 0) {
      start();
      member.barrier->wait(member.count);
    }
    for (int64_t s0 = s_begin; s0 < s_end; s0 += steps_at_once) {
      const Steps steps(p, chain, s0, minimum(s_end, s0 + steps_at_once), false);
      if constexpr (Cell::kSavesValues)
        if (!p.gates) recompute(steps);
      for (int64_t s = s0; s < steps.end; ++s) {
        const int64_t t = order.backward(s);
        const A* gate_rows = p.gates ? nullptr : gates + steps.first[s - s0] * kValues * padded;
        for_each_tile(steps.rows[s - s0], [&](int64_t rows, int64_t first, int64_t v, int64_t count)
                                              INLINE_LAMBDA { tile(rows, t, s, first, v, count, gate_rows); });
        member.barrier->wait(member.count);
      }
    }
    if (s_end == p.T) finish();
  }
};
