// The passes of batch norm, written once. Each batch_norm_<isa>.cpp includes this file inside a namespace of its own,
// with LANES floats to a vector, under that instruction set's compiler options. So nothing here may be a function of
// the standard library: the linker would keep one copy of it for all.

#include "vector_body.h"
#include "bfloat16_body.h"

// Rows whose partial sums are kept in float before they go to double.
constexpr std::int64_t kBlockRows = 64;

template <int W, int N>
US3L_INLINE void load_columns(Float<W>* v, const float* p) {
  for (int n = 0; n < N; ++n) v[n] = load<W>(p + n * W);
}

// Written once: forward and backward must agree to the last bit on what is inside the clamp.
template <int W>
US3L_INLINE Float<W> normalised(Float<W> x, Float<W> mean, Float<W> scale, Float<W> bias) {
  return (x - mean) * scale + bias;
}

template <int W>
US3L_INLINE Float<W> inside(Float<W> g, Float<W> z, Clamp clamp) {
  return ((z <= clamp.low) | (z >= clamp.high)) ? Float<W>{} : g;
}

// Calls pass.template columns<W, N, U>(c) for column blocks of N vectors of W lanes that together cover [c, end).
// N * U = 4 independent sums hide the latency of the addition: U rows at a time where the block is narrow.
template <int W, class Pass>
US3L_INLINE void for_columns(std::int64_t c, std::int64_t end, const Pass& pass) {
  if constexpr (W == LANES) {
    for (; c + 4 * W <= end; c += 4 * W) pass.template columns<W, 4, 1>(c);
    for (; c + 2 * W <= end; c += 2 * W) pass.template columns<W, 2, 2>(c);
  }
  for (; c + W <= end; c += W) pass.template columns<W, 1, 4>(c);
  if constexpr (W > 1) for_columns<W / 2>(c, end, pass);
}

// Row blocks, last to first: the pass that follows a reduction starts with the rows that are still in the cache.
template <class Pass>
US3L_INLINE void for_blocks_backwards(std::int64_t rows, std::int64_t channels, Pass& pass) {
  for (std::int64_t block = (rows + kBlockRows - 1) / kBlockRows; block-- > 0;) {
    pass.first = block * kBlockRows;
    pass.last = pass.first + kBlockRows < rows ? pass.first + kBlockRows : rows;
    for_columns<LANES>(0, channels, pass);
  }
}

// Results of more memory than this are written around the cache: they would be gone from it before they are read, and what
// is there would be read first.
constexpr std::int64_t kLargest = std::int64_t{4} << 20;

template <class T>
US3L_INLINE bool around_cache(Rows<T> y, std::int64_t rows) {
  constexpr std::uintptr_t kVector = LANES * sizeof(float);
  const std::int64_t row = y.stride * static_cast<std::int64_t>(sizeof(T));
  return sizeof(T) == sizeof(float) && rows * row >= kLargest && row % kVector == 0 &&
         reinterpret_cast<std::uintptr_t>(y.data) % kVector == 0;
}

template <int W, bool kAround, class T>
US3L_INLINE void store_result(T* p, Float<W> v) {
  if constexpr (kAround && W == LANES && sizeof(T) == sizeof(float))
    store_around_cache<W>(p, v);
  else
    store<W>(p, v);
}

// Mean first, then the deviations from it while the block is in the cache: exact however far the mean is from zero.
// Blocks are merged in double by the formula of Chan, Golub and LeVeque (1983).
template <class T>
struct Statistics {
  Rows<const T> x;
  std::int64_t first, last;
  double *mean, *m2;

  template <int W, int N, int U>
  US3L_INLINE void columns(std::int64_t c) const {
    const T* const origin = x.data + first * x.stride + c;
    const std::int64_t rows = last - first, whole = rows - rows % U;
    const float count = static_cast<float>(rows);

    Float<W> sum[U][N] = {};
    const T* row = origin;
    for (std::int64_t r = 0; r < whole; r += U)
      for (int u = 0; u < U; ++u, row += x.stride)
        for (int n = 0; n < N; ++n) sum[u][n] += load<W>(row + n * W);
    for (std::int64_t r = whole; r < rows; ++r, row += x.stride)
      for (int n = 0; n < N; ++n) sum[0][n] += load<W>(row + n * W);

    Float<W> centre[N], deviation[U][N] = {}, square[U][N] = {};
    for (int n = 0; n < N; ++n) {
      for (int u = 1; u < U; ++u) sum[0][n] += sum[u][n];
      centre[n] = sum[0][n] / count;
    }
    row = origin;
    for (std::int64_t r = 0; r < whole; r += U)
      for (int u = 0; u < U; ++u, row += x.stride)
        for (int n = 0; n < N; ++n) {
          const Float<W> d = load<W>(row + n * W) - centre[n];
          deviation[u][n] += d;
          square[u][n] += d * d;
        }
    for (std::int64_t r = whole; r < rows; ++r, row += x.stride)
      for (int n = 0; n < N; ++n) {
        const Float<W> d = load<W>(row + n * W) - centre[n];
        deviation[0][n] += d;
        square[0][n] += d * d;
      }
    for (int u = 1; u < U; ++u)
      for (int n = 0; n < N; ++n) {
        deviation[0][n] += deviation[u][n];
        square[0][n] += square[u][n];
      }

    const double share = static_cast<double>(rows) / static_cast<double>(last);  // of all rows seen so far
    const double weight = share * static_cast<double>(first), inverse = 1.0 / static_cast<double>(rows);
    for (int n = 0; n < N; ++n)
      for (int i = 0; i < W; ++i) {
        const std::int64_t k = c + n * W + i;
        const double off = deviation[0][n][i] * inverse;  // what float rounding left between centre and mean
        const double delta = centre[n][i] + off - mean[k];
        mean[k] += delta * share;
        m2[k] += square[0][n][i] - off * deviation[0][n][i] + delta * delta * weight;
      }
  }
};

template <class T>
void statistics(Rows<const T> x, std::int64_t rows, std::int64_t channels, double* mean, double* m2) {
  for (std::int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0.0;
  for (std::int64_t first = 0; first < rows; first += kBlockRows) {
    const std::int64_t last = first + kBlockRows < rows ? first + kBlockRows : rows;
    for_columns<LANES>(0, channels, Statistics<T>{x, first, last, mean, m2});
  }
}

template <class T, bool kResidual, bool kAround>
struct Normalise {
  Rows<const T> x, residual;
  Rows<T> y;
  Affine affine;
  Clamp clamp;
  std::int64_t first = 0, last = 0;

  template <int W, int N, int U>
  US3L_INLINE void columns(std::int64_t c) const {
    Float<W> mean[N], scale[N], bias[N];
    load_columns<W, N>(mean, affine.mean + c);
    load_columns<W, N>(scale, affine.scale + c);
    load_columns<W, N>(bias, affine.bias + c);
    const Float<W> low = clamp.low - Float<W>{}, high = clamp.high - Float<W>{};
    const T* in = x.data + first * x.stride + c;
    const T* add = kResidual ? residual.data + first * residual.stride + c : nullptr;
    T* out = y.data + first * y.stride + c;
    for (std::int64_t r = first; r < last; ++r, in += x.stride, out += y.stride) {
      for (int n = 0; n < N; ++n) {
        Float<W> z = normalised<W>(load<W>(in + n * W), mean[n], scale[n], bias[n]);
        if constexpr (kResidual) z += load<W>(add + n * W);
        z = z < low ? low : z;
        z = z > high ? high : z;
        store_result<W, kAround>(out + n * W, z);
      }
      if constexpr (kResidual) add += residual.stride;
    }
  }
};

template <class T, bool kAround>
US3L_INLINE void normalise_rows(Rows<const T> x, Rows<const T> residual, Rows<T> y, std::int64_t rows,
                                std::int64_t channels, Affine affine, Clamp clamp) {
  if (residual.data != nullptr) {
    Normalise<T, true, kAround> pass{x, residual, y, affine, clamp};
    for_blocks_backwards(rows, channels, pass);
  } else {
    Normalise<T, false, kAround> pass{x, residual, y, affine, clamp};
    for_blocks_backwards(rows, channels, pass);
  }
}

template <class T>
void normalise(Rows<const T> x, Rows<const T> residual, Rows<T> y, std::int64_t rows, std::int64_t channels,
               Affine affine, Clamp clamp) {
  if (!around_cache(y, rows)) return normalise_rows<T, false>(x, residual, y, rows, channels, affine, clamp);
  normalise_rows<T, true>(x, residual, y, rows, channels, affine, clamp);
  finish_stores_around_cache();
}

enum class Mask { none, from_y, from_x };

template <class T, Mask kMask>
struct Reduce {
  Rows<const T> grad, x, y;
  Rows<T> masked;
  std::int64_t first, last;
  Affine affine;
  Clamp clamp;
  double *sum_g, *sum_gx;

  template <int W, int N, int U>
  US3L_INLINE void columns(std::int64_t c) const {
    Float<W> mean[N], scale[N], bias[N], g_sum[U][N] = {}, gx_sum[U][N] = {};
    load_columns<W, N>(mean, affine.mean + c);
    if constexpr (kMask == Mask::from_x) {
      load_columns<W, N>(scale, affine.scale + c);
      load_columns<W, N>(bias, affine.bias + c);
    }
    const auto row = [&](std::int64_t r, int u) __attribute__((always_inline)) {
      for (int n = 0; n < N; ++n) {
        const Float<W> value = load<W>(x.data + r * x.stride + c + n * W);
        Float<W> g = load<W>(grad.data + r * grad.stride + c + n * W);
        if constexpr (kMask == Mask::from_x)
          g = inside<W>(g, rounded<T, W>(normalised<W>(value, mean[n], scale[n], bias[n])), clamp);
        if constexpr (kMask == Mask::from_y) {
          g = inside<W>(g, load<W>(y.data + r * y.stride + c + n * W), clamp);
          if (masked.data != nullptr) store<W>(masked.data + r * masked.stride + c + n * W, g);
        }
        g_sum[u][n] += g;
        gx_sum[u][n] += g * (value - mean[n]);
      }
    };
    std::int64_t r = first;
    for (; r + U <= last; r += U)
      for (int u = 0; u < U; ++u) row(r + u, u);
    for (; r < last; ++r) row(r, 0);
    for (int n = 0; n < N; ++n) {
      for (int u = 1; u < U; ++u) {
        g_sum[0][n] += g_sum[u][n];
        gx_sum[0][n] += gx_sum[u][n];
      }
      for (int i = 0; i < W; ++i) {
        sum_g[c + n * W + i] += g_sum[0][n][i];
        sum_gx[c + n * W + i] += gx_sum[0][n][i];
      }
    }
  }
};

template <class T, Mask kMask>
void reduce_masked(Rows<const T> grad, Rows<const T> x, Rows<const T> y, Rows<T> masked, std::int64_t rows,
                   std::int64_t channels, Affine affine, Clamp clamp, double* sum_g, double* sum_gx) {
  for (std::int64_t c = 0; c < channels; ++c) sum_g[c] = sum_gx[c] = 0.0;
  for (std::int64_t first = 0; first < rows; first += kBlockRows) {
    const std::int64_t last = first + kBlockRows < rows ? first + kBlockRows : rows;
    for_columns<LANES>(0, channels,
                       Reduce<T, kMask>{grad, x, y, masked, first, last, affine, clamp, sum_g, sum_gx});
  }
}

template <class T>
void reduce(Rows<const T> grad, Rows<const T> x, Rows<const T> y, Rows<T> masked, std::int64_t rows,
            std::int64_t channels, Affine affine, Clamp clamp, double* sum_g, double* sum_gx) {
  const auto pass = y.data != nullptr        ? reduce_masked<T, Mask::from_y>
                    : affine.bias != nullptr ? reduce_masked<T, Mask::from_x>
                                             : reduce_masked<T, Mask::none>;
  pass(grad, x, y, masked, rows, channels, affine, clamp, sum_g, sum_gx);
}

template <class T, Mask kMask, bool kAround>
struct InputGradient {
  Rows<const T> grad, x;
  Rows<T> dx;
  Affine affine;
  const float *slope, *offset;
  Clamp clamp;
  std::int64_t first = 0, last = 0;

  template <int W, int N, int U>
  US3L_INLINE void columns(std::int64_t c) const {
    Float<W> mean[N], scale[N], bias[N], a[N], b[N];
    load_columns<W, N>(mean, affine.mean + c);
    load_columns<W, N>(scale, affine.scale + c);
    load_columns<W, N>(a, slope + c);
    load_columns<W, N>(b, offset + c);
    if constexpr (kMask == Mask::from_x) load_columns<W, N>(bias, affine.bias + c);
    const T* grad_row = grad.data + first * grad.stride + c;
    const T* x_row = x.data + first * x.stride + c;
    T* out = dx.data + first * dx.stride + c;
    for (std::int64_t r = first; r < last; ++r, grad_row += grad.stride, x_row += x.stride, out += dx.stride)
      for (int n = 0; n < N; ++n) {
        const Float<W> value = load<W>(x_row + n * W);
        Float<W> g = load<W>(grad_row + n * W);
        if constexpr (kMask == Mask::from_x)
          g = inside<W>(g, rounded<T, W>(normalised<W>(value, mean[n], scale[n], bias[n])), clamp);
        store_result<W, kAround>(out + n * W, g * scale[n] + ((value - mean[n]) * a[n] + b[n]));
      }
  }
};

template <class T, bool kAround>
US3L_INLINE void input_gradient_rows(Rows<const T> grad, Rows<const T> x, Rows<T> dx, std::int64_t rows,
                                     std::int64_t channels, Affine affine, const float* slope, const float* offset,
                                     Clamp clamp) {
  if (affine.bias != nullptr) {
    InputGradient<T, Mask::from_x, kAround> pass{grad, x, dx, affine, slope, offset, clamp};
    for_blocks_backwards(rows, channels, pass);
  } else {
    InputGradient<T, Mask::none, kAround> pass{grad, x, dx, affine, slope, offset, clamp};
    for_blocks_backwards(rows, channels, pass);
  }
}

template <class T>
void input_gradient(Rows<const T> grad, Rows<const T> x, Rows<T> dx, std::int64_t rows, std::int64_t channels,
                    Affine affine, const float* slope, const float* offset, Clamp clamp) {
  if (dx.data == grad.data || !around_cache(dx, rows))
    return input_gradient_rows<T, false>(grad, x, dx, rows, channels, affine, slope, offset, clamp);
  input_gradient_rows<T, true>(grad, x, dx, rows, channels, affine, slope, offset, clamp);
  finish_stores_around_cache();
}

template <class T>
BatchNormKernels<T> batch_norm_kernels() {
  return {statistics<T>, normalise<T>, reduce<T>, input_gradient<T>};
}
template BatchNormKernels<float> batch_norm_kernels();
template BatchNormKernels<BFloat16> batch_norm_kernels();

