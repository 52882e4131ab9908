// The forward pass: all steps of a layer in one launch. A step, of a warp:
//   1. what gates_x has for its cells is taken from the ring, which a step far ahead then fills,
//   2. h_{t-1} is waited for, and multiplied with the warp's weights,
//   3. parts of sums go to the warp that has the cell (where there are splits),
//   4. the cell; h_t goes to the group, then results to memory, which nobody waits for.
#pragma once

#include "exchange.cuh"
#include "shared.cuh"

namespace birnn::cuda {

template <Exchange exchange, CellKind cell, int eights, int turns, int splits, int resident, int warps, int stages,
          int ctas, bool ahead>
struct ForwardTraits {  // ForwardRow, as a type
  static constexpr ForwardRow kRow{cell, eights, turns, splits, resident, warps, stages, ctas, ahead};
  using Cell = CellOf<cell>;
  static constexpr Exchange kExchange = exchange;
  static constexpr int kEights = eights, kTurns = turns, kSplits = splits, kResident = resident, kWarps = warps,
                       kStages = stages;
  static constexpr int kCtas = ctas, kCells = kRow.cells(), kSequences = kRow.sequences();
  static constexpr int kBlocks = kRow.blocks(), kTiles = kRow.tiles(), kColumns = 2 * eights;
  static constexpr bool kSplitsBlocks = splits > kColumns;  // a lane's cells are of one block, though a warp has two
  static constexpr bool kAhead = ahead;
  template <class S>
  static constexpr int kStageBytes = kRow.stage_bytes(sizeof(S));
};

// Where a warp's work lies: its one or two blocks of units, its split of the sum, and the cells of its lanes. A lane's
// products are those of its columns, of the first block and then of the second; every kSplits-th belongs to the warp,
// from its split on. They are in an order in which a warp's own come first, whichever its split: product n is that of
// n ^ split, as far as its bits go, as columns and blocks are exchanged. So no register is chosen at run time.
template <class S, class Row>
struct ForwardPlace : Place {
  int share, split, block;  // the warps of a share have the same blocks; block is the first of these, of the layer

  __device__ explicit ForwardPlace(const PersistentForward& p)
      : Place(p),
        share(warp / Row::kSplits),
        split(warp % Row::kSplits),
        block(rank * p.plan.blocks + share * Row::kBlocks) {}
  // The bits of the split that exchange columns, and blocks.
  __device__ int column_split() const { return Row::kSplitsBlocks ? split % Row::kColumns : split; }
  __device__ int block_split() const { return Row::kSplitsBlocks ? split / Row::kColumns : 0; }
  // The sequence, within the group, of cell i of lane t: an eight of sequences is four pairs, and lane t has pair t.
  __device__ int sequence(int i, int t) const {
    const int column = (Row::kBlocks == 1 ? i * Row::kSplits : i * Row::kSplits % Row::kColumns) + column_split();
    return column / 2 * kEight + 2 * t + column % 2;
  }
  __device__ int sequence(int i) const { return sequence(i, t); }
  __device__ int block_of(int i) const {
    return Row::kBlocks == 1 ? block : block + i * Row::kSplits / Row::kColumns + block_split();
  }
  __device__ int unit(int i) const { return block_of(i) * kBlock + g; }
  // The unit of the lane's products of a block, in their order.
  __device__ int unit_of_products(int of) const {
    return (block + (Row::kSplitsBlocks ? of ^ block_split() : of)) * kBlock + g;
  }
};

// W_hh as fragments of mma: of a step, the lane's k of rows g and g + 8 of each tile. A half of a tile is a block's
// units of one gate: with one block, an LSTM's gates i and f, then g and o; with two, of a GRU, both blocks' gate r, z,
// then n.
template <class S, class Row>
struct ForwardWeights {
  static constexpr int kTiles = Row::kTiles;
  Fragment<S, Row::kAhead> resident[Row::kResident][kTiles];
  const uint4* memory;
  int memory_steps;

  __device__ ForwardWeights(const PersistentForward& p, const ForwardPlace<S, Row>& place, char* shared)
      : memory_steps(kept(p.plan.memory_steps)) {
    uint4* const to = reinterpret_cast<uint4*>(shared) + kept(place.warp * memory_steps * kTiles * kWarp + place.lane);
    memory = to;
#pragma unroll
    for (int k = 0; k < Row::kResident; ++k)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) resident[k][tile] = load(p, place, k, tile);
#pragma unroll 1
    for (int k = 0; k < memory_steps; ++k)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        to[(k * kTiles + tile) * kWarp] = load(p, place, Row::kResident + k, tile);
  }

  static __device__ uint4 load(const PersistentForward& p, const ForwardPlace<S, Row>& place, int step, int tile) {
    const int k = (place.split * p.plan.steps + step) * kMmaDepth<S> + place.t * (kMmaDepth<S> / 4), H = int(p.H);
    const int unit = place.unit_of_products(0), second = place.unit_of_products(Row::kBlocks - 1);
    if (step >= p.plan.steps || (unit >= H && second >= H)) return {0, 0, 0, 0};
    const S* const row = static_cast<const S*>(p.w_hh[place.d]) + (int64_t(tile * 2 / Row::kBlocks) * H + unit) * H;
    const auto part = [&](int unit, const S* row) {
      return Row::kBlocks > 1 && unit >= H ? uint2{0, 0} : row_part(row, k, H, p.weights_aligned);
    };
    const uint2 a = part(unit, row), b = part(second, row + int64_t(Row::kBlocks > 1 ? second - unit : H) * H);
    return {a.x, b.x, a.y, b.y};
  }

  // sums[tile][eight] += W h. h: where the lane finds its columns of h, of even and of odd eights (see h_columns()).
  __device__ void multiply(Sums<S> (&sums)[Row::kTiles][Row::kEights], const char* const (&h)[2],
                           bool full_float32) const {
    constexpr int kStepBytes = blocks_of_step(sizeof(S)) * kBlock * int(sizeof(S)) * Row::kSequences;
    const auto column = [&](int step, int n) {
      return Column<S>(h[n % 2] + step * kStepBytes + n / 2 * 2 * kEight * kBlock * int(sizeof(S)));
    };
#pragma unroll
    for (int k = 0; k < Row::kResident; ++k) {
#pragma unroll
      for (int n = 0; n < Row::kEights; ++n) {
        const Column<S> b = column(k, n);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) cuda::multiply(sums[tile][n], resident[k][tile], b, full_float32);
      }
      if (k % kRun == kRun - 1) end_run(sums);
    }
#pragma unroll(Row::kWarps > 12 ? 1 : kRun)
    for (int k = 0; k < memory_steps; ++k) {
      Fragment<S, false> a[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) a[tile] = memory[(k * kTiles + tile) * kWarp];
#pragma unroll
      for (int n = 0; n < Row::kEights; ++n) {
        const Column<S> b = column(Row::kResident + k, n);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) cuda::multiply(sums[tile][n], a[tile], b, full_float32);
      }
      if (k % kRun == kRun - 1) end_run(sums);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int n = 0; n < Row::kEights; ++n) sums[tile][n].finish();
  }

  static __device__ void end_run(Sums<S> (&sums)[Row::kTiles][Row::kEights]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int n = 0; n < Row::kEights; ++n) sums[tile][n].end_run();
  }
};

// The biases of the lane's units: all columns of its products belong to these. Where a gate has its parts in two
// values, `input` is added to the input part.
template <class Row>
struct ForwardBiases {
  using Cell = typename Row::Cell;
  float of[Row::kBlocks][Cell::kGates], input[Row::kBlocks][Cell::kGates];

  template <class S>
  __device__ ForwardBiases(const PersistentForward& p, const ForwardPlace<S, Row>& place) {
#pragma unroll
    for (int block = 0; block < Row::kBlocks; ++block)
#pragma unroll
      for (int k = 0; k < Cell::kGates; ++k) {
        const int unit = place.unit_of_products(block);
        const auto bias = [&](const void* from) { return unit < p.H && from ? load<S>(from, k * p.H + unit) : 0.f; };
        input[block][k] = bias(p.input.bias_ih[place.d]);
        of[block][k] = bias(p.input.bias_hh[place.d]) + (is_apart<Cell>(k) ? 0 : input[block][k]);
      }
  }
};

// Parts of sums, from the warps of a share's other splits: a lane gets the gates of its own cells. Slot j of a product
// is for the split that differs from the owner's by j + 1 in its bits.
template <class Row>
struct Parts {
  using Cell = typename Row::Cell;
  static constexpr int kProducts = Row::kColumns * Row::kBlocks;  // of a lane, each with all gates of a cell
  static_assert(Cell::kGates <= 4, "those of a cell travel as 16 bytes");
  char* memory;
  int at[Row::kSplits];  // of the lane: the slots of the first product that each split owns, by its distance
  int barrier;

  __device__ Parts(char* shared, int share, int split, int lane) : memory(shared), barrier(kept(1 + share)) {
#pragma unroll
    for (int j = 0; j < Row::kSplits; ++j)
      at[j] = kept(((share * kProducts + (j ^ split)) * (Row::kSplits - 1) * kWarp + lane) * kPiece);
  }

  // The sum of a gate, of product n: see ForwardWeights.
  template <class S>
  static __device__ auto& sum(Sums<S> (&sums)[Row::kTiles][Row::kEights], int gate, int n) {
    const int half = gate * Row::kBlocks + n / Row::kColumns, column = n % Row::kColumns;
    return sums[half / 2][column / 2].v[half % 2 * 2 + column % 2];
  }

  // Sums begin with the input parts z[i] of the lane's own cells, but for those that stay apart, and the nearest other
  // split's with the biases; in the end z[i] has the whole sum of each. One barrier of the share's warps.
  template <class S>
  static __device__ void begin(Sums<S> (&sums)[Row::kTiles][Row::kEights], const float (&z)[Row::kCells][Cell::kValues],
                               const ForwardBiases<Row>& biases) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      const int i = n / Row::kSplits, distance = n % Row::kSplits, block = n / Row::kColumns;
#pragma unroll
      for (int k = 0; k < Cell::kGates; ++k) {
        float first = distance == 0 && !is_apart<Cell>(k) ? z[i][k] : 0;
        if (Row::kSplits == 1)
          first += biases.of[block][k];
        else if (distance == 1)
          first = biases.of[block][k];
        sum(sums, k, n) = first;
      }
    }
  }
  template <class S>
  __device__ void finish(float (&z)[Row::kCells][Cell::kValues], Sums<S> (&sums)[Row::kTiles][Row::kEights],
                         const ForwardBiases<Row>& biases) const {
    if constexpr (Row::kSplits > 1) {
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
        if (n % Row::kSplits == 0) continue;
        float4 part = {};
#pragma unroll
        for (int k = 0; k < Cell::kGates; ++k) (&part.x)[k] = sum(sums, k, n);
        slot(n, n % Row::kSplits - 1) = part;
      }
#if !defined(BIRNN_WITHOUT_BARRIER)  // to see that a test would notice
      asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(Row::kSplits * kWarp) : "memory");
#endif
    }
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i) {
      const int n = i * Row::kSplits;
#pragma unroll
      for (int k = 0; k < Cell::kGates; ++k) {
        if (is_apart<Cell>(k)) z[i][k] += biases.input[n / Row::kColumns][k];
        z[i][Cell::recurrent_value(k)] = sum(sums, k, n);
      }
#pragma unroll
      for (int j = 0; j < Row::kSplits - 1; ++j) {
        const float4 part = slot(n, j);
#pragma unroll
        for (int k = 0; k < Cell::kGates; ++k) z[i][Cell::recurrent_value(k)] += (&part.x)[k];
      }
    }
  }

 private:
  // Slot j of product n, which the split owns that is n % kSplits away.
  __device__ float4& slot(int n, int j) const {
    const int product = n / Row::kSplits * Row::kSplits;  // of the first split's
    return *reinterpret_cast<float4*>(memory + at[n % Row::kSplits] + (product * (Row::kSplits - 1) + j) * kFragment);
  }
};

// gates_x of a warp's cells: a stage is [cell][gate][t][8 units].
template <class S, class Row>
struct GatesRing : Ring<S, Row> {
  using Base = Ring<S, Row>;
  static constexpr int kGates = Row::Cell::kGates, kValues = Row::Cell::kValues;
  static constexpr int kHalves = kBlock * int(sizeof(S)) / kPiece;  // pieces of a block's units
  int at;                                                           // the lane's first value

  __device__ GatesRing(const PersistentForward& p, const ForwardPlace<S, Row>& place, char* shared, int turn,
                       int64_t b0)
      : Base(shared, p.plan.ring, p.plan.warps, turn, place, p.access),
        at(kept(this->first + (place.t * kBlock + place.g) * int(sizeof(S)))) {
    const StepOrder order{int64_t(place.d), p.T};
    const int64_t t0 = order.forward(0);
    const int64_t stride = kept((order.after(t0) - t0) * p.B * p.D * kGates * p.H * int(sizeof(S)));
#pragma unroll
    for (int j = 0; j < Base::kOfLane; ++j) {
      const int id = Base::id(place.lane, j), half = id % kHalves, t = id / kHalves % 4;
      const int gate = id / (4 * kHalves) % kGates, i = id / (4 * kHalves * kGates);
      const int64_t b = b0 + place.sequence(i, t), unit = place.block_of(i) * kBlock + half * (kPiece / int(sizeof(S)));
      const auto* const first =
          static_cast<const S*>(p.gates_x) + (((t0 * p.B + b) * p.D + place.d) * kGates + gate) * p.H + unit;
      this->set(j, first, stride, id < Base::kPieces && b < p.B ? (p.H - unit) * int(sizeof(S)) : 0, int(p.T));
    }
    this->clear();
  }

  // Reads step s into z, and starts to fill its stage anew.
  __device__ void take(float (&z)[Row::kCells][kValues], int s) {
    const int stage = this->acquire(s);
    const S* const values = reinterpret_cast<const S*>(this->memory + (at + stage));
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i)
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) z[i][gate] = convert(values[(i * kGates + gate) * 4 * kBlock], 0.f);
    this->release(s, stage);
  }
};

// The cells of a lane: their state, and where their results go.
template <class S, class Row>
struct ForwardCells {
  using Cell = typename Row::Cell;
  static constexpr bool kHasCells = !Cell::kStateIsOutput;  // beside y
  static constexpr int N = Row::kCells, kValues = Cell::kValues;
  static constexpr int kColumns = N / (Row::kSplitsBlocks ? 1 : Row::kBlocks);  // cells of the lane's first block
  float c[N];
  S h[N];
  Activity activity[N];
  int there[N];  // whether the cell exists: neither its sequence nor its unit is padding
  char *y[kColumns], *gates[kColumns], *cells[kColumns];  // those of the second block are 8 units further
  int64_t stride[3];                                      // bytes of y, `gates` and `cells` from step to step
  int64_t gate[kValues];                                  // where in a row of `gates` each value begins
  int saves_gates, saves_cells;

  __device__ ForwardCells(const PersistentForward& p, const ForwardPlace<S, Row>& place, int64_t b0)
      : saves_gates(kept(int(p.gates != nullptr))), saves_cells(kept(int(p.cells != nullptr))) {
#pragma unroll
    for (int k = 0; k < kValues; ++k) gate[k] = k == 0 ? 0 : kept(k * p.H * int(sizeof(S)));
    const StepOrder order{int64_t(place.d), p.T};
    const int64_t t0 = order.forward(0), row = (order.after(t0) - t0) * p.B * p.D * p.H;
    stride[0] = kept(row * int(sizeof(S)));
    stride[1] = kept(row * kValues * int(sizeof(S)));
    stride[2] = sizeof(S) == sizeof(float) || !kHasCells ? stride[0] : kept(row * int(sizeof(float)));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t b = b0 + place.sequence(i);
      const int unit = place.unit(i), length = length_of(p, b, unit);
      activity[i] = {kept(int(order.forward(order.first(length)))), kept(length)};
      there[i] = kept(int(b < p.B && unit < p.H));
      const int64_t state = (place.d * p.B + b) * p.H + unit;
      h[i] = there[i] && p.h0 ? convert(factor<S>(load<S>(p.h0, state)), S()) : convert(0.f, S());
      c[i] = there[i] && p.c0 ? load<S>(p.c0, state) : 0.f;
      if (i >= kColumns) continue;
      const int64_t at = ((t0 * p.B + b) * p.D + place.d) * p.H + unit;
      y[i] = static_cast<char*>(p.y) + at * int(sizeof(S));
      gates[i] = static_cast<char*>(p.gates) + ((at - unit) * kValues + unit) * int(sizeof(S));
      cells[i] = static_cast<char*>(p.cells) + at * int(sizeof(float));
    }
  }

  // Runs cell i in step s: z -> activations. A sequence keeps its state where it has no step, and so does padding,
  // whose state is 0: infinity times its weights of 0 must not reach others.
  __device__ void step(int i, int s, float (&z)[kValues]) {
    float next = c[i];
    const S out = convert(factor<S>(Cell::template forward<CellMath<S>>(z, next)), S());
    if (activity[i].at(s)) c[i] = next, h[i] = out;
  }

  // Results of step s, 0 where a sequence has no step; then on to the next.
  __device__ void store(int i, int s, const float (&z)[kValues]) {
    if (there[i]) {
      if (__builtin_expect(activity[i].at(s), true))
        write(i, h[i], z, c[i]);
      else
        write(i, S(), {}, 0.f);
    }
    const int j = i - (N - kColumns);
    if (j >= 0) y[j] += stride[0], gates[j] += stride[1], cells[j] += stride[2];
  }
  __device__ void write(int i, S h, const float (&z)[kValues], float c) {
    const int j = i % kColumns, further = i / kColumns * kBlock;
    reinterpret_cast<S*>(y[j])[further] = h;
    if (kHasCells && saves_cells) reinterpret_cast<float*>(cells[j])[further] = c;
    if (!saves_gates) return;
#pragma unroll
    for (int k = 0; k < kValues; ++k) reinterpret_cast<S*>(gates[j] + gate[k])[further] = convert(z[k], S());
  }

  __device__ void store_states(const PersistentForward& p, const ForwardPlace<S, Row>& place, int64_t b0) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t state = (place.d * p.B + b0 + place.sequence(i)) * p.H + place.unit(i);
      if (!there[i]) continue;
      static_cast<S*>(p.h_n)[state] = h[i];
      static_cast<S*>(p.c_n)[state] = convert(c[i], S());
    }
  }
};

// Loads all of h0 into this CTA's buffer, where the first step multiplies it.
template <class S, class Row>
__device__ void load_h0(const PersistentForward& p, int d, int64_t b0, char* buffer) {
  const int elements = p.plan.h_blocks * Row::kSequences * kBlock;
  for (int k = threadIdx.x; k < elements; k += blockDim.x) {
    const int sequence = k / kBlock % Row::kSequences, block = k / (kBlock * Row::kSequences);
    const int unit = block * kBlock + k % kBlock;
    const int64_t b = b0 + sequence;
    const bool there = p.h0 && b < p.B && unit < p.H;
    const float h = there ? factor<S>(load<S>(p.h0, (d * p.B + b) * p.H + unit)) : 0.f;
    char* const at = buffer + h_offset(block, sequence, Row::kSequences, sizeof(S));
    reinterpret_cast<S*>(at)[k % kBlock] = convert(h, S());
  }
}

// Where a lane finds, in a buffer of h, column g of the products of its split's first step: of two eights of sequences,
// which take turns. Which one is first is known where there are no more than two splits.
template <class S, class Row>
__device__ void h_columns(int (&at)[2], const ForwardPlan& plan, const ForwardPlace<S, Row>& place) {
  constexpr int kSize = sizeof(S), kBlocks = blocks_of_step(kSize), kEightBytes = kEight * kBlock * kSize;
  const int first = place.split * plan.steps * kBlocks, byte = place.t * 8, split = place.column_split();
  const int column = h_offset(first + byte / (kBlock * kSize), place.g ^ (split & 1), Row::kSequences, kSize) +
                     byte % (kBlock * kSize);
  at[0] = kept(column + (split >> 1) * kEightBytes);
  at[1] = Row::kSplits > 2 ? kept(column + (split >> 1 ^ 1) * kEightBytes) : at[0] + kEightBytes;
}

// What a group of sequences has for itself, in one pass, and its step. docs/cuda.md tells a step's data flow.
template <class S, class Row>
struct ForwardGroup {
  HExchange<S, Row, Row::kExchange>& exchange;
  Parts<Row> parts;
  int64_t b0;  // its first sequence
  ForwardCells<S, Row> cells;
  GatesRing<S, Row> ring;

  __device__ ForwardGroup(const PersistentForward& p, const ForwardPlace<S, Row>& place, char* memory, int turn,
                          int64_t b0, HExchange<S, Row, Row::kExchange>& exchange)
      : exchange(exchange),
        parts(memory + p.plan.parts + turn * parts_bytes(p.plan.blocks, Row::kEights, Row::kSplits), place.share,
              place.split, place.lane),
        b0(b0 + turn * Row::kSequences),
        cells(p, place, this->b0),
        ring(p, place, memory, turn, this->b0) {}

  __device__ void step(const PersistentForward& p, const ForwardWeights<S, Row>& weights,
                       const ForwardBiases<Row>& biases, const int (&columns)[2], int s, int T) {
    float z[Row::kCells][Row::Cell::kValues];
    ring.take(z, s);
    Sums<S> sums[Row::kTiles][Row::kEights];
    parts.begin(sums, z, biases);
    if (s > 0) exchange.wait();
    const char* const h = exchange.memory + exchange.incoming;
    weights.multiply(sums, {h + columns[0], h + columns[1]}, p.full_float32);
    parts.finish(z, sums, biases);
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i) {
      cells.step(i, s, z[i]);
      if (s + 1 < T) exchange.send(i, cells.h[i]);
    }
    if (s + 1 < T) exchange.sent();
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i) cells.store(i, s, z[i]);
  }
};

template <class S, class Row, int... kTurn>
__device__ void run_forward(const PersistentForward& p, std::integer_sequence<int, kTurn...>) {
  extern __shared__ __align__(128) char memory[];
  const ForwardPlace<S, Row> place(p);
  const ForwardWeights<S, Row> weights(p, place, memory);
  const ForwardBiases<Row> biases(p, place);
  HExchange<S, Row, Row::kExchange> exchanges[] = {HExchange<S, Row, Row::kExchange>(p, place, memory, kTurn)...};
  int columns[2];
  h_columns(columns, p.plan, place);
  const int T = int(p.T);
  Passes<Row> passes(p, place);

  do {
    ForwardGroup<S, Row> groups[] = {ForwardGroup<S, Row>(p, place, memory, kTurn, passes.b0, exchanges[kTurn])...};
    fill_rings(groups);
    __syncthreads();  // nobody uses h's buffers of the last pass any more
#pragma unroll
    for (int turn = 0; turn < Row::kTurns; ++turn)
      load_h0<S, Row>(p, place.d, groups[turn].b0, groups[turn].exchange.memory + groups[turn].exchange.incoming);
#pragma unroll
    for (int turn = 0; turn < Row::kTurns; ++turn) groups[turn].exchange.begin();
    for (int s = 0; s < T; ++s)
#pragma unroll
      for (int turn = 0; turn < Row::kTurns; ++turn) groups[turn].step(p, weights, biases, columns, s, T);
#pragma unroll
    for (int turn = 0; turn < Row::kTurns; ++turn) groups[turn].cells.store_states(p, place, groups[turn].b0);
  } while (passes.next());
  exchanges[0].end();
}

template <class S, class Row>
__global__ void __launch_bounds__(Row::kWarps* kWarp, Row::kCtas)
    forward_kernel(const __grid_constant__ PersistentForward p) {
  if constexpr (kCanRun<Row::kExchange>)
    run_forward<S, Row>(p, std::make_integer_sequence<int, Row::kTurns>());
  else
    __trap();  // not launched: persistent_resident() finds none
}

}  // namespace birnn::cuda

// The kernels of a table's rows, in the order of the rows. Each type has a file, as they take long to compile.
#define BIRNN_FORWARD_KERNEL(cell, exchange, ...) \
  reinterpret_cast<const void*>(                  \
      birnn::cuda::forward_kernel<Scalar,         \
                                  birnn::cuda::ForwardTraits<Exchange::exchange, CellKind::cell, __VA_ARGS__>>),
#define BIRNN_FORWARD_KERNELS(S, ROWS)                                 \
  template <>                                                          \
  const void* birnn::cuda::forward_kernel_of<S>(int row) {             \
    using Scalar = S;                                                  \
    static const void* const kernels[] = {ROWS(BIRNN_FORWARD_KERNEL)}; \
    return kernels[row];                                               \
  }
