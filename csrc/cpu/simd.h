// SIMD values of kBytes bytes in GCC's vector extensions, which the compiler lowers to each ISA's own instructions.
// recurrence_kernel.h includes this file once per ISA, inside that ISA's namespace. This file includes nothing, so that
// no function of a header is compiled for an ISA that the machine may lack.

// N lanes of type E.
template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};

template <class A>
constexpr int kLanes = kBytes / sizeof(A);

template <class A>
using Vec = typename VectorOf<A, kLanes<A>>::type;

template <class To, class From>
INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// --- loads and stores: storage type S <-> vector of the accumulation type A -----------------------------------------

struct bfloat16 {
  uint16_t bits;
};

// A float that products take as the sum of two bfloat16 (DType::f32_high).
struct split_float {
  float value;
};

#if defined(__aarch64__)
using float16 = __fp16;  // GCC 12 has _Float16 in C++ on x86 only
#else
using float16 = _Float16;
#endif

template <class S>
struct Storage {  // double, float, float16
  using Accumulate = S;
  template <class A>
  static INLINE Vec<A> load(const S* p) {
    typename VectorOf<S, kLanes<A>>::type v;
    __builtin_memcpy(&v, p, sizeof(v));
    return __builtin_convertvector(v, Vec<A>);
  }
  template <class A>
  static INLINE void store(S* p, Vec<A> v) {
    const auto s = __builtin_convertvector(v, typename VectorOf<S, kLanes<A>>::type);
    __builtin_memcpy(p, &s, sizeof(s));
  }
};

template <>
struct Storage<split_float> {
  template <class A>
  static INLINE Vec<A> load(const split_float* p) {
    Vec<A> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  template <class A>
  static INLINE void store(split_float* p, Vec<A> v) {
    __builtin_memcpy(p, &v, sizeof(v));
  }
};

template <>
struct Storage<bfloat16> {
  using U16 = VectorOf<uint16_t, kLanes<float>>::type;
  using U32 = VectorOf<uint32_t, kLanes<float>>::type;
  template <class A>
  static INLINE Vec<A> load(const bfloat16* p) {
    U16 v;
    __builtin_memcpy(&v, p, sizeof(v));
    return bit_cast<Vec<A>>(__builtin_convertvector(v, U32) << 16);
  }
  template <class A>
  static INLINE void store(bfloat16* p, Vec<A> v) {
#if BIRNN_ISA_BF16
    const __m256bh s = _mm512_cvtneps_pbh(bit_cast<__m512>(v));
#else
    const U32 bits = bit_cast<U32>(v);
    const U32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
    const U32 kept = v != v ? (bits | 0x400000u) : rounded;    // a NaN must not round to infinity
    const U16 s = __builtin_convertvector(kept >> 16, U16);
#endif
    __builtin_memcpy(p, &s, sizeof(s));
  }
};

// These take the first n lanes only (1 <= n <= kLanes). load sets the others to 0, and store does not write them.
template <class A, class S>
INLINE Vec<A> load(const S* p, int64_t n) {
  if (n >= kLanes<A>) return Storage<S>::template load<A>(p);
  S some[kLanes<A>] = {};
  for (int64_t k = 0; k < n; ++k) some[k] = p[k];
  return Storage<S>::template load<A>(some);
}

template <class A, class S>
INLINE void store(S* p, Vec<A> v, int64_t n) {
  if (n >= kLanes<A>) return Storage<S>::template store<A>(p, v);
  S some[kLanes<A>];
  Storage<S>::template store<A>(some, v);
  for (int64_t k = 0; k < n; ++k) p[k] = some[k];
}

// --- sigmoid and tanh ------------------------------------------------------------------------------------------------

// The cell's functions for results that are stored as S.
template <class S>
struct Math;

// For float, results are within 4 ulp of the exact value over all floats, and exact at +-0 and +-inf; NaN propagates
// (tests/test_math.py). The method is Cody-Waite reduction x = n ln2 + r, |r| <= ln2/2, and the polynomial of Cephes'
// expf for (exp(r) - 1 - r)/r^2. tanh goes through expm1, so that nothing cancels near 0 and one branch is enough.
template <>
struct Math<float> {
  using Scalar = float;
  using V = Vec<float>;
  using I = VectorOf<int32_t, kLanes<float>>::type;

  // Finds the integer n with x = n ln2 + r, for |x| < 200; returns exp(r) - 1.
  static INLINE V reduce(V x, V& n) {
    constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
    n = (x * 1.44269504088896341f + kRound) - kRound;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return r + (r * r) * p;
  }
  static INLINE V abs(V x) { return bit_cast<V>(bit_cast<I>(x) & 0x7fffffff); }

  // Returns the smaller of x and limit; NaN for NaN.
  static INLINE V at_most(V x, float limit) {
#if BIRNN_ISA_BYTES == 64
    return __builtin_ia32_minps512_mask(V{} + limit, x, V{}, 0xffff, 4);  // it returns the second operand if one is NaN
#elif BIRNN_ISA_BYTES == 32
    return __builtin_ia32_minps256(V{} + limit, x);  // the same; a comparison and a choice are two instructions
#else
    return x > limit ? V{} + limit : x;
#endif
  }
  // Returns the larger of x and limit; NaN for NaN.
  static INLINE V at_least(V x, float limit) {
#if BIRNN_ISA_BYTES == 64
    return __builtin_ia32_maxps512_mask(V{} + limit, x, V{}, 0xffff, 4);
#elif BIRNN_ISA_BYTES == 32
    return __builtin_ia32_maxps256(V{} + limit, x);
#else
    return x < limit ? V{} + limit : x;
#endif
  }
  // Returns v 2^n, rounded once, for an integer n, -180 <= n <= 67.
  static INLINE V scale(V v, V n) {
#if BIRNN_ISA_BYTES == 64
    return __builtin_ia32_scalefps512_mask(v, n, V{}, 0xffff, 4);
#else
    // 2^(n + 60) is a normal float, while 2^n may be none.
    return v * bit_cast<V>((__builtin_convertvector(n, I) + (127 + 60)) << 23) * 0x1p-60f;
#endif
  }

  // Returns a / b for 1 <= b < 2^120.
  static INLINE V divide(V a, V b) {
#if BIRNN_ISA_BYTES == 64
    // A division takes as long as 8 multiplications. This starts from 14 bits, and a step of Newton's method gives 28.
    const V r = __builtin_ia32_rcp14ps512_mask(b, V{}, 0xffff);
    return a * (r * (2.f - b * r));
#else
    return a / b;
#endif
  }

  static INLINE V sigmoid(V x) {
    // e / (1 + e) with e = exp(x). Above 40 it rounds to 1, and below -110 to 0.
    V n;
    const V p = reduce(at_least(at_most(x, 40.f), -110.f), n);
    const V e = scale(p + 1.f, n);
    return divide(e, 1.f + e);
  }

  static INLINE V tanh(V x) {
    // E / (E + 2) with E = exp(2 |x|) - 1 = 2^n p + (2^n - 1). Above 20 it rounds to 1.
    V n;
    const V p = reduce(2.f * at_most(abs(x), 20.f), n);
    const V power = scale(V{} + 1.f, n);
    const V expm1 = power * p + (power - 1.f);
    const V result = divide(expm1, 2.f + expm1);
    return bit_cast<V>(bit_cast<I>(result) | (bit_cast<I>(x) & int32_t(0x80000000)));
  }
};

template <>
struct Math<split_float> : Math<float> {};

// For 16-bit results. They are within 0.51 ulp of the 16-bit type, over all its values, where rounding alone is within
// 0.5; sigmoid is 0 below the smallest normal bfloat16 (tests/test_math.py). Both functions take about half of float's
// instructions. The backward pass uses float's tanh: where |c| is large, its gradient 1 - tanh(c)^2 needs more digits.
struct MathOf16Bits : Math<float> {
  // e / (1 + e) with e = exp(x) = 2^n 2^r, |r| <= 1/2, and a polynomial with a relative error of 3e-6. Where the gate f
  // is near 1, the cell remembers 1 / (1 - f) steps. Then 1 - f = 1 / (1 + e) counts, which has a relative error as
  // small as e's, provided that the division is exact.
  static INLINE V sigmoid(V x) {
    constexpr float kLog2e = 1.44269504088896341f;
    constexpr float kRound = 12582912.f + 127;  // as above; the sum's low bits are 2^n's exponent
    const V clamped = at_least(at_most(x, 40.f), -88.f);
    const V rounded = clamped * kLog2e + kRound;
    const V r = clamped * kLog2e - (rounded - kRound);
    V p = V{} + 9.570953e-3f;
    p = p * r + 5.5919710e-2f;
    p = p * r + 2.4024729e-1f;
    p = p * r + 6.9312143e-1f;
    p = p * r + 9.9999926e-1f;
    const V e = p * bit_cast<V>(bit_cast<I>(rounded) << 23);
    return divide(e, 1.f + e);
  }

  // A rational function that was fitted to |x| <= 7 with a relative error of 1.3e-6 and no value above 1.
  static INLINE V tanh(V x) {
    const V clamped = at_least(at_most(x, 7.f), -7.f), square = clamped * clamped;
    const V above = ((square * 3.99435066e-6f + 2.29276111e-3f) * square + 1.23216882e-1f) * square + 9.99998987e-1f;
    const V below = ((square * 1.43949059e-4f + 2.11500861e-2f) * square + 4.56542462e-1f) * square + 1.f;
    return divide(clamped * above, below);
  }
};
template <>
struct Math<float16> : MathOf16Bits {};
template <>
struct Math<bfloat16> : MathOf16Bits {};

// double serves gradient checks, not speed, so this calls libm lane by lane.
template <>
struct Math<double> {
  using Scalar = double;
  using V = Vec<double>;
  static INLINE V sigmoid(V x) {
    V y = {};
    for (int k = 0; k < kLanes<double>; ++k) {
      const double e = __builtin_exp(-__builtin_fabs(x[k]));
      y[k] = (x[k] < 0 ? e : 1) / (1 + e);
    }
    return y;
  }
  static INLINE V tanh(V x) {
    V y = {};
    for (int k = 0; k < kLanes<double>; ++k) y[k] = __builtin_tanh(x[k]);
    return y;
  }
};
