// bfloat16 for the bodies: vectors of floats out of it and into it. Included after vector_body.h.

template <int W>
US3L_INLINE Float<W> load(const BFloat16* p) {
  typename Lanes<W>::Half half;
  __builtin_memcpy(&half, p, sizeof half);
  const typename Lanes<W>::Word word = __builtin_convertvector(half, typename Lanes<W>::Word) << 16;
  return (Float<W>)word;
}

// v as it reads after it was stored: to nearest even in bfloat16; a NaN stays one.
template <class T, int W>
US3L_INLINE Float<W> rounded(Float<W> v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  using Word = typename Lanes<W>::Word;
  const Word word = (Word)v;
  const Word nearest = word + 0x7fff + ((word >> 16) & 1), quiet = word | 0x400000;
  return (Float<W>)((v == v ? nearest : quiet) & 0xffff0000);
}

template <int W>
US3L_INLINE void store(BFloat16* p, Float<W> v) {
  const auto half = __builtin_convertvector((typename Lanes<W>::Word)rounded<BFloat16, W>(v) >> 16,
                                            typename Lanes<W>::Half);
  __builtin_memcpy(p, &half, sizeof half);
}
