// The backward pass: all steps of a layer in one launch. A step, of a warp:
//   1. what its cells need of memory is taken from the ring, which a step far ahead then fills,
//   2. parts of W_hh^T dz of the step before are waited for, and added: the gradient of h_t from step t + 1,
//   3. the cell backwards; dz goes to shared memory: the barrier of a step,
//   4. the CTA's dz is multiplied with its rows of W_hh; parts of sums go to the owners of the units,
//   5. dz goes to memory, which nobody waits for.
#pragma once

#include "exchange.cuh"
#include "shared.cuh"

namespace birnn::cuda {

template <Exchange exchange, CellKind cell, int eights, int turns, int cells, int splits, int steps, int tiles,
          int resident, int warps, int stages, int ctas, bool ahead>
struct BackwardTraits {  // BackwardRow, as a type
  static constexpr BackwardRow kRow{cell,  eights,   turns, cells,  splits, steps,
                                    tiles, resident, warps, stages, ctas,   ahead};
  static constexpr int kOfUnit = k_of_unit(cell);
  using Cell = CellOf<cell>;
  static constexpr Exchange kExchange = exchange;
  static constexpr int kEights = eights, kTurns = turns, kCells = cells, kSplits = splits, kSteps = steps,
                       kTilesOfWarp = tiles;
  static constexpr int kResident = resident, kInMemory = kRow.memory_fragments();
  static constexpr int kWarps = warps, kStages = stages, kCtas = ctas, kSequences = kRow.sequences();
  static constexpr bool kAhead = ahead;
  template <class S>
  static constexpr int kUnits = kRow.units(sizeof(S));
  template <class S>
  static constexpr int kTiles = kRow.own_tiles(sizeof(S));
  template <class S>
  static constexpr int kStageBytes = kRow.stage_bytes(sizeof(S));
};

// Where a lane's cells are: cell i of a warp is one of four parts of a tile and an eight, all 16 units of two
// sequences.
template <class S, class Row>
struct BackwardPlace : Place {
  static_assert(Row::kWarps * kWarp * Row::kCells == Row::template kUnits<S> * Row::kSequences, "a cell a lane");
  int octet, row;  // lane = octet * 8 + row
  int odd, high;   // bits of the octet

  __device__ explicit BackwardPlace(const PersistentBackward& p)
      : Place(p), octet(lane / 8), row(lane % 8), odd(octet & 1), high(octet & 2) {}
  __device__ int part(int i) const { return warp + i * Row::kWarps; }
  __device__ int pair(int i) const { return part(i) % 4; }
  __device__ int eight(int i) const { return part(i) / 4 % Row::kEights; }
  __device__ int tile(int i) const { return part(i) / 4 / Row::kEights; }
  __device__ int unit(int i) const { return tile(i) * kTile + octet / 2 * 8 + row; }  // of the CTA's
  __device__ int sequence(int i) const { return eight(i) * kEight + pair(i) * 2 + octet % 2; }
};

// W_hh^T as fragments of mma: rows g and g + 8 of a tile of the layer's units; of a step of the sum, the lane's k,
// which dz_offset() tells.
template <class S, class Row>
struct BackwardWeights {
  static constexpr int kTiles = Row::template kTiles<S>, kUnits = Row::template kUnits<S>;
  static constexpr int kFragments = Row::kTilesOfWarp * Row::kSteps;
  static constexpr int kStride = Row::kWarps / Row::kSplits;  // from a warp's tile to its next
  // Tiles whose sums are made at once, with one read of a step's columns; a single one has two sums, for mma's latency.
  static constexpr int kMost = (sizeof(S) == 4 ? 2 : 4) / (Row::kEights > 1 ? 2 : 1);
  static constexpr int kAtOnce = Row::kTilesOfWarp < kMost ? Row::kTilesOfWarp : kMost;
  static constexpr int kChains = sizeof(S) == 2 && kAtOnce == 1 && Row::kEights == 1 ? 2 : 1;
  static_assert(Row::kTilesOfWarp % kAtOnce == 0 || Row::kTilesOfWarp < kMost, "tiles");
  static_assert(kStride % kTiles == 0, "all of a warp's tiles have the same place among their owner's");

  Fragment<S, Row::kAhead> resident[Row::kResident];
  const uint4* memory;
  int split, first, tiles;  // of the sum; of the layer's tiles, the warp's first, and how many
  int column;               // where the lane finds column g in the first step

  // Fragments in shared memory are spread among the others: the first of them is followed by kFragments / kInMemory - 1
  // that are in registers, and so on.
  static constexpr __device__ int in_memory_before(int f) { return f * Row::kInMemory / kFragments; }
  static constexpr __device__ bool is_in_memory(int f) { return in_memory_before(f + 1) > in_memory_before(f); }

  __device__ BackwardWeights(const PersistentBackward& p, const BackwardPlace<S, Row>& place, char* shared)
      : split(place.warp % Row::kSplits), first(place.warp / Row::kSplits) {
    tiles = kept((p.plan.tiles - first + kStride - 1) / kStride);
    uint4* const to = reinterpret_cast<uint4*>(shared) + place.warp * Row::kInMemory * kWarp + place.lane;
    memory = to;
#pragma unroll 1
    for (int f = 0; f < kFragments; ++f)
      if (is_in_memory(f)) to[in_memory_before(f) * kWarp] = load(p, place, f);
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
      if (!is_in_memory(f)) resident[f - in_memory_before(f)] = load(p, place, f);
    static_assert(Row::kSplits == 1 || Row::kSteps % (Row::kOfUnit == 4 ? 4 : 2) == 0, "dz_swap() goes by so many");
    column = kept(p.plan.dz + split * Row::kSteps * Row::kSequences * 32 + place.g * 32 + place.t * 8);
  }

  __device__ uint4 load(const PersistentBackward& p, const BackwardPlace<S, Row>& place, int f) const {
    constexpr int kOfUnit = Row::kOfUnit, kOfStep = kMmaDepth<S> / kOfUnit;  // units
    constexpr int kStepsOfGate = kUnits / kOfStep;                           // where each gate has its own
    const int tile = first + f / Row::kSteps * kStride, H = int(p.H);
    const int step = split * Row::kSteps + f % Row::kSteps, k = place.t * (kMmaDepth<S> / 4);
    const int unit = place.rank * kUnits + step % kStepsOfGate * kOfStep + k / kOfUnit;
    const int gate = step / kStepsOfGate + k % kOfUnit;
    uint32_t words[4] = {0, 0, 0, 0};
    if (unit < H && tile < p.plan.tiles) {
#pragma unroll 1
      for (int row = 0; row < 2; ++row) {
        const int column = tile * kTile + place.g + row * 8;
        const S* const from = static_cast<const S*>(p.w_hh[place.d]) + (int64_t(gate) * H + unit) * H + column;
        if (column >= H) continue;
        const auto bits = [&](int e) -> uint32_t {  // of the lane's k + e: another gate, or another unit
          if (kOfUnit == 1 && unit + e >= H) return 0;
          return bits_of(convert(factor<S>(convert(from[int64_t(e) * H * (kOfUnit == 1 ? 1 : H)], 0.f)), S()));
        };
        const uint32_t a = sizeof(S) == 2 ? bits(0) | bits(1) << 16 : bits(0);
        const uint32_t b = sizeof(S) == 2 ? bits(2) | bits(3) << 16 : bits(1);
        if (row == 0)
          words[0] = a, words[2] = b;
        else
          words[1] = a, words[3] = b;
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }

  __device__ Column<S> column_of(const char* dz, int k, int n) const {
    return Column<S>(dz + (column ^ dz_swap(Row::kOfUnit, k, sizeof(S)) * 32) +
                     (k * Row::kSequences + n * kEight) * 32);
  }

  __device__ Fragment<S, Row::kAhead> fragment(int f) const {
    if (!is_in_memory(f)) return resident[f - in_memory_before(f)];
    Fragment<S, Row::kAhead> w;
    w = memory[in_memory_before(f) * kWarp];
    return w;
  }

  // W_hh^T dz of all the warp's tiles, each to its owner.
  template <class Exchange>
  __device__ void multiply(const char* dz, Exchange& exchange, bool full_float32) const {
#pragma unroll
    for (int i0 = 0; i0 < Row::kTilesOfWarp; i0 += kAtOnce) {
      if (i0 >= tiles) break;
      asm volatile("" ::: "memory");  // columns are read anew: kept over all tiles they would take the registers
      Sums<S> sums[kAtOnce][kChains][Row::kEights];
#pragma unroll
      for (int k = 0; k < Row::kSteps; ++k) {
#pragma unroll
        for (int n = 0; n < Row::kEights; ++n) {
          const Column<S> b = column_of(dz, k, n);
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i)
            cuda::multiply(sums[i][k % kChains][n], fragment((i0 + i) * Row::kSteps + k), b, full_float32);
        }
        if (k % kRun == kRun - 1)
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
            for (int n = 0; n < Row::kEights; ++n) sums[i][0][n].end_run();
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i0 + i >= tiles) break;
#pragma unroll
        for (int n = 0; n < Row::kEights; ++n) {
          auto& v = sums[i][0][n].v;
          sums[i][0][n].finish();
          if constexpr (kChains == 2)
#pragma unroll
            for (int e = 0; e < 4; ++e) v[e] += sums[i][1][n].v[e];
          exchange.send((i0 + i) * (kStride / kTiles), n, float4{v[0], v[1], v[2], v[3]});
        }
      }
    }
  }
};

// What comes from memory for a step of a warp's cells: a stage is [cell]{gates [value], dy, cells}, each [two
// sequences][16 units]. The cells are those before the step, in the direction's order.
template <class S, class Row>
struct BackwardRing : Ring<S, Row> {
  using Base = Ring<S, Row>;
  using State = SavedState<typename Row::Cell, S>;
  static constexpr int kCell = Row::template kStageBytes<S> / Row::kCells;  // bytes
  static constexpr int kValues = Row::Cell::kValues, kDy = 2 * kTile * int(sizeof(S)), kGates = kValues * kDy;
  int at;  // the lane's first value, and its cell before the step
  int cell_at;

  __device__ BackwardRing(const PersistentBackward& p, const BackwardPlace<S, Row>& place, char* shared, int turn,
                          int64_t b0)
      : Base(shared, p.plan.ring, p.plan.warps, turn, place, p.access) {
    const int value = place.octet % 2 * kTile + place.octet / 2 * 8 + place.row;
    at = kept(this->first + value * int(sizeof(S)));
    cell_at = kept(this->first + kGates + kDy + value * int(sizeof(State)));
    const StepOrder order{int64_t(place.d), p.T};
    const int64_t t0 = order.backward(0), dt = order.before(t0) - t0;
#pragma unroll
    for (int j = 0; j < Base::kOfLane; ++j) {
      const int id = Base::id(place.lane, j), i = id * kPiece / kCell, in = id * kPiece % kCell;
      const bool is_gate = in < kGates, is_cell = in >= kGates + kDy;
      const int size = is_cell ? int(sizeof(State)) : int(sizeof(S));
      const int value = (is_gate ? in : is_cell ? in - kGates - kDy : in - kGates) / size;
      const int64_t b = b0 + place.eight(i) * kEight + place.pair(i) * 2 + value / kTile % 2;
      const int64_t unit = place.rank * Row::template kUnits<S> + place.tile(i) * kTile + value % kTile;
      const char* rows;
      int64_t first, step;  // values
      if (is_gate) {
        rows = static_cast<const char*>(p.gates);
        first = (((t0 * p.B + b) * p.D + place.d) * kValues + value / (2 * kTile)) * p.H;
        step = p.B * p.D * kValues * p.H;
      } else if (is_cell) {
        rows = static_cast<const char*>(p.cells);
        first = (((t0 + dt) * p.B + b) * p.D + place.d) * p.H;
        step = p.B * p.D * p.H;
      } else {
        rows = static_cast<const char*>(p.dy);
        first = t0 * p.dy_stride_t + b * p.dy_stride_b + place.d * p.H;
        step = p.dy_stride_t;
      }
      const bool exists = id < Base::kPieces && b < p.B && (is_gate || is_cell || p.dy);
      this->set(j, rows + (first + unit) * size, kept(dt * step * size), exists ? (p.H - unit) * size : 0,
                int(p.T) - is_cell);
    }
    this->clear();
  }

  struct Input {
    float gates[kValues];
    float dy, c_before;
  };
  __device__ void take(Input (&x)[Row::kCells], int s) {
    const int stage = this->acquire(s);
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i) {
      const S* const values = reinterpret_cast<const S*>(this->memory + (at + stage + i * kCell));
      const auto value = [&](int plane) { return convert(values[plane * 2 * kTile], 0.f); };
#pragma unroll
      for (int v = 0; v < kValues; ++v) x[i].gates[v] = value(v);
      x[i].dy = value(kValues);
      x[i].c_before = load<State>(this->memory + (cell_at + stage + i * kCell), 0);
    }
    this->release(s, stage);
  }
};

// The gradients of a cell's values; an LSTM's are as products read them.
template <class S>
struct alignas(4 * sizeof(S)) Packed {
  S values[4];
};

// The cells of a lane: their gradients, and where these go.
template <class S, class Row>
struct BackwardCells {
  using Cell = typename Row::Cell;
  static constexpr int N = Row::kCells, kGates = Cell::kGates;
  static_assert(Cell::kValues <= 4 && Cell::kValues - kGates <= 1, "one tensor has the gradients of the values beyond");
  float c[N], dc[N];  // c_t of this step; the gradient of it that comes from step t + 1
  Activity activity[N];
  int there[N];     // whether the cell exists: neither its sequence nor its unit is padding
  Packed<S> dz[N];  // of the last step that the sequence had; kept in iterations without one, so that the last product
                    // makes dh0 even if the sequence ended before
  int dz_at[N];
  char *d_gates_x[N], *d_q[N];
  int64_t stride[2], gate[kGates];  // bytes of each from step to step; where in a row of d_gates_x each gate begins

  __device__ BackwardCells(const PersistentBackward& p, const BackwardPlace<S, Row>& place, int64_t b0) {
    const StepOrder order{int64_t(place.d), p.T};
    const int64_t t0 = order.backward(0);
    const int64_t row = (order.before(t0) - t0) * p.B * p.D * p.H * int(sizeof(S));
    stride[0] = kept(row * kGates), stride[1] = Cell::kValues > kGates ? kept(row) : 0;
#pragma unroll
    for (int k = 0; k < kGates; ++k)
      gate[k] = k == 0 || Row::kWarps > 8 ? k * p.H * int(sizeof(S)) : kept(k * p.H * int(sizeof(S)));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t b = b0 + place.sequence(i);
      const int unit = place.rank * Row::template kUnits<S> + place.unit(i), length = length_of(p, b, unit);
      activity[i] = {kept(int(order.backward(order.last(length)))), kept(length)};
      there[i] = kept(int(b < p.B && unit < p.H));
      dc[i] = there[i] ? state_of(p, place, b0, i, p.dc_n) : 0.f;
      const int64_t at = (t0 * p.B + b) * p.D + place.d;
      c[i] = there[i] ? load<SavedState<Cell, S>>(p.cells, at * p.H + unit) : 0.f;
      d_gates_x[i] = static_cast<char*>(p.d_gates_x) + (at * kGates * p.H + unit) * int(sizeof(S));
      d_q[i] = static_cast<char*>(p.d_q) + (at * p.H + unit) * int(sizeof(S));
      dz[i] = {};
      dz_at[i] =
          kept(p.plan.dz + dz_offset(Row::kOfUnit, place.unit(i), place.sequence(i), Row::kSequences, sizeof(S)));
    }
  }

  // The value of a state (D, B, H); zeros if there is none.
  static __device__ float state_of(const PersistentBackward& p, const BackwardPlace<S, Row>& place, int64_t b0, int i,
                                   const void* states) {
    const int unit = place.rank * Row::template kUnits<S> + place.unit(i);
    return states ? load<S>(states, (place.d * p.B + b0 + place.sequence(i)) * p.H + unit) : 0.f;
  }

  // Runs cell i backwards in step s; dh: the gradient of h_t from step t + 1. What only a sequence's last and first
  // step take is read when it is: registers are for weights.
  __device__ void step(const PersistentBackward& p, const BackwardPlace<S, Row>& place, int64_t b0, int i, int s,
                       const typename BackwardRing<S, Row>::Input& x, float dh) {
    if (activity[i].at(s)) {
      dh += x.dy;
      if (s == activity[i].first) dh += state_of(p, place, b0, i, p.dh_n);
      const float c_before = activity[i].ends_at(s) ? state_of(p, place, b0, i, p.c0) : x.c_before;
      float z[Cell::kValues];
      Cell::template backward<CellMath<S>>(x.gates, c[i], c_before, dh, dc[i], z);
#pragma unroll
      for (int v = 0; v < Cell::kValues; ++v) dz[i].values[v] = convert(factor<S>(z[v]), S());
    }
    c[i] = x.c_before;
  }

  // Writes the gradients of the recurrent parts where products read them, in a buffer of dz.
  __device__ void hand_on(int i, char* buffer) const {
    if constexpr (Row::kOfUnit == 4) {
      *reinterpret_cast<Packed<S>*>(buffer + dz_at[i]) = dz[i];
    } else {
#pragma unroll
      for (int k = 0; k < kGates; ++k) {
        const int further = k * (dz_bytes(Row::kSteps * Row::kSplits, Row::kSequences) / kGates);
        *reinterpret_cast<S*>(buffer + dz_at[i] + further) = dz[i].values[Cell::recurrent_value(k)];
      }
    }
  }

  __device__ void store(int i, int s) {
    if (there[i]) {
      if (__builtin_expect(activity[i].at(s), true))
        write(i, dz[i]);
      else
        write(i, Packed<S>{});
    }
    d_gates_x[i] += stride[0], d_q[i] += stride[1];
  }
  __device__ void write(int i, const Packed<S>& dz) {
#pragma unroll
    for (int k = 0; k < kGates; ++k) *reinterpret_cast<S*>(d_gates_x[i] + gate[k]) = dz.values[Cell::input_value(k)];
    if (Cell::kValues > kGates) *reinterpret_cast<S*>(d_q[i]) = dz.values[kGates];
  }

  // A sequence without steps hands its gradient through.
  __device__ void store_states(const PersistentBackward& p, const BackwardPlace<S, Row>& place, int64_t b0, int i,
                               float dh) const {
    if (!there[i]) return;
    const int unit = place.rank * Row::template kUnits<S> + place.unit(i);
    const int64_t state = (place.d * p.B + b0 + place.sequence(i)) * p.H + unit;
    if (activity[i].length == 0) dh += state_of(p, place, b0, i, p.dh_n);
    if (Cell::kStateIsOutput)
      dh += dc[i];
    else
      static_cast<S*>(p.dc0)[state] = convert(dc[i], S());
    static_cast<S*>(p.dh0)[state] = convert(dh, S());
  }
};

// The whole sums of the lane's cells: eight neighbouring lanes add a quarter of the sources each for the four cells of
// units row and row + 8 and a pair of sequences; then each octet keeps its own cell.
template <class S, class Row, class Exchange>
__device__ void whole_sums(const Exchange& exchange, const BackwardPlace<S, Row>& place, float (&sums)[Row::kCells]) {
  float4 quarters[Row::kCells] = {};
#pragma unroll(Row::kWarps > 8 ? 2 : 4)
  for (int k = 0; k < exchange.quarter; ++k) {
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i) {
      const float4 part = exchange.part(i, 4 * k * Exchange::kSource);
      float4& sum = quarters[i];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
  }
  // octets 0 and 1 have units g, 2 and 3 units g + 8; odd ones the odd sequence
  const bool high = place.high, odd = place.odd;
#pragma unroll
  for (int i = 0; i < Row::kCells; ++i) {
    const float4 sum = quarters[i];
    float even_sequence = high ? sum.z : sum.x, odd_sequence = high ? sum.w : sum.y;
    even_sequence += __shfl_xor_sync(~0u, high ? sum.x : sum.z, 16);
    odd_sequence += __shfl_xor_sync(~0u, high ? sum.y : sum.w, 16);
    const float own = odd ? odd_sequence : even_sequence, other = odd ? even_sequence : odd_sequence;
    sums[i] = own + __shfl_xor_sync(~0u, other, 8);
  }
}

// What a group of sequences has for itself, in one pass, and its step. docs/cuda.md tells a step's data flow.
template <class S, class Row>
struct BackwardGroup {
  static constexpr int kDz = dz_bytes(Row::kSteps * Row::kSplits, Row::kSequences);
  PartsExchange<S, Row, Row::kExchange>& exchange;
  int64_t b0;  // its first sequence
  BackwardCells<S, Row> cells;
  BackwardRing<S, Row> ring;

  __device__ BackwardGroup(const PersistentBackward& p, const BackwardPlace<S, Row>& place, char* memory, int turn,
                           int64_t b0, PartsExchange<S, Row, Row::kExchange>& exchange)
      : exchange(exchange),
        b0(b0 + turn * Row::kSequences),
        cells(p, place, this->b0),
        ring(p, place, memory, turn, this->b0) {}

  // Two buffers of dz are enough. A warp that writes one has passed the barrier after the other was written, and before
  // that barrier all warps had multiplied this one. One group alternates between them; of two groups, each has one.
  __device__ void step(const PersistentBackward& p, const BackwardPlace<S, Row>& place,
                       const BackwardWeights<S, Row>& weights, char* memory, int turn, int s, int T) {
    const int dz = exchange.kBuffers == 1 ? 0 : (Row::kTurns == 1 ? s & 1 : turn) * kDz;  // the buffer's offset
    typename BackwardRing<S, Row>::Input x[Row::kCells];
    ring.take(x, s);
    float dh[Row::kCells] = {};
    if (s > 0) {
      exchange.wait();
      whole_sums<S, Row>(exchange, place, dh);
    }
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i) {
      cells.step(p, place, b0, i, s, x[i], dh[i]);
      cells.hand_on(i, memory + dz);
    }
#if !defined(BIRNN_WITHOUT_BARRIER)  // to see that a test would notice
    __syncthreads();
#endif
    if (s + 1 < T || p.dh0) {
      weights.multiply(memory + dz, exchange, p.full_float32);
      exchange.sent();
    }
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i) cells.store(i, s);
  }

  __device__ void store_states(const PersistentBackward& p, const BackwardPlace<S, Row>& place) {
    exchange.wait();
    float dh[Row::kCells];
    whole_sums<S, Row>(exchange, place, dh);
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i) cells.store_states(p, place, b0, i, dh[i]);
  }
};

template <class S, class Row, int... kTurn>
__device__ void run_backward(const PersistentBackward& p, std::integer_sequence<int, kTurn...>) {
  extern __shared__ __align__(128) char memory[];
  const BackwardPlace<S, Row> place(p);
  const BackwardWeights<S, Row> weights(p, place, memory);
  PartsExchange<S, Row, Row::kExchange> exchanges[] = {
      PartsExchange<S, Row, Row::kExchange>(p, place, memory, kTurn)...};
  const int T = int(p.T);
  Passes<Row> passes(p, place);
#pragma unroll
  for (int turn = 0; turn < Row::kTurns; ++turn) exchanges[turn].begin();

  do {
    BackwardGroup<S, Row> groups[] = {BackwardGroup<S, Row>(p, place, memory, kTurn, passes.b0, exchanges[kTurn])...};
    fill_rings(groups);
    for (int s = 0; s < T; ++s) {
#pragma unroll
      for (int turn = 0; turn < Row::kTurns; ++turn) groups[turn].step(p, place, weights, memory, turn, s, T);
    }
    if (p.dh0)
#pragma unroll
      for (int turn = 0; turn < Row::kTurns; ++turn) groups[turn].store_states(p, place);
    __syncthreads();  // all are done with dz
  } while (passes.next());
  exchanges[0].end();
}

template <class S, class Row>
__global__ void __launch_bounds__(Row::kWarps* kWarp, Row::kCtas)
    backward_kernel(const __grid_constant__ PersistentBackward p) {
  if constexpr (kCanRun<Row::kExchange>)
    run_backward<S, Row>(p, std::make_integer_sequence<int, Row::kTurns>());
  else
    __trap();  // not launched: persistent_resident() finds none
}

}  // namespace birnn::cuda

// The kernels of a table's rows, in the order of the rows. Each type has a file, as they take long to compile.
#define BIRNN_BACKWARD_KERNEL(cell, exchange, ...) \
  reinterpret_cast<const void*>(                   \
      birnn::cuda::backward_kernel<Scalar,         \
                                   birnn::cuda::BackwardTraits<Exchange::exchange, CellKind::cell, __VA_ARGS__>>),
#define BIRNN_BACKWARD_KERNELS(S, ROWS)                                 \
  template <>                                                           \
  const void* birnn::cuda::backward_kernel_of<S>(int row) {             \
    using Scalar = S;                                                   \
    static const void* const kernels[] = {ROWS(BIRNN_BACKWARD_KERNEL)}; \
    return kernels[row];                                                \
  }
