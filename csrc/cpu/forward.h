// The forward pass of a chain. recurrence_kernel.h includes this file, once per ISA.

// Returns how many of a chain's sequences, longest first, have a step t. The search starts at `hint`.
INLINE int64_t active_rows(const Chain& chain, const int64_t* lengths, int64_t t, int64_t hint) {
  if (!lengths) return chain.count;
  while (hint > 0 && lengths[chain.rows[hint - 1]] <= t) --hint;
  while (hint < chain.count && lengths[chain.rows[hint]] > t) ++hint;
  return hint;
}

// All steps of a chain's sequences in the iterations begin <= s < end, at most kMostStepsAtOnce.
struct Steps {
  int64_t begin, end, total = 0;
  int64_t rows[kMostStepsAtOnce], first[kMostStepsAtOnce];  // per iteration: how many, and the number of its first

  template <class Params>
  Steps(const Params& p, const Chain& chain, int64_t b, int64_t e, bool forward) : begin(b), end(e) {
    const StepOrder order{chain.direction, p.T};
    for (int64_t s = begin, hint = 0; s < end; ++s) {
      hint = active_rows(chain, p.lengths, forward ? order.forward(s) : order.backward(s), hint);
      rows[s - begin] = hint;
      first[s - begin] = total;
      total += hint;
    }
  }
};

// Walks through Steps, one after the other.
struct Cursor {
  const Steps& steps;
  int64_t s, row = 0;
  explicit Cursor(const Steps& all) : steps(all), s(all.begin) { skip(); }
  INLINE void skip() {
    while (s < steps.end && row == steps.rows[s - steps.begin]) ++s, row = 0;
  }
  INLINE void next() {
    ++row;
    skip();
  }
};

// Loads some of the biases of a direction.
template <class S>
INLINE Vec<Accumulate<S>> load_bias(const void* bias, int64_t at, int64_t n) {
  return bias ? load<Accumulate<S>>(static_cast<const S*>(bias) + at, n) : Vec<Accumulate<S>>{};
}

// Puts the parts of a unit's gates to the values that its cell starts from. The recurrent parts have the input parts
// added, if these are the same values.
template <class Cell, class V, class Input>
INLINE void place_parts(V (&values)[Cell::kValues], const Input& input, const V* recurrent) {
  BIRNN_UNROLL
  for (int g = 0; g < Cell::kGates; ++g) {
    values[Cell::recurrent_value(g)] = recurrent[g];
    if (is_apart<Cell>(g)) values[Cell::input_value(g)] = input(g);
  }
}

// Computes the part of the pre-activations that does not wait for the recurrence, z = bias + W_ih x, where the bias is
// that of both parts if they are one value. The backward pass, which knows h, has W_hh h added and gets the values that
// the forward pass saves. z is [step][block][gate or value][lane], for the blocks from `begin` to `end`. x_of(cursor,
// k) and h_of(cursor, k) return the rows of the k-th of `steps`. Taking several steps at once fills the rows of the
// tiles even with few sequences, and reads the panel only once.
template <class Cell, class S, class X, class H_>
INLINE void project(const InputProjection& input, int64_t d, int64_t H, int64_t begin, int64_t end,
                    const Panels& panels, const Steps& steps, const X& x_of, const H_* h_of, Accumulate<S>* z) {
  using A = Accumulate<S>;
  using P = Multiplied<S>;
  using V = Vec<A>;
  constexpr int L = kLanes<A>, kGates = Cell::kGates, kValues = Cell::kValues;
  constexpr int kUnits = unit_vectors(kGates), kVectors = kGates * kUnits;
  const int64_t I = input.I, padded = round_up(H, kUnits * L), K_ih = packed_rows<S>(I), K_hh = packed_rows<S>(H);
  const int64_t k_ih = kStep<S> == 1 ? I : K_ih, k_hh = kStep<S> == 1 ? H : K_hh, width = h_of ? kValues : kGates;
  for (int64_t block = begin; block < end; ++block) {
    V bias[kVectors], bias_hh[kVectors];  // of the input parts, of the recurrent parts
    for (int n = 0; n < kVectors; ++n) {
      const int64_t unit = (block * kUnits + n / kGates) * L, at = n % kGates * H + unit;
      bias[n] = V{} + load_bias<S>(input.bias_ih[d], at, H - unit);
      bias_hh[n] = load_bias<S>(input.bias_hh[d], at, H - unit);
      if (!is_apart<Cell>(n % kGates)) bias[n] += bias_hh[n];
    }
    const Factor<S>* panel_ih = static_cast<const Factor<S>*>(panels.ih) + block * K_ih * kVectors * L * kPlanes<S>;
    const Factor<S>* panel_hh = static_cast<const Factor<S>*>(panels.hh) + block * K_hh * kVectors * L * kPlanes<S>;
    Cursor cursor(steps);
    for (int64_t k = 0; k < steps.total; k += kTileRows<S>) {
      const int64_t rows = minimum(steps.total - k, kTileRows<S>);
      const Factor<S>*x[kTileRows<S>], *h[kTileRows<S>];
      V sums[kTileRows<S>][kVectors], parts[kTileRows<S>][kVectors];
      for (int m = 0; m < (kAmx<S> ? kTileRows<S> : rows); ++m) {
        x[m] = x_of(cursor, k + m);
        if (h_of) h[m] = (*h_of)(cursor, k + m);
        cursor.next();
        for (int n = 0; n < kVectors; ++n) sums[m][n] = bias[n];
      }
      multiply_rows<P, kVectors>(sums[0], rows, x, panel_ih, k_ih, k_ih);
      if (h_of) {
        for (int m = 0; m < rows; ++m)
          for (int g = 0; g < kGates; ++g) {
            if (!is_apart<Cell>(g)) continue;
            parts[m][g] = sums[m][g];
            sums[m][g] = bias_hh[g];
          }
        multiply_rows<P, kVectors>(sums[0], rows, h, panel_hh, k_hh, k_hh);
      }
      for (int m = 0; m < rows; ++m) {
        A* to = z + ((k + m) * padded + block * kUnits * L) * width;
        if (h_of) {
          V values[kValues];
          place_parts<Cell>(values, [&](int g) INLINE_LAMBDA { return parts[m][g]; }, sums[m]);
          Cell::template activate<Math<S>>(values);
          BIRNN_UNROLL
          for (int v = 0; v < kValues; ++v) store_vector(to + v * L, values[v]);
        } else {
          BIRNN_UNROLL
          for (int n = 0; n < kVectors; ++n) store_vector(to + n * L, sums[m][n]);
        }
      }
    }
  }
}

// The distance between neighbouring rows of n factors (and planes of a split type): whole vectors and whole kSteps.
template <class S>
INLINE int64_t factor_row(int64_t n) {
  return round_up(round_up(n, kLanes<Accumulate<S>>), kStep<S>);
}

// Converts the rows of some steps to factors, [step][plane][factor_row(n)], with zeros beyond n and in the last tile.
template <class S, class Row>
INLINE void gather_rows(const Steps& steps, int64_t n, const Row& row_of, Factor<S>* to) {
  using A = Accumulate<S>;
  const int64_t K = factor_row<S>(n);
  Cursor cursor(steps);
  for (int64_t k = 0; k < round_up(steps.total, kTileRows<S>); ++k, to += kPlanes<S> * K) {
    const S* row = k < steps.total ? row_of(cursor) : nullptr;
    for (int64_t j = 0; j < K; j += kLanes<A>)
      store_row<S>(to + j, K, row && j < n ? load<A>(row + j, n - j) : Vec<A>{});
    if (row) cursor.next();
  }
}

// Packing weights costs too much for few rows (see kMostUnpackedRows). Then the roles are exchanged: W_ih's rows stay
// as they are, and this transposes x into panels [tile of rows][k: I][vector of the tile][lane].
template <class S, class X>
INLINE void transpose_x(int64_t I, const Steps& steps, const X& x_of, S* xt) {
  constexpr int L = kLanes<S>;
  const int64_t vectors = divide_up(steps.total, L);
  Cursor cursor(steps);
  for (int64_t v = 0, N = 0; v < vectors; v += N) {
    N = tile_vectors(v, vectors);
    for (int64_t n = 0; n < N; ++n) {
      const S* rows[L];
      for (int l = 0; l < L; ++l) {
        rows[l] = (v + n) * L + l < steps.total ? x_of(cursor) : nullptr;
        if (rows[l]) cursor.next();
      }
      for (int64_t k = 0; k < I; k += L) {
        Vec<S> x[L];
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) x[l] = rows[l] ? load<S>(rows[l] + k, I - k) : Vec<S>{};
        transpose<S>(x);
        for (int64_t j = 0; j < minimum(L, I - k); ++j) store_vector(xt + (v * I + (k + j) * N + n) * L, x[j]);
      }
    }
  }
}

template <class S>
void project_unpacked(CellKind cell, const InputProjection& input, int64_t d, int64_t H, int64_t begin, int64_t end,
                      int64_t rows, const S* xt, S* z) {
  using V = Vec<S>;
  constexpr int L = kLanes<S>, kUnits = kRows < L ? kRows : L;
  const int64_t I = input.I, vectors = divide_up(rows, L), gates = gates_of(cell);
  const int64_t units = unit_vectors(gates), padded = round_up(H, units * L);
  const S* w_ih = static_cast<const S*>(input.w_ih[d]);
  const S* bias_ih = static_cast<const S*>(input.bias_ih[d]);
  const S* bias_hh = static_cast<const S*>(input.bias_hh[d]);
  for (int64_t block = begin * units; block < end * units; ++block)
    for (int g = 0; g < gates; ++g)
      for (int64_t v = 0, count; v < vectors; v += count) {
        count = tile_vectors(v, vectors);
        with_vectors(count, [&]<int N>() INLINE_LAMBDA {
          V sums[N][L] = {};
          const bool adds_hh = bias_hh && recurrent_value_of(cell, g) == g;
          const int64_t first = g * H + block * L, left = minimum(L, H - block * L);
          for (int64_t l = 0; l < left; l += kUnits)
            with_at_most<kUnits>(left - l, [&]<int M>(int) INLINE_LAMBDA {
              const S* w[M];
              V acc[M][N];
              for (int m = 0; m < M; ++m) {
                const int64_t unit = first + l + m;
                w[m] = w_ih + unit * I;
                const S bias = (bias_ih ? bias_ih[unit] : S(0)) + (adds_hh ? bias_hh[unit] : S(0));
                for (int n = 0; n < N; ++n) acc[m][n] = V{} + bias;
              }
              multiply<S>(acc, w, xt + v * I * L, I, I);
              for (int m = 0; m < M; ++m)
                for (int n = 0; n < N; ++n) sums[n][l + m] = acc[m][n];
            });
          for (int n = 0; n < N; ++n) {
            transpose<S>(sums[n]);
            for (int64_t row = (v + n) * L, l = 0; l < minimum(L, rows - row); ++l)
              store_vector(z + ((row + l) * padded + block * L) * gates + g * L, sums[n][l]);
          }
        });
      }
}

template <class Cell, class S>
struct Forward {
  using A = Accumulate<S>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>, kGates = Cell::kGates, kValues = Cell::kValues;
  static constexpr int kUnits = unit_vectors(kGates), kVectors = kGates * kUnits, kWidth = kUnits * L;  // of a block

  const ForwardParams& p;
  const Chain& chain;
  const Panels& panels;
  const Member& member;
  const StepOrder<int64_t> order{chain.direction, p.T};
  const int64_t d = chain.direction, H = p.H, B = p.B, D = p.D, blocks = divide_up(H, kWidth);
  const int64_t begin = member.index * blocks / member.count, end = (member.index + 1) * blocks / member.count;
  const int64_t padded = blocks * kWidth, own_units = minimum(H, end* kWidth);
  const int64_t plane = round_up(padded, kStep<S>), row_size = plane * kPlanes<S>;
  A* c;               // [row][padded]
  A* z;               // [step][block][gate][lane]: the projected steps
  Factor<S>* x_rows;  // x of the projected steps as factors, for a converted type
  A* xt;              // x transposed, if W_ih is not packed
  Factor<S>* h[2];    // [row][plane] of the previous and of this step, alternating

  Forward(const ForwardParams& params, const Chain& ch, const Panels& packed, int64_t steps_at_once, const Member& who)
      : p(params), chain(ch), panels(packed), member(who) {
    const int64_t steps = p.gates_x ? 0 : steps_at_once, rows = round_up(chain.count, kTileRows<S>);
    c = static_cast<A*>(chain.scratch);
    z = c + chain.count * padded;
    xt = z + kGates * chain.count * steps * padded;
    h[0] = reinterpret_cast<Factor<S>*>(xt + transposed_values(p, chain.count, steps));
    h[1] = h[0] + rows * row_size;
    x_rows = h[1] + rows * row_size;
  }

  static int64_t transposed_values(const ForwardParams& p, int64_t rows, int64_t steps) {
    return p.T * p.B <= kMostUnpackedRows ? p.input.I * round_up(rows * steps, L) : 0;
  }

  static int64_t scratch(const ForwardParams& p, int64_t rows, int64_t steps) {
    const int64_t padded = round_up(p.H, kWidth);
    if (p.gates_x) steps = 0;
    return ((rows + kGates * rows * steps) * padded + transposed_values(p, rows, steps)) * sizeof(A) +
           2 * round_up(rows, kTileRows<S>) * round_up(padded, kStep<S>) * kPlanes<S> * sizeof(Factor<S>) +
           (kConverted<S>
                ? round_up(rows * steps, kTileRows<S>) * factor_row<S>(p.input.I) * kPlanes<S> * sizeof(Factor<S>)
                : 0);
  }

  // Prefetches the next tile's gates_x, so that it arrives during this tile's product. Its rows lie D * gates * H
  // values apart, where the hardware prefetcher does not look.
  INLINE void prefetch_gates_x(int64_t t, int64_t first, int64_t block) {
    if (first >= chain.count) {
      first = 0;
      if (++block >= end) {
        block = begin;
        t = order.after(t);
        if (t < 0 || t >= p.T) return;
      }
    }
    for (int64_t r = first; r < minimum(first + kTileRows<S>, chain.count); ++r) {
      const S* gates_x =
          static_cast<const S*>(p.gates_x) + ((t * B + chain.rows[r]) * D + d) * kGates * H + block * kWidth;
      for (int g = 0; g < kGates; ++g) __builtin_prefetch(gates_x + g * H);
    }
  }

  // Computes one step of some rows from `first` on, for the units of one block. z_rows has the step's projections, or
  // is null.
  INLINE void tile(int64_t rows, int64_t t, int64_t s, int64_t first, int64_t block, const A* z_rows, bool product) {
    const int64_t unit = block * kWidth, left = H - unit;
    const Factor<S>* h_prev = h[s & 1] + first * row_size;
    Factor<S>* h_next = h[(s + 1) & 1] + first * row_size + unit;
    A* c_rows = c + first * padded + unit;

    V sums[kTileRows<S>][kVectors];
    int64_t row[kTileRows<S>];  // index of (t, b, d), in units of a row of y
    const auto input = [&](int m, int n) INLINE_LAMBDA {
      const int64_t at = (row[m] * kGates + n % kGates) * H + unit + n / kGates * L;
      return z_rows ? load_vector(z_rows + ((first + m) * padded + unit) * kGates + n * L)
                    : load<A>(static_cast<const S*>(p.gates_x) + at, left - n / kGates * L);
    };
    const auto bias = [&](int n) INLINE_LAMBDA {
      return load_bias<S>(p.input.bias_hh[d], n % kGates * H + unit + n / kGates * L, left - n / kGates * L);
    };
    for (int m = 0; m < rows; ++m) {
      row[m] = (t * B + chain.rows[first + m]) * D + d;
      for (int n = 0; n < kVectors; ++n)
        if (is_apart<Cell>(n % kGates))
          sums[m][n] = bias(n);
        else if (z_rows)  // has both biases
          sums[m][n] = input(m, n);
        else
          sums[m][n] = input(m, n) + bias(n);
    }
    if (!z_rows) prefetch_gates_x(t, first + rows, block);
    if (product) {
      const Factor<S>* a[kTileRows<S>];
      for (int m = 0; m < (kAmx<S> ? kTileRows<S> : rows); ++m) a[m] = h_prev + m * row_size;
      const int64_t K = packed_rows<S>(H), k = kStep<S> == 1 ? H : K;
      multiply_rows<Multiplied<S>, kVectors>(
          sums[0], rows, a, static_cast<const Factor<S>*>(panels.hh) + block * K * kVectors * L * kPlanes<S>, k, k);
    }
    for (int k = 0; k < rows * kUnits; ++k) {
      const int m = k / kUnits, first_vector = k % kUnits * kGates;
      const int64_t at = k % kUnits * L, n = left - at, of_y = row[m] * H + unit + at;
      V values[kValues], c_row = load_vector(c_rows + m * padded + at);
      place_parts<Cell>(
          values, [&](int g) INLINE_LAMBDA { return input(m, first_vector + g); }, sums[m] + first_vector);
      const V h_row = Cell::template forward<Math<S>>(values, c_row);
      store_vector(c_rows + m * padded + at, c_row);
      store_row<S>(h_next + m * row_size + at, plane, h_row);
      store<A>(static_cast<S*>(p.y) + of_y, h_row, n);
      if (p.gates) {
        S* saved = static_cast<S*>(p.gates) + row[m] * kValues * H + unit + at;
        BIRNN_UNROLL
        for (int v = 0; v < kValues; ++v) store<A>(saved + v * H, values[v], n);
      }
      if (p.cells) store<A>(static_cast<A*>(p.cells) + of_y, c_row, n);
    }
  }

  // Puts the initial state into both buffers of h, as a sequence may start at any iteration in the reverse direction.
  void start() {
    if (kStep<S> > 1 && member.index == 0) {  // products also read the padding of rows and columns
      __builtin_memset(h[0], 0, 2 * round_up(chain.count, kTileRows<S>) * row_size * sizeof(Factor<S>));
    }
    if (kStep<S> > 1) member.barrier->wait(member.count);
    const S* h0 = static_cast<const S*>(p.h0);
    const S* c0 = static_cast<const S*>(p.c0);
    for (int64_t r = 0; r < chain.count; ++r) {
      const int64_t state = (d * B + chain.rows[r]) * H;
      for (int64_t unit = begin * kWidth; unit < end * kWidth; unit += L) {
        const V h_row = h0 ? load<A>(h0 + state + unit, H - unit) : V{};
        for (Factor<S>* buffer : h) store_row<S>(buffer + r * row_size + unit, plane, h_row);
        store_vector(c + r * padded + unit, c0 ? load<A>(c0 + state + unit, H - unit) : V{});
      }
    }
  }

  // Stores the final state. A row's last iteration wrote h into the other buffer.
  void finish() {
    const int64_t unit0 = begin * kWidth, units = own_units - unit0;
    for (int64_t r = 0; r < chain.count && units > 0; ++r) {
      const int64_t b = chain.rows[r], length = length_of(p.lengths, b, p.T);
      const int64_t last = order.last(length), iteration = order.forward(last);
      for (int64_t unit = unit0; unit < own_units; unit += L) {
        V h_row = load_aligned<A>(h[(iteration + 1) & 1] + r * row_size + unit);
        if (kSplit<S> && length > 0)  // y is exact, while factors have lost some bits
          h_row = load<A>(static_cast<S*>(p.y) + ((last * B + b) * D + d) * H + unit, H - unit);
        else if (kSplit<S> && p.h0)
          h_row = load<A>(static_cast<const S*>(p.h0) + (d * B + b) * H + unit, H - unit);
        store<A>(static_cast<S*>(p.h_n) + (d * B + b) * H + unit, h_row, H - unit);
        store<A>(static_cast<S*>(p.c_n) + (d * B + b) * H + unit, load_vector(c + r * padded + unit), H - unit);
      }
      for (int64_t t = length; t < p.T; ++t) {
        const int64_t row = (t * B + b) * D + d;
        __builtin_memset(static_cast<S*>(p.y) + row * H + unit0, 0, units * sizeof(S));
        if (p.gates)
          for (int v = 0; v < kValues; ++v)
            __builtin_memset(static_cast<S*>(p.gates) + (row * kValues + v) * H + unit0, 0, units * sizeof(S));
        if (p.cells) __builtin_memset(static_cast<A*>(p.cells) + row * H + unit0, 0, units * sizeof(A));
      }
    }
  }

  void run(int64_t steps_at_once) {
    start();
    member.barrier->wait(member.count);
    for (int64_t s0 = 0; s0 < p.T; s0 += steps_at_once) {
      const Steps steps(p, chain, s0, minimum(p.T, s0 + steps_at_once), true);
      const InputProjection& in = p.input;
      const auto x_of = [&](const Cursor& at) INLINE_LAMBDA {
        return static_cast<const S*>(in.x) + order.forward(at.s) * in.stride_t + chain.rows[at.row] * in.stride_b;
      };
      const auto factors_of = [&](const Cursor& at, int64_t k) INLINE_LAMBDA -> const Factor<S>* {
        if constexpr (kConverted<S>)
          return x_rows + k * factor_row<S>(in.I) * kPlanes<S>;
        else
          return x_of(at);
      };
      if (!p.gates_x && panels.ih) {
        if constexpr (kConverted<S>) {
          if (member.index == 0) gather_rows<S>(steps, in.I, x_of, x_rows);
          member.barrier->wait(member.count);
        }
        project<Cell, S>(in, d, H, begin, end, panels, steps, factors_of, static_cast<decltype(&factors_of)>(nullptr),
                         z);
      } else if (!p.gates_x) {
        if constexpr (!kConverted<S>) {
          if (member.index == 0) transpose_x<S>(in.I, steps, x_of, xt);
          member.barrier->wait(member.count);
          project_unpacked<S>(Cell::kKind, in, d, H, begin, end, steps.total, xt, z);
        }
      }
      for (int64_t s = s0; s < steps.end; ++s) {
        const int64_t t = order.forward(s), rows = steps.rows[s - s0];
        const A* z_rows = p.gates_x ? nullptr : z + steps.first[s - s0] * kGates * padded;
        const bool product = s > 0 || p.h0;
        for (int64_t block = begin; block < end; ++block)
          for (int64_t first = 0; first < rows; first += kTileRows<S>)
            tile(minimum(rows - first, kTileRows<S>), t, s, first, block, z_rows, product);
        member.barrier->wait(member.count);
      }
    }
    finish();
  }
};
