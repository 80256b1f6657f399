// The passes of layer norm, written once. Each layer_norm_<isa>.cpp includes this file inside a namespace of its own, with
// LANES floats to a vector, under that instruction set's compiler options. So nothing here may be a function of the
// standard library: the linker would keep one copy of it for all.

#include "vector_body.h"
#include "bfloat16_body.h"

#define US3L_LAMBDA(...) [&](__VA_ARGS__) __attribute__((always_inline))

// Rows that go through the forward together: their sums hide each other's latency, and they share what is per channel.
constexpr int kRows = LANES == 16 ? 4 : 2;

// Terms whose sum is kept in float before it goes to double: channels of a row (in each of LANES sums), rows of a channel.
constexpr std::int64_t kBlockChannels = 128 * LANES, kBlockRows = 128;

template <int W>
struct Width {
  static constexpr int value = W;
};

// Calls f(c, Width) for vectors that together cover [c, end).
template <int W = LANES, class F>
US3L_INLINE void for_vectors(std::int64_t c, std::int64_t end, const F& f) {
  for (; c + W <= end; c += W) f(c, Width<W>{});
  if constexpr (W > 1) for_vectors<W / 2>(c, end, f);
}

template <int W>
US3L_INLINE float total(Float<W> v) {
  if constexpr (W == 1) {
    return v[0];
  } else {
    Float<W / 2> half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return total<W / 2>(half[0] + half[1]);
  }
}

// S sums over the channels for each of R rows, in double: sums[s][r] of what f(c, Width, add) gives to add(s, r, vector).
template <int S, int R>
struct RowSums {
  double sums[S][R] = {};

  template <class F>
  US3L_INLINE void over(std::int64_t channels, const F& f) {
    for (std::int64_t c = 0; c < channels; c += kBlockChannels)
      block(c, c + kBlockChannels < channels ? c + kBlockChannels : channels, f);
  }

 private:
  template <int W = LANES, class F>
  US3L_INLINE void block(std::int64_t c, std::int64_t end, const F& f) {
    if (c + W <= end) {
      Float<W> partial[S][R] = {};
      for (; c + W <= end; c += W)
        f(c, Width<W>{}, US3L_LAMBDA(int s, int r, Float<W> v) { partial[s][r] += v; });
      US3L_UNROLL
      for (int s = 0; s < S; ++s) {
        US3L_UNROLL
        for (int r = 0; r < R; ++r) sums[s][r] += total<W>(partial[s][r]);
      }
    }
    if constexpr (W > 1) block<W / 2>(c, end, f);
  }
};

// The mean first, then the deviations from it: exact however far the mean is from zero.
template <class T, int R>
void forward_rows(Rows<const T> x, Rows<T> y, std::int64_t channels, const float* weight, const float* bias, double eps,
                  float* mean, float* rstd) {
  RowSums<1, R> value;
  value.over(channels, US3L_LAMBDA(std::int64_t c, auto width, const auto& add) {
    US3L_UNROLL
    for (int r = 0; r < R; ++r) add(0, r, load<decltype(width)::value>(x.data + r * x.stride + c));
  });
  float centre[R];
  for (int r = 0; r < R; ++r) centre[r] = static_cast<float>(value.sums[0][r] / channels);

  RowSums<2, R> deviation;
  deviation.over(channels, US3L_LAMBDA(std::int64_t c, auto width, const auto& add) {
    US3L_UNROLL
    for (int r = 0; r < R; ++r) {
      const auto d = load<decltype(width)::value>(x.data + r * x.stride + c) - centre[r];
      add(0, r, d);
      add(1, r, d * d);
    }
  });
  for (int r = 0; r < R; ++r) {
    const double off = deviation.sums[0][r] / channels;  // what float rounding left between centre and mean
    const double variance = deviation.sums[1][r] / channels - off * off;
    mean[r] = static_cast<float>(centre[r] + off);
    rstd[r] = static_cast<float>(1.0 / __builtin_sqrt(variance + eps));
  }

  for_vectors(0, channels, US3L_LAMBDA(std::int64_t c, auto width) {
    constexpr int W = decltype(width)::value;
    const Float<W> w = load<W>(weight + c), b = load<W>(bias + c);
    US3L_UNROLL
    for (int r = 0; r < R; ++r)
      store<W>(y.data + r * y.stride + c, (load<W>(x.data + r * x.stride + c) - mean[r]) * rstd[r] * w + b);
  });
}

template <class T>
Rows<T> from(Rows<T> m, std::int64_t row) {
  return {m.data + row * m.stride, m.stride};
}

template <class T>
void forward(Rows<const T> x, Rows<T> y, std::int64_t rows, std::int64_t channels, const float* weight,
             const float* bias, double eps, float* mean, float* rstd) {
  std::int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    forward_rows<T, kRows>(from(x, row), from(y, row), channels, weight, bias, eps, mean + row, rstd + row);
  for (; row < rows; ++row)
    forward_rows<T, 1>(from(x, row), from(y, row), channels, weight, bias, eps, mean + row, rstd + row);
}

// dx = rstd (g - mean of g - n * mean of g n), where g = grad * weight and n = (x - mean) * rstd.
//
// A row at a time: with more, as in the forward, there are too many streams of loads and stores at once.
template <class T, bool kSums, bool kInput>
void backward_row(const T* grad, const T* x, T* dx, std::int64_t channels, const float* weight, float mean, float rstd,
                  float* sums) {
  RowSums<2, 1> g;  // of g, and of g times the deviation of x
  g.over(channels, US3L_LAMBDA(std::int64_t c, auto width, const auto& add) {
    constexpr int W = decltype(width)::value;
    const Float<W> upstream = load<W>(grad + c), deviation = load<W>(x + c) - mean;
    if constexpr (kInput) {
      const Float<W> weighted = upstream * load<W>(weight + c);
      add(0, 0, weighted);
      add(1, 0, weighted * deviation);
    }
    if constexpr (kSums) {
      store<W>(sums + c, load<W>(sums + c) + upstream * (deviation * rstd));
      store<W>(sums + channels + c, load<W>(sums + channels + c) + upstream);
    }
  });
  if constexpr (kInput) {
    const double scale = rstd;
    const float offset = static_cast<float>(-scale * g.sums[0][0] / channels);
    const float slope = static_cast<float>(-scale * scale * scale * g.sums[1][0] / channels);
    for_vectors(0, channels, US3L_LAMBDA(std::int64_t c, auto width) {
      constexpr int W = decltype(width)::value;
      const Float<W> deviation = load<W>(x + c) - mean;
      store<W>(dx + c, load<W>(grad + c) * load<W>(weight + c) * rstd + (deviation * slope + offset));
    });
  }
}

template <class T, bool kSums, bool kInput>
void backward_pass(Rows<const T> grad, Rows<const T> x, Rows<T> dx, std::int64_t rows, std::int64_t channels,
                   const float* weight, const float* mean, const float* rstd, float* sums, double* totals) {
  for (std::int64_t row = 0; row < rows; ++row) {
    backward_row<T, kSums, kInput>(from(grad, row).data, from(x, row).data, from(dx, row).data, channels, weight,
                                   mean[row], rstd[row], sums);
    if constexpr (kSums)
      if ((row + 1) % kBlockRows == 0 || row + 1 == rows)
        for (std::int64_t i = 0; i < 2 * channels; ++i) {
          totals[i] += sums[i];
          sums[i] = 0.f;
        }
  }
}

template <class T>
void backward(Rows<const T> grad, Rows<const T> x, Rows<T> dx, std::int64_t rows, std::int64_t channels,
              const float* weight, const float* mean, const float* rstd, float* sums, double* totals) {
  const auto pass = totals == nullptr    ? backward_pass<T, false, true>
                    : dx.data == nullptr ? backward_pass<T, true, false>
                                         : backward_pass<T, true, true>;
  pass(grad, x, dx, rows, channels, weight, mean, rstd, sums, totals);
}

template <class T>
LayerNormKernels<T> layer_norm_kernels() {
  return {forward<T>, backward<T>};
}
template LayerNormKernels<float> layer_norm_kernels();
template LayerNormKernels<BFloat16> layer_norm_kernels();

#undef US3L_LAMBDA
