// bfloat16 for the bodies: vectors of floats out of it and into it. Included after vector_body.h.

template <int W>
US3L_INLINE Float<W> load(const BFloat16* p) {
  typename Lanes<W>::Half half;
  __builtin_memcpy(&half, p, sizeof half);
  const typename Lanes<W>::Word word = __builtin_convertvector(half, typename Lanes<W>::Word) << 16;
  return (Float<W>)word;
}

// v to nearest even in bfloat16, in the upper halves of the words; the lower ones are of no use. A NaN stays one.
template <int W>
US3L_INLINE typename Lanes<W>::Word nearest(Float<W> v) {
  using Word = typename Lanes<W>::Word;
  const Word word = (Word)v;
  return v == v ? word + 0x7fff + ((word >> 16) & 1) : word | 0x400000;
}

// v as it reads after it was stored.
template <class T, int W>
US3L_INLINE Float<W> rounded(Float<W> v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  return (Float<W>)(nearest<W>(v) & 0xffff0000);
}

template <int W>
US3L_INLINE void store(BFloat16* p, Float<W> v) {
  const auto half = __builtin_convertvector(nearest<W>(v) >> 16, typename Lanes<W>::Half);
  __builtin_memcpy(p, &half, sizeof half);
}
