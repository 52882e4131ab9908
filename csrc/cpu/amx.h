// Products on AMX's tile registers: 16 x 16 sums of bfloat16 pairs. tiles.h includes this file. BIRNN_EMULATE_AMX
// computes the same in plain code, so that CPUs without AMX can test the code around it.

#if !BIRNN_EMULATE_AMX

// Configures all eight tiles as 16 rows of 64 bytes, for the object's lifetime.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
};

// 16 x N vectors of sums in the tiles 0 to 3. Tile 4 holds a, and the others hold the panel. One object at a time may
// live. The asm statements are there because GCC 12's intrinsics do not tell the compiler that they read and write
// memory. Tiles that began with values of the stack would wait for these to leave the store buffer.
template <int N>
class TileSums {
 public:
  INLINE TileSums() {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) {
      _tile_zero(2);
      if constexpr (N > 3) _tile_zero(3);
    }
  }

  // Adds the sum over k < K of a[m * stride + k] * panel[k / 2][n][lane][k % 2], K a multiple of 32.
  INLINE void multiply(const bfloat16* a, int64_t stride, const bfloat16* panel, int64_t K) {
    asm volatile("" ::: "memory");
    for (int64_t k = 0; k < K; k += 32) {
      const bfloat16* w = panel + k * N * 16;
      _tile_loadd(4, a + k, stride * 2);
      _tile_loadd(5, w, N * 64);
      _tile_dpbf16ps(0, 4, 5);
      if constexpr (N > 1) {
        _tile_loadd(6, w + 32, N * 64);
        _tile_dpbf16ps(1, 4, 6);
      }
      if constexpr (N > 2) {
        _tile_loadd(7, w + 64, N * 64);
        _tile_dpbf16ps(2, 4, 7);
      }
      if constexpr (N > 3) {
        _tile_loadd(5, w + 96, N * 64);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
  }

  INLINE void add_to(Vec<float> (&acc)[16][N]) const {
    Vec<float> sums[16][N];
    _tile_stored(0, &sums[0][0], N * 64);
    if constexpr (N > 1) _tile_stored(1, &sums[0][1], N * 64);
    if constexpr (N > 2) {
      _tile_stored(2, &sums[0][2], N * 64);
      if constexpr (N > 3) _tile_stored(3, &sums[0][3], N * 64);
    }
    asm volatile("" ::: "memory");
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < N; ++n) acc[m][n] += sums[m][n];
  }
};

#else

struct TileRegisters {
  ~TileRegisters() {}
};

template <int N>
class TileSums {
 public:
  INLINE void multiply(const bfloat16* a, int64_t stride, const bfloat16* panel, int64_t K) {
    const auto value = [](bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); };
    for (int64_t k = 0; k < K; ++k)
      for (int m = 0; m < 16; ++m)
        for (int n = 0; n < N; ++n)
          for (int lane = 0; lane < 16; ++lane)
            sums_[m][n][lane] += value(a[m * stride + k]) * value(panel[((k / 2 * N + n) * 16 + lane) * 2 + k % 2]);
  }
  INLINE void add_to(Vec<float> (&acc)[16][N]) const {
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < N; ++n) acc[m][n] += sums_[m][n];
  }

 private:
  Vec<float> sums_[16][N] = {};
};

#endif
