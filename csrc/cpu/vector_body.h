// What the bodies (files that are compiled once per instruction set) share. Included before them, inside the namespace
// of the instruction set, where LANES is the number of floats to a vector.
//
// Vectors are the compiler's own (GCC and clang), so that one text serves every instruction set. Channels that do not
// fill a vector go to vectors of half the width, down to one lane: any number of channels, no masks.

#define US3L_INLINE inline __attribute__((always_inline))

#if defined(__clang__)
#define US3L_UNROLL _Pragma("unroll")
#else
#define US3L_UNROLL _Pragma("GCC unroll 32")  // early enough for arrays to become registers
#endif

template <int W>
struct Lanes {
  typedef float Float __attribute__((vector_size(W * 4)));
  typedef std::uint32_t Word __attribute__((vector_size(W * 4)));
  typedef std::uint16_t Half __attribute__((vector_size(W * 2)));
};
template <int W>
using Float = typename Lanes<W>::Float;

template <int W>
US3L_INLINE Float<W> load(const float* p) {
  Float<W> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <int W>
US3L_INLINE void store(float* p, Float<W> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Lane l is lane order[l] of a and b, one after the other.
template <int W>
US3L_INLINE Float<W> shuffle(Float<W> a, Float<W> b, typename Lanes<W>::Word order) {
#if defined(__clang__)
  Float<W> v;
  US3L_UNROLL
  for (int l = 0; l < W; ++l) v[l] = order[l] < W ? a[order[l]] : b[order[l] - W];
  return v;
#else
  return __builtin_shuffle(a, b, order);
#endif
}

// Transposes LANES vectors: blocks of 1, 2, 4, ... lanes off the diagonal change places.
US3L_INLINE void transpose(Float<LANES>* v) {
  US3L_UNROLL
  for (int s = 1; s < LANES; s *= 2) {
    Lanes<LANES>::Word first, second;
    US3L_UNROLL
    for (int l = 0; l < LANES; ++l) {
      first[l] = l & s ? LANES + l - s : l;
      second[l] = l & s ? LANES + l : l + s;
    }
    US3L_UNROLL
    for (int i = 0; i < LANES; ++i) {
      if (i & s) continue;
      const Float<LANES> a = v[i], b = v[i + s];
      v[i] = shuffle<LANES>(a, b, first);
      v[i + s] = shuffle<LANES>(a, b, second);
    }
  }
}

// Keeps v in a register. GCC makes a load an operand of every instruction that uses it, and so loads as many times.
template <int W>
US3L_INLINE void keep(Float<W>& v) {
#if defined(__x86_64__)
  if constexpr (LANES >= 8 && W > 1) asm("" : "+v"(v));  // of AVX2 at least
#endif
}

// A whole vector to an address that is a multiple of its size, and that is not read soon: what is there need not come
// into the cache first. Other threads see it after finish_stores_around_cache().
template <int W>
US3L_INLINE void store_around_cache(float* p, Float<W> v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<Float<W>*>(p));
#elif defined(__x86_64__)
  if constexpr (W == 16)
    __builtin_ia32_movntps512(p, v);
  else if constexpr (W == 8)
    __builtin_ia32_movntps256(p, v);
  else
    store<W>(p, v);
#else
  store<W>(p, v);
#endif
}

US3L_INLINE void finish_stores_around_cache() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}
