// The passes of batch norm, written once. Each batch_norm_<isa>.cpp includes this file inside a namespace of its own,
// with LANES floats to a vector, under that instruction set's compiler options. So nothing here may be a function of
// the standard library: the linker would keep one copy of it for all.
//
// Vectors are the compiler's own (GCC and clang), so that one text serves every instruction set. Columns that do not
// fill a vector go to vectors of half the width, down to one lane: any number of channels, no masks.

#define US3L_INLINE inline __attribute__((always_inline))

// Rows whose partial sums are kept in float before they go to double.
constexpr std::int64_t kBlockRows = 64;

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
US3L_INLINE Float<W> load(const BFloat16* p) {
  typename Lanes<W>::Half half;
  __builtin_memcpy(&half, p, sizeof half);
  const typename Lanes<W>::Word word = __builtin_convertvector(half, typename Lanes<W>::Word) << 16;
  return (Float<W>)word;
}

template <int W>
US3L_INLINE void store(float* p, Float<W> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <int W>
US3L_INLINE void store(BFloat16* p, Float<W> v) {  // to nearest even; a NaN stays one
  using Word = typename Lanes<W>::Word;
  const Word word = (Word)v;
  const Word rounded = word + 0x7fff + ((word >> 16) & 1), quiet = word | 0x400000;
  const typename Lanes<W>::Half half =
      __builtin_convertvector((v == v ? rounded : quiet) >> 16, typename Lanes<W>::Half);
  __builtin_memcpy(p, &half, sizeof half);
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

template <class T, bool kResidual>
struct Normalise {
  Rows<const T> x, residual;
  Rows<T> y;
  Affine affine;
  Clamp clamp;
  std::int64_t first = 0, last = 0;

  template <int W, int N, int U>
  US3L_INLINE void columns(std::int64_t c) const {
    Float<W> mean[N], scale[N], bias[N];
    for (int n = 0; n < N; ++n) {
      mean[n] = load<W>(affine.mean + c + n * W);
      scale[n] = load<W>(affine.scale + c + n * W);
      bias[n] = load<W>(affine.bias + c + n * W);
    }
    const Float<W> low = clamp.low - Float<W>{}, high = clamp.high - Float<W>{};
    const T* in = x.data + first * x.stride + c;
    const T* add = kResidual ? residual.data + first * residual.stride + c : nullptr;
    T* out = y.data + first * y.stride + c;
    for (std::int64_t r = first; r < last; ++r, in += x.stride, out += y.stride) {
      for (int n = 0; n < N; ++n) {
        Float<W> z = (load<W>(in + n * W) - mean[n]) * scale[n] + bias[n];
        if constexpr (kResidual) z += load<W>(add + n * W);
        z = z < low ? low : z;
        z = z > high ? high : z;
        store<W>(out + n * W, z);
      }
      if constexpr (kResidual) add += residual.stride;
    }
  }
};

template <class T>
void normalise(Rows<const T> x, Rows<const T> residual, Rows<T> y, std::int64_t rows, std::int64_t channels,
               Affine affine, Clamp clamp) {
  if (residual.data != nullptr) {
    Normalise<T, true> pass{x, residual, y, affine, clamp};
    for_blocks_backwards(rows, channels, pass);
  } else {
    Normalise<T, false> pass{x, residual, y, affine, clamp};
    for_blocks_backwards(rows, channels, pass);
  }
}

template <class T, bool kMask>
struct Reduce {
  Rows<const T> grad, x, y;
  Rows<T> masked;
  std::int64_t first, last;
  const float* mean;
  Clamp clamp;
  double *sum_g, *sum_gx;

  template <int W, int N, int U>
  US3L_INLINE void columns(std::int64_t c) const {
    Float<W> centre[N], g_sum[U][N] = {}, gx_sum[U][N] = {};
    for (int n = 0; n < N; ++n) centre[n] = load<W>(mean + c + n * W);
    const std::int64_t whole = last - (last - first) % U;
    std::int64_t r = first;
    for (; r < whole; r += U)
      for (int u = 0; u < U; ++u) row<W, N>(r + u, c, centre, g_sum[u], gx_sum[u]);
    for (; r < last; ++r) row<W, N>(r, c, centre, g_sum[0], gx_sum[0]);
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

  template <int W, int N>
  US3L_INLINE void row(std::int64_t r, std::int64_t c, const Float<W>* centre, Float<W>* g_sum,
                       Float<W>* gx_sum) const {
    const T* const grad_row = grad.data + r * grad.stride + c;
    const T* const x_row = x.data + r * x.stride + c;
    for (int n = 0; n < N; ++n) {
      Float<W> g = load<W>(grad_row + n * W);
      if constexpr (kMask) {
        const Float<W> z = load<W>(y.data + r * y.stride + c + n * W);
        g = (z <= clamp.low) | (z >= clamp.high) ? Float<W>{} : g;
        if (masked.data != nullptr) store<W>(masked.data + r * masked.stride + c + n * W, g);
      }
      g_sum[n] += g;
      gx_sum[n] += g * (load<W>(x_row + n * W) - centre[n]);
    }
  }
};

template <class T>
void reduce(Rows<const T> grad, Rows<const T> x, Rows<const T> y, Rows<T> masked, std::int64_t rows,
            std::int64_t channels, const float* mean, Clamp clamp, double* sum_g, double* sum_gx) {
  for (std::int64_t c = 0; c < channels; ++c) sum_g[c] = sum_gx[c] = 0.0;
  for (std::int64_t first = 0; first < rows; first += kBlockRows) {
    const std::int64_t last = first + kBlockRows < rows ? first + kBlockRows : rows;
    if (y.data != nullptr)
      for_columns<LANES>(0, channels,
                         Reduce<T, true>{grad, x, y, masked, first, last, mean, clamp, sum_g, sum_gx});
    else
      for_columns<LANES>(0, channels,
                         Reduce<T, false>{grad, x, y, masked, first, last, mean, clamp, sum_g, sum_gx});
  }
}

template <class T>
struct InputGradient {
  Rows<const T> g, x;
  Rows<T> dx;
  const float *mean, *scale, *slope, *offset;
  std::int64_t first = 0, last = 0;

  template <int W, int N, int U>
  US3L_INLINE void columns(std::int64_t c) const {
    Float<W> centre[N], a[N], b[N], d[N];
    for (int n = 0; n < N; ++n) {
      centre[n] = load<W>(mean + c + n * W);
      a[n] = load<W>(scale + c + n * W);
      b[n] = load<W>(slope + c + n * W);
      d[n] = load<W>(offset + c + n * W);
    }
    const T* grad_row = g.data + first * g.stride + c;
    const T* x_row = x.data + first * x.stride + c;
    T* out = dx.data + first * dx.stride + c;
    for (std::int64_t r = first; r < last; ++r, grad_row += g.stride, x_row += x.stride, out += dx.stride)
      for (int n = 0; n < N; ++n)
        store<W>(out + n * W, load<W>(grad_row + n * W) * a[n] +
                                  ((load<W>(x_row + n * W) - centre[n]) * b[n] + d[n]));
  }
};

template <class T>
void input_gradient(Rows<const T> g, Rows<const T> x, Rows<T> dx, std::int64_t rows, std::int64_t channels,
                    const float* mean, const float* scale, const float* slope, const float* offset) {
  InputGradient<T> pass{g, x, dx, mean, scale, slope, offset};
  for_blocks_backwards(rows, channels, pass);
}

template <class T>
BatchNormKernels<T> batch_norm_kernels() {
  return {statistics<T>, normalise<T>, reduce<T>, input_gradient<T>};
}
template BatchNormKernels<float> batch_norm_kernels();
template BatchNormKernels<BFloat16> batch_norm_kernels();

#undef US3L_INLINE
