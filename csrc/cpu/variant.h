// A row's units as SIMD vectors, for core/variant_row.h. recurrence_kernel.h includes this file, once per ISA.
template <class Type>
struct Row {
  using A = Type;
  using V = Vec<A>;
  using M = Math<A>;
  static constexpr int L = kLanes<A>;

  template <class F>
  INLINE void each(int64_t n, const F& f) const {
    for (int64_t u = 0; u < n; u += L) f(u, n - u);
  }
  template <class T>
  INLINE V load(const void* p, int64_t at, int64_t count) const {
    if constexpr (std::is_same_v<T, bool>) {
      typename VectorOf<uint8_t, L>::type bytes = {};
      const auto* from = static_cast<const uint8_t*>(p) + at;
      if (count >= L)
        __builtin_memcpy(&bytes, from, L);
      else
        for (int64_t k = 0; k < count; ++k) bytes[k] = from[k];
      return __builtin_convertvector(bytes, V);
    } else {
      return BIRNN_ISA::load<A>(static_cast<const T*>(p) + at, count);
    }
  }
  template <class T>
  INLINE void store(void* p, int64_t at, V v, int64_t count) const {
    BIRNN_ISA::store<A>(static_cast<T*>(p) + at, v, count);
  }
  template <class T>
  INLINE void store_one(void* p, int64_t at, T value) const {
    static_cast<T*>(p)[at] = value;
  }
  INLINE V only(V v, int64_t count) const {
    for (int64_t k = count; k < L; ++k) v[k] = 0;
    return v;
  }
  INLINE A sum(V v) const {
    A total = 0;
    for (int k = 0; k < L; ++k) total += v[k];
    return total;
  }
  INLINE A inverse_root(A a) const { return A(1 / __builtin_sqrt(double(a))); }
};
