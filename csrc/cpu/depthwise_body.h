// The kernels of depthwise_kernels.h, written once. Each depthwise_<isa>.cpp includes this file inside a namespace of its
// own, with LANES floats to a vector, under that instruction set's compiler options. So nothing here may be a function of
// the standard library: the linker would keep one copy of it for all.

#include "vector_body.h"
#include "bfloat16_body.h"

#define US3L_LAMBDA(...) [&](__VA_ARGS__) __attribute__((always_inline))

// Channels begin .. end - 1 out of `all`, of which there are at least as many as lanes in a vector.
struct Channels {
  std::int64_t begin, end, all;
};

// Calls f(channel, repeated) for vectors of W lanes that cover the channels. The last of all may lap over the one before,
// so that there is no tail: its first `repeated` lanes were there already.
template <int W, class F>
US3L_INLINE void for_vectors(const Channels& channels, const F& f) {
  for (std::int64_t c = channels.begin; c < channels.end; c += W) {
    const std::int64_t first = c + W <= channels.all ? c : channels.all - W;
    f(first, c - first);
  }
}

alignas(64) constexpr float kZeros[LANES]{};

// What P neighbouring outputs of a row read of a row of the input, K neighbouring taps at a time.
//
// Where K > 1, those are all the taps, the columns under them lie side by side, the stride is S, and only the outermost
// K / 2 columns may lie outside of the image: there zeros are read, so that nothing branches. K = 1 (with S = 1) serves
// everything else: the columns under one tap are the stride apart.
template <class T, int K, int S, int P>
struct Columns {
  static constexpr int kCount = (P - 1) * S + K;
  std::int64_t unit, tap, first, size, pixel;  // the distance of two columns, and of two taps, in pixels
  std::uintptr_t inside[K];  // all bits for those of the outermost columns that lie in the image, from left to right

  Columns(const Axis& axis, std::int64_t output, std::int64_t pixel)
      : unit(K == 1 ? axis.stride : 1),
        tap(axis.step),
        first(output * axis.stride + axis.offset),
        size(axis.size),
        pixel(pixel) {
    for (int i = 0; i < K / 2 * 2; ++i) {
      const std::int64_t column = first + (i < K / 2 ? i : kCount - K / 2 * 2 + i);
      inside[i] = -static_cast<std::uintptr_t>(column >= 0 && column < size);
      asm("" : "+r"(inside[i]));  // or there would be a loop for every case
    }
  }

  static bool serve(const Axis& axis, std::int64_t output) {
    const std::int64_t first = output * axis.stride + axis.offset;
    return K == 1 || (first + K / 2 >= 0 && first + kCount - K / 2 <= axis.size);
  }

  // Calls f(k, p, v) for tap t + k and output p and their input v, where that is in the image (or 0).
  template <int W, class F>
  US3L_INLINE void visit(const T* row, std::int64_t t, const F& f) const {
    const std::int64_t column = first + t * tap;
    const T* in = row + column * pixel;
    US3L_UNROLL
    for (int j = 0; j < kCount; ++j, in += unit * pixel) {
      if (K == 1 && static_cast<std::uint64_t>(column + j * unit) >= static_cast<std::uint64_t>(size)) continue;
      const int edge = j < K / 2 ? j : j - (kCount - K / 2 * 2);
      const bool outermost = K > 1 && (j < K / 2 || j >= kCount - K / 2);
      Float<W> v = load<W>(outermost ? in_or_zeros(in, inside[edge]) : in);
      keep<W>(v);
      US3L_UNROLL
      for (int k = 0; k < K; ++k)
        if (j >= k && (j - k) % S == 0 && (j - k) / S < P) f(k, (j - k) / S, v);
    }
  }

  US3L_INLINE static const T* in_or_zeros(const T* in, std::uintptr_t inside) {
    const auto zeros = reinterpret_cast<std::uintptr_t>(kZeros);
    return reinterpret_cast<const T*>(zeros ^ ((zeros ^ reinterpret_cast<std::uintptr_t>(in)) & inside));
  }
};

// Asks for memory line by line, a part at a time: evenly, between the work of a call.
template <bool kWritten>
class Asking {
 public:
  Asking(const Stretch& ahead, std::int64_t parts)
      : at_(ahead.from), end_(ahead.from + ahead.bytes), bytes_((ahead.bytes / parts + kLine) / kLine * kLine) {}

  US3L_INLINE void next() {
    const std::uintptr_t end = at_ + bytes_ < end_ ? at_ + bytes_ : end_;
    for (std::uintptr_t at = at_; at < end; at += kLine)
      __builtin_prefetch(reinterpret_cast<const void*>(at), kWritten, 2);
    at_ = end;
  }

 private:
  static constexpr std::uintptr_t kLine = 64;
  std::uintptr_t at_, end_, bytes_;
};

// Outputs `first` .. `last` - 1, P at a time.
template <class T, int W, int K, int S, int P>
void correlate_blocks(const Axis& axis, const Window<T>& x, const float* filters, const float* bias, const Line<T>& y,
                      std::int64_t first, std::int64_t last, std::int64_t channels, Asking<false>& x_ahead,
                      Asking<true>& y_ahead) {
  const std::int64_t rows = x.rows, row_stride = x.row, pixel = y.pixel;  // or they are read again after every store
  for (std::int64_t output = first; output < last; output += P) {
    const Columns<T, K, S, P> columns(axis, output, x.pixel);
    for_vectors<W>({0, channels, channels}, US3L_LAMBDA(std::int64_t c, std::int64_t) {
      Float<W> sum[P];
      US3L_UNROLL
      for (int p = 0; p < P; ++p) sum[p] = load<W>(bias + c);
      const T* row = x.data + c;
      const float* filter = filters + c;
      x_ahead.next();
      y_ahead.next();
      for (std::int64_t r = 0; r < rows; ++r, row += row_stride)
        for (std::int64_t t = 0; t < (K > 1 ? K : axis.taps); t += K, filter += K * channels) {
          Float<W> tap[K];
          US3L_UNROLL
          for (int k = 0; k < K; ++k) tap[k] = load<W>(filter + k * channels);
          columns.template visit<W>(row, t, US3L_LAMBDA(int k, int p, Float<W> v) { sum[p] += tap[k] * v; });
        }
      T* out = y.data + output * pixel + c;
      US3L_UNROLL
      for (int p = 0; p < P; ++p, out += pixel) store<W>(out, sum[p]);
    });
  }
}

US3L_INLINE std::int64_t row_of_sums(std::int64_t channels) { return (channels + LANES - 1) / LANES * LANES; }

template <class T, int W, int K, int S, int P>
void accumulate_blocks(const Axis& axis, const Window<T>& x, const Line<const T>& dy, float* sums, std::int64_t first,
                       std::int64_t last, const Channels& channels, Asking<false>& x_ahead, Asking<false>& dy_ahead) {
  const std::int64_t sums_row = row_of_sums(channels.all), rows = x.rows, row_stride = x.row;
  for (std::int64_t output = first; output < last; output += P) {
    const Columns<T, K, S, P> columns(axis, output, x.pixel);
    for_vectors<W>(channels, US3L_LAMBDA(std::int64_t c, std::int64_t repeated) {
      Float<W> grad[P];
      const T* const upstream = dy.data + output * dy.pixel + c;
      US3L_UNROLL
      for (int p = 0; p < P; ++p) grad[p] = load<W>(upstream + p * dy.pixel);
      const T* row = x.data + c;
      x_ahead.next();
      dy_ahead.next();
      float* to = sums + c + repeated;  // repeated lanes have a place of their own, that is not read
      for (std::int64_t r = 0; r < rows; ++r, row += row_stride)
        for (std::int64_t t = 0; t < (K > 1 ? K : axis.taps); t += K, to += K * sums_row) {
          Float<W> sum[K];
          US3L_UNROLL
          for (int k = 0; k < K; ++k) sum[k] = load<W>(to + k * sums_row);
          columns.template visit<W>(row, t, US3L_LAMBDA(int k, int p, Float<W> v) { sum[k] += grad[p] * v; });
          US3L_UNROLL
          for (int k = 0; k < K; ++k) store<W>(to + k * sums_row, sum[k]);
        }
    });
  }
}

// Totals in the order of the channels.
template <int W>
void flush_sums(float* sums, double* totals, std::int64_t count, std::int64_t channels) {
  const std::int64_t sums_row = row_of_sums(channels);
  for (std::int64_t n = 0; n < count; ++n, sums += sums_row, totals += channels)
    for_vectors<W>({0, channels, channels}, US3L_LAMBDA(std::int64_t c, std::int64_t repeated) {
      const float* const from = sums + c + repeated;
      if (repeated == 0)
        for (int i = 0; i < W; ++i) totals[c + i] += from[i];
      else
        for (std::int64_t i = repeated; i < W; ++i) totals[c + i] += from[i];
      store<W>(sums + c + repeated, Float<W>{});
    });
}

// Of at most 8 outputs.
US3L_INLINE std::int64_t blocks_of(std::int64_t count) { return (count + 7) / 8; }

// Calls f<W, K, S, P>(first, last) for outputs in blocks of P that are as equal as can be: small ones share little. K and S
// are the axis's, or 1 where blocks need it.
template <class T, int W, int K, int S, class F>
US3L_INLINE void for_blocks(const Axis& axis, std::int64_t count, const F& f) {
  const std::int64_t blocks = blocks_of(count), least = count / blocks, larger = (count - blocks * least) * (least + 1);
  const auto call = US3L_LAMBDA(std::int64_t pixels, std::int64_t first, std::int64_t last) {
    if (first == last) return;
    switch (pixels) {
#define US3L_PIXELS(p)                                                                                  \
  case p:                                                                                               \
    if (Columns<T, K, S, p>::serve(axis, first) && Columns<T, K, S, p>::serve(axis, last - p))          \
      f.template operator()<W, K, S, p>(first, last);                                                   \
    else                                                                                                \
      f.template operator()<W, 1, 1, p>(first, last);                                                   \
    break;
      US3L_PIXELS(1) US3L_PIXELS(2) US3L_PIXELS(3) US3L_PIXELS(4)
      US3L_PIXELS(5) US3L_PIXELS(6) US3L_PIXELS(7) US3L_PIXELS(8)
#undef US3L_PIXELS
    }
  };
  call(least + 1, 0, larger);
  call(least, larger, count);
}

// The same, with K and S out of the axis.
template <class T, int W, class F>
US3L_INLINE void for_blocks(const Axis& axis, std::int64_t count, const F& f) {
  if constexpr (W > 1) {
    const std::int64_t taps = axis.step == 1 ? axis.taps : 0;
    if (axis.stride == 1 && taps == 2) return for_blocks<T, W, 2, 1>(axis, count, f);
    if (axis.stride == 1 && taps == 3) return for_blocks<T, W, 3, 1>(axis, count, f);
    if (axis.stride == 1 && taps == 5) return for_blocks<T, W, 5, 1>(axis, count, f);
    if (axis.stride == 1 && taps == 7) return for_blocks<T, W, 7, 1>(axis, count, f);
    if (axis.stride == 2 && taps == 3) return for_blocks<T, W, 3, 2>(axis, count, f);
    if (axis.stride == 2 && taps == 5) return for_blocks<T, W, 5, 2>(axis, count, f);
  }
  for_blocks<T, W, 1, 1>(axis, count, f);
}

// For fewer channels than LANES: half vectors, where networks have layers of 8 channels; else one at a time.
constexpr int kNarrow = LANES == 16 ? 8 : 1;

US3L_INLINE std::int64_t vectors_of(std::int64_t channels) {
  const std::int64_t lanes = channels >= LANES ? LANES : channels >= kNarrow ? kNarrow : 1;
  return (channels + lanes - 1) / lanes;
}

template <class T, class F>
US3L_INLINE void for_blocks(const Axis& axis, std::int64_t channels, std::int64_t count, const F& f) {
  if (channels >= LANES)
    for_blocks<T, LANES>(axis, count, f);
  else if (channels >= kNarrow)
    for_blocks<T, kNarrow>(axis, count, f);
  else
    for_blocks<T, 1>(axis, count, f);
}

template <class T>
void correlate(const Axis& axis, const Window<T>& x, const float* filters, const float* bias, const Line<T>& y,
               std::int64_t channels, const Stretch& ahead_of_x, const Stretch& ahead_of_y) {
  const std::int64_t parts = blocks_of(y.count) * vectors_of(channels);
  Asking<false> x_ahead(ahead_of_x, parts);
  Asking<true> y_ahead(ahead_of_y, parts);
  for_blocks<T>(axis, channels, y.count, [&]<int W, int K, int S, int P>(std::int64_t first, std::int64_t last) {
    correlate_blocks<T, W, K, S, P>(axis, x, filters, bias, y, first, last, channels, x_ahead, y_ahead);
  });
}

// Some channels at a time, whose sums stay in the L1 cache along the row.
template <class T>
void accumulate(const Axis& axis, const Window<T>& x, const Line<const T>& dy, float* sums, std::int64_t channels,
                const Stretch& ahead_of_x, const Stretch& ahead_of_dy) {
  constexpr std::int64_t kSums = 2048;
  const std::int64_t vectors = kSums / LANES / (x.rows * axis.taps + 1) + 1;
  const std::int64_t parts = blocks_of(dy.count) * vectors_of(channels);
  Asking<false> x_ahead(ahead_of_x, parts), dy_ahead(ahead_of_dy, parts);
  for (std::int64_t begin = 0; begin < channels; begin += vectors * LANES) {
    const std::int64_t end = begin + vectors * LANES < channels ? begin + vectors * LANES : channels;
    for_blocks<T>(axis, channels, dy.count, [&]<int W, int K, int S, int P>(std::int64_t first, std::int64_t last) {
      accumulate_blocks<T, W, K, S, P>(axis, x, dy, sums, first, last, {begin, end, channels}, x_ahead, dy_ahead);
    });
  }
}

void flush(float* sums, double* totals, std::int64_t count, std::int64_t channels) {
  const auto pass = channels >= LANES ? flush_sums<LANES> : channels >= kNarrow ? flush_sums<kNarrow> : flush_sums<1>;
  pass(sums, totals, count, channels);
}

template <class T>
DepthwiseKernels<T> depthwise_kernels() {
  return {LANES, correlate<T>, accumulate<T>, flush};
}
template DepthwiseKernels<float> depthwise_kernels();
template DepthwiseKernels<BFloat16> depthwise_kernels();

#undef US3L_LAMBDA
