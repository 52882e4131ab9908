// How the CTAs of a group hand things to each other, by the three ways of Exchange. Each type has the same functions:
//   begin()   once, before the first step: everyone may be sent something
//   send()    without waiting for anyone
//   sent()    all has been sent that this CTA sends in this round
//   wait()    all of a round is here, from the whole group
//   end()     before the kernel ends
// There are two buffers: who sends for round r + 1 has waited for round r, to which everybody sent after having read
// what came in round r - 1, and that is whose place it takes.
#pragma once

#include "../sm90/cluster.cuh"
#include "shared.cuh"

namespace birnn::cuda {

// A count that the CTAs of a group of a grid make in global memory.
struct Arrivals {
  unsigned* count;
  int ctas;

  __device__ Arrivals(const GridExchange& grid, int group, int ctas)
      : count(grid.arrivals + group * (kCounter / int(sizeof(unsigned)))), ctas(ctas) {}

  // What all threads of the CTA have stored before is seen by whoever waits.
  __device__ void arrive() const {
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
  }
  // One thread: until all have arrived for the given round, the first being 1.
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

// ---- forward: h, in pieces of 16 bytes

// The lanes of a piece, which hold its units (or half of them, in float32), all get the whole of it.
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
struct HBuffers {
  char* memory;
  int bytes;
  int at[Row::kCells];
  int g, sharer;  // which of its piece's lanes this one is
  int round = 0;

  template <class P>
  __device__ HBuffers(const PersistentForward& p, const P& place, char* shared)
      : memory(shared + p.plan.h),
        bytes(h_bytes(p.plan.h_blocks, Row::kSequences, sizeof(S))),
        g(place.g),
        sharer(place.g % kSharers<S>) {
    const int block = place.rank * p.plan.blocks + place.block;
#pragma unroll
    for (int i = 0; i < Row::kCells; ++i)
      at[i] = h_offset(block, place.sequence(i), Row::kSequences, sizeof(S)) + place.g / kSharers<S> * kPiece;
    for (int k = threadIdx.x; k < 2 * bytes / kPiece; k += blockDim.x)  // padding stays 0
      reinterpret_cast<uint4*>(memory)[k] = {0, 0, 0, 0};
  }
  __device__ char* buffer() const { return memory + (round & 1) * bytes; }
  __device__ int next() const { return (round + 1) & 1; }
  __device__ int parity() const { return (round - 1) >> 1 & 1; }  // of a buffer's mbarrier, when round comes in
};

template <class S, class Row, Exchange kExchange>
struct HExchange;

template <class S, class Row>
struct HExchange<S, Row, Exchange::cta> : HBuffers<S, Row> {
  using HBuffers<S, Row>::HBuffers;

  __device__ void begin() { __syncthreads(); }
  __device__ void send(int i, S h) {
    const uint4 piece = gather(h, this->g);
    if (this->sharer == 0) *reinterpret_cast<uint4*>(this->memory + this->next() * this->bytes + this->at[i]) = piece;
  }
  __device__ void sent() { ++this->round; }
  __device__ void wait() {
#if !defined(BIRNN_WITHOUT_BARRIER)  // to see that a test would notice
    __syncthreads();
#endif
  }
  __device__ void end() {}
};

template <class S, class Row>
struct HExchange<S, Row, Exchange::cluster> : HBuffers<S, Row> {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint32_t to, mbarriers;  // shared addresses
  int ctas, expected;      // bytes of a round

  template <class P>
  __device__ HExchange(const PersistentForward& p, const P& place, char* shared)
      : HBuffers<S, Row>(p, place, shared),
        to(shared_address(this->memory)),
        mbarriers(shared_address(shared + p.plan.mbarriers)),
        ctas(p.plan.ctas),
        expected(h_bytes(p.plan.ctas * p.plan.blocks, Row::kSequences, sizeof(S))) {
    if (threadIdx.x == 0) {
      for (int k = 0; k < 2; ++k) mbarrier_init(mbarriers + 8 * k);
      mbarrier_inits_seen_by_cluster();
      for (int k = 0; k < 2; ++k) mbarrier_expect(mbarriers + 8 * k, expected);
    }
  }
  __device__ void begin() { cluster_barrier(); }
  __device__ void send(int i, S h) {
    const uint4 piece = gather(h, this->g);
    const uint32_t address = to + this->next() * this->bytes + this->at[i], mbarrier = mbarriers + this->next() * 8;
#pragma unroll
    for (int k = 0; k < kMaxCluster / kSharers<S>; ++k) {
      const int rank = this->sharer + k * kSharers<S>;
      if (rank < ctas) store_async(remote(address, rank), piece, remote(mbarrier, rank));
    }
  }
  __device__ void sent() { ++this->round; }
  __device__ void wait() {
    const uint32_t mbarrier = mbarriers + (this->round & 1) * 8;
    mbarrier_wait(mbarrier, this->parity());
    if (threadIdx.x == 0) mbarrier_expect(mbarrier, expected);  // of the round after next
  }
  __device__ void end() { cluster_barrier(); }  // nobody may be gone while others store to it
#endif
};

template <class S, class Row>
struct HExchange<S, Row, Exchange::grid> : HBuffers<S, Row> {
  Arrivals arrivals;
  char* grid;  // the group's two buffers
  int filled;  // bytes of a buffer that a round fills
  uint32_t mbarriers;

  template <class P>
  __device__ HExchange(const PersistentForward& p, const P& place, char* shared)
      : HBuffers<S, Row>(p, place, shared),
        arrivals(p.grid, place.group, p.plan.ctas),
        grid(p.grid.buffers + int64_t(place.group) * 2 * this->bytes),
        filled(h_bytes(p.plan.ctas * p.plan.blocks, Row::kSequences, sizeof(S))),
        mbarriers(shared_address(shared + p.plan.mbarriers)) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      for (int k = 0; k < 2; ++k) mbarrier_init(mbarriers + 8 * k);
      mbarrier_inits_seen_by_cluster();
    }
#endif
  }
  __device__ void begin() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    acquired_for_bulk_copy();  // h0 was stored where bulk copies will store
#endif
    __syncthreads();
  }
  __device__ void send(int i, S h) {
    const uint4 piece = gather(h, this->g);
    if (this->sharer == 0) __stcg(reinterpret_cast<uint4*>(grid + this->next() * this->bytes + this->at[i]), piece);
  }
  __device__ void sent() {
    arrivals.arrive();
    ++this->round;
  }
  __device__ void wait() {
    const int offset = (this->round & 1) * this->bytes, count = filled;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const uint32_t mbarrier = mbarriers + (this->round & 1) * 8;
    if (threadIdx.x < kWarp) {
      if (threadIdx.x == 0) {
        arrivals.wait(this->round);
        mbarrier_expect(mbarrier, count);
      }
      __syncwarp();
      constexpr int kCopiers = 8;
      const int share = count / kCopiers;  // a multiple of 16: a block has as many pieces
      if (threadIdx.x < kCopiers) {
        acquired_for_bulk_copy();
        const int at = offset + int(threadIdx.x) * share;
        bulk_copy(shared_address(this->memory) + at, grid + at, share, mbarrier);
      }
    }
    mbarrier_wait(mbarrier, this->parity());
#else
    if (threadIdx.x == 0) arrivals.wait(this->round);
    __syncthreads();
    const auto* from = reinterpret_cast<const uint4*>(grid + offset);  // not from the L1 cache, which may hold what was
    auto* to = reinterpret_cast<uint4*>(this->memory + offset);
#pragma unroll 4
    for (int k = threadIdx.x; k < filled / kPiece; k += blockDim.x) to[k] = __ldcg(from + k);
    __syncthreads();
#endif
  }
  __device__ void end() {}
};

// ---- backward: parts of sums, of which each CTA makes one for every tile of units of the layer. The owner of a tile
// gets one from each source, as its lanes have it: units g and g + 8 of sequences 2 t and 2 t + 1 of an eight.

template <class Row, int kTiles>
struct PartSlots {
  static constexpr int kSource = kTiles * Row::kEights * kFragment;  // bytes
  static constexpr int kBuffers = Row::kExchange == Exchange::cta ? 1 : 2;
  int round = 0;

  // t comes before g, so that the lanes of an octet, which add parts for the same pair of sequences, read neighbours.
  static __device__ int offset(int source, int tile, int eight, int t, int g) {
    return source * kSource + (tile * Row::kEights + eight) * kFragment + (t * 8 + g) * kPiece;
  }
  __device__ int incoming() const { return kBuffers == 1 ? 0 : round & 1; }
  __device__ int outgoing() const { return kBuffers == 1 ? 0 : (round + 1) & 1; }
  __device__ int parity() const { return (round - 1) >> 1 & 1; }
};

// Parts in shared memory of the owner.
template <class Row, int kTiles>
struct SharedParts : PartSlots<Row, kTiles> {
  char* memory;
  int sources, bytes;

  __device__ SharedParts(const PersistentBackward& p, char* shared)
      : memory(shared + p.plan.received),
        sources(p.plan.ctas * Row::kSplits),
        bytes(received_bytes(sources, kTiles, Row::kEights)) {
    for (int k = threadIdx.x; k < this->kBuffers * bytes / kPiece; k += blockDim.x)  // no part comes of padding
      reinterpret_cast<uint4*>(memory)[k] = {0, 0, 0, 0};
  }
  __device__ float4 part(int at) const {
    return *reinterpret_cast<const float4*>(memory + this->incoming() * bytes + at);
  }
};

template <class Row, int kTiles, Exchange kExchange>
struct PartsExchange;

template <class Row, int kTiles>
struct PartsExchange<Row, kTiles, Exchange::cta> : SharedParts<Row, kTiles> {
  __device__ PartsExchange(const PersistentBackward& p, const Place&, char* shared)
      : SharedParts<Row, kTiles>(p, shared) {}

  __device__ void begin() { __syncthreads(); }
  __device__ void send(int, int at, const float4& part) { *reinterpret_cast<float4*>(this->memory + at) = part; }
  __device__ void sent() { ++this->round; }
  __device__ void wait() { __syncthreads(); }
  __device__ void end() {}
};

template <class Row, int kTiles>
struct PartsExchange<Row, kTiles, Exchange::cluster> : SharedParts<Row, kTiles> {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint32_t to, mbarriers;
  int expected;

  __device__ PartsExchange(const PersistentBackward& p, const Place& place, char* shared)
      : SharedParts<Row, kTiles>(p, shared),
        to(shared_address(this->memory)),
        mbarriers(shared_address(shared + p.plan.mbarriers)),
        expected(this->sources * Row::kEights * kFragment * min(kTiles, p.plan.tiles - place.rank * kTiles)) {
    if (threadIdx.x == 0) {
      for (int k = 0; k < 2; ++k) mbarrier_init(mbarriers + 8 * k);
      mbarrier_inits_seen_by_cluster();
      for (int k = 0; k < 2; ++k) mbarrier_expect(mbarriers + 8 * k, expected);
    }
  }
  __device__ void begin() { cluster_barrier(); }
  __device__ void send(int owner, int at, const float4& part) {
    const uint4 v = {bits_of(part.x), bits_of(part.y), bits_of(part.z), bits_of(part.w)};
    store_async(remote(to + this->outgoing() * this->bytes + at, owner), v,
                remote(mbarriers + this->outgoing() * 8, owner));
  }
  __device__ void sent() { ++this->round; }
  __device__ void wait() {
    const uint32_t mbarrier = mbarriers + this->incoming() * 8;
    mbarrier_wait(mbarrier, this->parity());
    if (threadIdx.x == 0) mbarrier_expect(mbarrier, expected);
  }
  __device__ void end() { cluster_barrier(); }
#endif
};

// Parts in global memory, by owner.
template <class Row, int kTiles>
struct PartsExchange<Row, kTiles, Exchange::grid> : PartSlots<Row, kTiles> {
  Arrivals arrivals;
  char* grid;
  int sources, rank, bytes;  // of a buffer

  __device__ PartsExchange(const PersistentBackward& p, const Place& place, char*)
      : arrivals(p.grid, place.group, p.plan.ctas),
        grid(p.grid.buffers + int64_t(place.group) * 2 * p.grid.bytes),
        sources(p.plan.ctas * Row::kSplits),
        rank(place.rank),
        bytes(p.grid.bytes) {}

  __device__ void begin() {}
  __device__ void send(int owner, int at, const float4& part) {
    __stcg(reinterpret_cast<float4*>(grid + this->outgoing() * bytes + owner * sources * this->kSource + at), part);
  }
  __device__ void sent() {
    arrivals.arrive();
    ++this->round;
  }
  __device__ void wait() {
    if (threadIdx.x == 0) arrivals.wait(this->round);
    __syncthreads();
  }
  __device__ float4 part(int at) const {  // not from the L1 cache, which may hold what stood there before
    return __ldcg(
        reinterpret_cast<const float4*>(grid + this->incoming() * bytes + rank * sources * this->kSource + at));
  }
  __device__ void end() {}
};

}  // namespace birnn::cuda
