// How the CTAs of a group hand h (forward) or parts of sums (backward) to each other: HExchange and PartsExchange, each
// for the three ways of Exchange. A round is what the CTAs send in one step and receive in the next. Both types have
// the same functions:
//   begin()   is called before a pass's first step; then all CTAs may be sent something
//   send()    sends a piece, and waits for nobody
//   sent()    tells that this CTA has sent all of this round
//   wait()    returns when all of the round is here, from the whole group
//   end()     is called once, before the kernel ends
// Two buffers suffice. A CTA that sends for round r + 1 has waited for round r. Everybody sent to round r after having
// read round r - 1, in whose buffer round r + 1 goes.
#pragma once

#include "../sm90/cluster.cuh"
#include "shared.cuh"

namespace birnn::cuda {

// The count of CTAs that have arrived, of a group in grid: it is in global memory, and grows by `ctas` each round.
struct Arrivals {
  unsigned* count;
  int ctas;

  __device__ Arrivals(const GridExchange& grid, int group, int ctas)
      : count(grid.arrivals + group * (kCounter / int(sizeof(unsigned)))), ctas(ctas) {}

  // Called by all threads. What they have stored before is seen by whoever waits.
  __device__ void arrive() const {
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
  }
  // Called by one thread: returns when all CTAs have arrived for this round. The first is 1.
  __device__ void wait(int round) const {
    const unsigned expected = unsigned(round) * ctas;
    const long long start = clock64();
    for (;;) {
      unsigned arrived;
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(count) : "memory");
      if (int(arrived - expected) >= 0) return;  // the difference, as the count may wrap around
      if (clock64() - start > kPatience) lost_patience();
    }
  }
};

// Two buffers take turns (not to be confused with two groups in turn): one is read while the next round fills the
// other.
struct Turns {
  int stride;                    // bytes from the first to the second
  int incoming = 0;              // offset of the one that is read
  uint32_t phases = 0xcccccccc;  // the parities to wait for, from the last bit on: 0, 0, 1, 1 and again, as each of the
                                 // two mbarriers alternates

  __device__ explicit Turns(int stride) : stride(kept(stride)) {}
  __device__ int outgoing() const { return stride - incoming; }
  __device__ void turn() { incoming = outgoing(); }
  __device__ int phase() {
    const int now = phases & 1;
    phases = phases >> 1 | phases << 31;
    return now;
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
inline __device__ void mbarriers_init(uint32_t first, int stride) {
  if (threadIdx.x == 0) {
    for (int k = 0; k < 2; ++k) mbarrier_init(first + k * stride);
    mbarrier_inits_seen_by_cluster();
  }
}
#endif

// ---- forward: h, in pieces of 16 bytes

// Lanes that share a piece: each has h of one of its units, and gather() gives all of them the whole piece.
template <class S>
constexpr int kSharers = kPiece / int(sizeof(S));

inline __device__ uint4 gather(float h, int g) {
  const uint32_t v = bits_of(h), other = __shfl_xor_sync(~0u, v, 4);
  const uint2 x = g & 1 ? uint2{other, v} : uint2{v, other};
  const uint2 y = {__shfl_xor_sync(~0u, x.x, 8), __shfl_xor_sync(~0u, x.y, 8)};
  return g & 2 ? uint4{y.x, y.y, x.x, x.y} : uint4{x.x, x.y, y.x, y.y};
}
template <class S>
__device__ uint4 gather(S h, int g) {
  const uint32_t v = bits_of(h), other = __shfl_xor_sync(~0u, v, 4);
  const uint32_t pair = __byte_perm(v, other, g & 1 ? 0x1054 : 0x5410);
  const uint32_t other_pair = __shfl_xor_sync(~0u, pair, 8);
  const uint2 x = g & 2 ? uint2{other_pair, pair} : uint2{pair, other_pair};
  const uint2 y = {__shfl_xor_sync(~0u, x.x, 16), __shfl_xor_sync(~0u, x.y, 16)};
  return g & 4 ? uint4{y.x, y.y, x.x, x.y} : uint4{x.x, x.y, y.x, y.y};
}

// What the three ways share: two buffers of h, and where in one the pieces of a lane's cells are.
template <class S, class Row>
struct HBuffers : Turns {
  char* memory;
  int bytes;  // of a buffer
  int at[Row::kCells];
  int g, sharer;  // which of its piece's lanes this one is

  template <class P>
  __device__ HBuffers(const PersistentForward& p, const P& place, char* shared, int turn)
      : Turns(h_stride(p.plan.h_blocks, Row::kSequences, sizeof(S))),
        memory(shared + p.plan.h + turn * 2 * stride),
        bytes(stride - kPiece),
        g(place.g),
        sharer(kept(place.g % kSharers<S>)) {
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i)
      at[i] = kept(h_offset(place.block_of(i), place.sequence(i), Row::kSequences, sizeof(S)) +
                   place.g / kSharers<S> * kPiece);
    for (int buffer = 0; buffer < 2; ++buffer)
      for (int k = threadIdx.x; k < bytes / kPiece; k += blockDim.x)  // padding stays 0
        reinterpret_cast<uint4*>(memory + buffer * stride)[k] = {0, 0, 0, 0};
  }
};

template <class S, class Row, Exchange kExchange>
struct HExchange;

template <class S, class Row>
struct HExchange<S, Row, Exchange::cta> : HBuffers<S, Row> {
  using HBuffers<S, Row>::HBuffers;

  __device__ void begin() { __syncthreads(); }
  __device__ void send(int i, S h) {
    const uint4 piece = gather(h, this->g);
    if (this->sharer == 0) *reinterpret_cast<uint4*>(this->memory + this->outgoing() + this->at[i]) = piece;
  }
  __device__ void sent() {}
  __device__ void wait() {
    this->turn();
#if !defined(BIRNN_WITHOUT_BARRIER)  // to see that a test would notice
    __syncthreads();
#endif
  }
  __device__ void end() {}
};

template <class S, class Row>
struct HExchange<S, Row, Exchange::cluster> : HBuffers<S, Row> {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static constexpr int kCopies = kMaxCluster / kSharers<S>;  // that a lane sends, of a piece
  // Shared addresses: of the first buffer, of its mbarrier, of the second one's. Pieces are at `at` of the second.
  uint32_t to, mbarrier, other_mbarrier;
  int ranks, expected;  // CTAs from the lane's first on (lanes of a piece share out its copies); bytes of a round

  template <class P>
  __device__ HExchange(const PersistentForward& p, const P& place, char* shared, int turn)
      : HBuffers<S, Row>(p, place, shared, turn),
        to(shared_address(this->memory)),
        mbarrier(kept(to + this->bytes)),
        other_mbarrier(kept(mbarrier + this->stride)),
        ranks(kept(p.plan.ctas - this->sharer)),
        expected(kept(h_bytes(p.plan.ctas * p.plan.blocks, Row::kSequences, sizeof(S)))) {
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i) this->at[i] = kept(this->at[i] + to + this->stride);
    mbarriers_init(mbarrier, this->stride);
    if (threadIdx.x == 0)
      for (int k = 0; k < 2; ++k) mbarrier_expect(mbarrier + k * this->stride, expected);
  }
  __device__ void begin() { cluster_barrier(); }
  __device__ void send(int i, S h) {
    const uint4 piece = gather(h, this->g);
    const uint32_t address = this->at[i] - this->incoming, counter = other_mbarrier - this->incoming;  // outgoing()
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      const int rank = this->sharer + k * kSharers<S>;
      if (k * kSharers<S> < ranks) store_async(remote(address, rank), piece, remote(counter, rank));
    }
  }
  __device__ void sent() {}
  __device__ void wait() {
    this->turn();
    const uint32_t counter = mbarrier + this->incoming;
    mbarrier_wait(counter, this->phase());
    if (threadIdx.x == 0) mbarrier_expect(counter, expected);  // of the round after next
  }
  __device__ void end() { cluster_barrier(); }  // nobody may be gone while others store to it
#endif
};

template <class S, class Row>
struct HExchange<S, Row, Exchange::grid> : HBuffers<S, Row> {
  Arrivals arrivals;
  char* grid;  // the group's two buffers, in global memory
  int filled;  // bytes of a buffer that a round fills
  uint32_t to, mbarrier;
  int round = 0;

  template <class P>
  __device__ HExchange(const PersistentForward& p, const P& place, char* shared, int turn)
      : HBuffers<S, Row>(p, place, shared, turn),
        arrivals(p.grid, place.group * Row::kTurns + turn, p.plan.ctas),
        grid(p.grid.buffers + (int64_t(place.group) * Row::kTurns + turn) * 2 * this->stride),
        filled(kept(h_bytes(p.plan.ctas * p.plan.blocks, Row::kSequences, sizeof(S)))),
        to(kept(shared_address(this->memory))),
        mbarrier(kept(to + this->bytes)) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    mbarriers_init(mbarrier, this->stride);
#endif
  }
  __device__ void begin() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    stored_before_bulk_copy();  // zeros and h0, where bulk copies will store h
#endif
    __syncthreads();
  }
  __device__ void send(int i, S h) {
    const uint4 piece = gather(h, this->g);
    if (this->sharer == 0) __stcg(reinterpret_cast<uint4*>(grid + this->outgoing() + this->at[i]), piece);
  }
  __device__ void sent() {
    arrivals.arrive();
    ++round;
  }
  __device__ void wait() {
    this->turn();
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const uint32_t counter = mbarrier + this->incoming;
    if (threadIdx.x < kWarp) {
      if (threadIdx.x == 0) {
        arrivals.wait(round);
        mbarrier_expect(counter, filled);
      }
      __syncwarp();
      constexpr int kCopiers = 8;
      const int share = filled / kCopiers;  // a multiple of 16: a block has as many pieces
      if (threadIdx.x < kCopiers) {
        acquired_for_bulk_copy();
        const int at = this->incoming + int(threadIdx.x) * share;
        bulk_copy(to + at, grid + at, share, counter);
      }
    }
    mbarrier_wait(counter, this->phase());
#else
    if (threadIdx.x == 0) arrivals.wait(round);
    __syncthreads();
    const auto* from = reinterpret_cast<const uint4*>(grid + this->incoming);  // not from the L1 cache, which may hold
    auto* to = reinterpret_cast<uint4*>(this->memory + this->incoming);        // what was
#pragma unroll 4
    for (int k = threadIdx.x; k < filled / kPiece; k += blockDim.x) to[k] = __ldcg(from + k);
    __syncthreads();
#endif
  }
  __device__ void end() {}
};

// ---- backward: parts of sums, of which each CTA makes one for every tile of units of the layer. The owner of a tile
// gets one from each source, as its lanes have it: units g and g + 8 of sequences 2 t and 2 t + 1 of an eight.

// What the three ways share: which parts a lane adds, and where those of a warp's tiles go.
template <class S, class Row>
struct PartSlots {
  static constexpr int kTiles = Row::template kTiles<S>;             // of a CTA
  static constexpr int kSource = kTiles * Row::kEights * kFragment;  // bytes
  int sources;
  int mine[Row::kCells], quarter;  // the first part of a cell that the lane adds, and of how many sources it does
  int owner, slot;                 // of the warp's first tile: the CTA, and the place there

  template <class P>
  __device__ PartSlots(const PersistentBackward& p, const P& place)
      : sources(kept(p.plan.ctas * Row::kSplits)), quarter(kept((sources - place.octet + 3) / 4)) {
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i)
      mine[i] = kept(offset(place.octet, place.tile(i), place.eight(i), place.pair(i), place.row));
    const int tile = place.warp / Row::kSplits, split = place.warp % Row::kSplits;
    owner = kept(tile / kTiles);
    slot = kept(offset(place.rank * Row::kSplits + split, tile % kTiles, 0, place.t, place.g));
  }
  // t comes before g, so that the lanes of an octet, which add parts for the same pair of sequences, read neighbours.
  static __device__ int offset(int source, int tile, int eight, int t, int g) {
    return source * kSource + (tile * Row::kEights + eight) * kFragment + (t * 8 + g) * kPiece;
  }
};

// send(further, eight, part): the tile belongs to the CTA that is `further` ranks beyond `owner`.
// part(i, further): what the lane adds for its cell i, `further` bytes beyond its first part.
template <class S, class Row, Exchange kExchange>
struct PartsExchange;

template <class S, class Row>
struct PartsExchange<S, Row, Exchange::cta> : PartSlots<S, Row> {
  static constexpr int kBuffers = 1;
  char* memory;

  template <class P>
  __device__ PartsExchange(const PersistentBackward& p, const P& place, char* shared, int turn)
      : PartSlots<S, Row>(p, place), memory(shared + p.plan.received) {
    static_assert(Row::kTurns == 1, "nothing is under way from CTA to CTA");
    const int bytes = received_bytes(this->sources, this->kTiles, Row::kEights);
    for (int k = threadIdx.x; k < bytes / kPiece; k += blockDim.x)  // no part comes of padding
      reinterpret_cast<uint4*>(memory)[k] = {0, 0, 0, 0};
  }
  __device__ void begin() { __syncthreads(); }
  __device__ void send(int, int eight, const float4& part) {
    *reinterpret_cast<float4*>(memory + (this->slot + eight * kFragment)) = part;
  }
  __device__ void sent() {}
  __device__ void wait() { __syncthreads(); }
  __device__ float4 part(int i, int further) const {
    return *reinterpret_cast<const float4*>(memory + (this->mine[i] + further));
  }
  __device__ void end() {}
};

template <class S, class Row>
struct PartsExchange<S, Row, Exchange::cluster> : PartSlots<S, Row>, Turns {
  static constexpr int kBuffers = 2;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  char* memory;
  uint32_t mbarrier;  // of the first buffer
  int expected;

  template <class P>
  __device__ PartsExchange(const PersistentBackward& p, const P& place, char* shared, int turn)
      : PartSlots<S, Row>(p, place),
        Turns(received_stride(this->sources, this->kTiles, Row::kEights)),
        memory(shared + p.plan.received + turn * 2 * stride),
        mbarrier(kept(shared_address(memory) + stride - kPiece)),
        expected(this->sources * Row::kEights * kFragment *
                 min(this->kTiles, p.plan.tiles - place.rank * this->kTiles)) {
    for (int buffer = 0; buffer < 2; ++buffer)
      for (int k = threadIdx.x; k < (stride - kPiece) / kPiece; k += blockDim.x)
        reinterpret_cast<uint4*>(memory + buffer * stride)[k] = {0, 0, 0, 0};
    this->slot = kept(this->slot + shared_address(memory));
    mbarriers_init(mbarrier, stride);
    if (threadIdx.x == 0)
      for (int k = 0; k < 2; ++k) mbarrier_expect(mbarrier + k * stride, expected);
  }
  __device__ void begin() { cluster_barrier(); }
  __device__ void send(int further, int eight, const float4& part) {
    const uint4 v = {bits_of(part.x), bits_of(part.y), bits_of(part.z), bits_of(part.w)};
    const int rank = this->owner + further;
    store_async(remote(this->slot + outgoing() + eight * kFragment, rank), v, remote(mbarrier + outgoing(), rank));
  }
  __device__ void sent() {}
  __device__ void wait() {
    turn();
    mbarrier_wait(mbarrier + incoming, phase());
    if (threadIdx.x == 0) mbarrier_expect(mbarrier + incoming, expected);
  }
  __device__ float4 part(int i, int further) const {
    return *reinterpret_cast<const float4*>(memory + (this->mine[i] + incoming + further));
  }
  __device__ void end() { cluster_barrier(); }
#endif
};

// Parts in global memory, by owner.
template <class S, class Row>
struct PartsExchange<S, Row, Exchange::grid> : PartSlots<S, Row>, Turns {
  static constexpr int kBuffers = 2;
  Arrivals arrivals;
  char* grid;
  int owned;  // bytes of an owner
  int round = 0;

  template <class P>
  __device__ PartsExchange(const PersistentBackward& p, const P& place, char*, int turn)
      : PartSlots<S, Row>(p, place),
        Turns(p.grid.bytes),
        arrivals(p.grid, place.group * Row::kTurns + turn, p.plan.ctas),
        grid(p.grid.buffers + (int64_t(place.group) * Row::kTurns + turn) * 2 * p.grid.bytes),
        owned(kept(this->sources * this->kSource)) {
    this->slot = kept(this->slot + this->owner * owned);
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i) this->mine[i] = kept(this->mine[i] + place.rank * owned);
  }

  __device__ void begin() {}
  __device__ void send(int further, int eight, const float4& part) {
    __stcg(reinterpret_cast<float4*>(grid + outgoing() + (this->slot + further * owned + eight * kFragment)), part);
  }
  __device__ void sent() {
    arrivals.arrive();
    ++round;
  }
  __device__ void wait() {
    turn();
    if (threadIdx.x == 0) arrivals.wait(round);
    __syncthreads();
  }
  __device__ float4 part(int i, int further) const {  // not from the L1 cache, which may hold what stood there before
    return __ldcg(reinterpret_cast<const float4*>(grid + incoming + (this->mine[i] + further)));
  }
  __device__ void end() {}
};

}  // namespace birnn::cuda
