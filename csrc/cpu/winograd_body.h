// The transforms of winograd_kernels.h, written once. Each winograd_<isa>.cpp includes this file
// inside a namespace of its own, with LANES floats to a vector, under that instruction set's compiler options. So
// nothing here may be a function of the standard library: the linker would keep one copy of it for all.

#include "vector_body.h"
#include "bfloat16_body.h"

// ---------------------------------------------------------------------------------------------- one dimension

// The points of interpolation are 0, +-a, +-b and infinity. With 5/8 and 3/2 the largest error in float32 is a fifth of
// that with the usual 1 and 2, found by search; all products of them are exact in float32.
constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;
constexpr float kScale0 = static_cast<float>(1.0 / (0.390625 * 2.25));
constexpr float kScaleA = static_cast<float>(1.0 / (2 * 0.390625 * (0.390625 - 2.25)));
constexpr float kScaleB = static_cast<float>(1.0 / (2 * 2.25 * (2.25 - 0.390625)));

template <class V>
US3L_INLINE void input_transform(V* d) {  // B': 6 -> 6
  const V zero = kA2 * kB2 * d[0] - (kA2 + kB2) * d[2] + d[4], infinity = kA2 * kB2 * d[1] - (kA2 + kB2) * d[3] + d[5];
  const V even_a = d[4] - kB2 * d[2], odd_a = d[3] - kB2 * d[1];
  const V even_b = d[4] - kA2 * d[2], odd_b = d[3] - kA2 * d[1];
  d[0] = zero;
  d[1] = even_a + kA * odd_a;
  d[2] = even_a - kA * odd_a;
  d[3] = even_b + kB * odd_b;
  d[4] = even_b - kB * odd_b;
  d[5] = infinity;
}

template <class V>
US3L_INLINE void input_adjoint(V* d) {  // B: 6 -> 6
  const V even_a = d[1] + d[2], odd_a = kA * (d[1] - d[2]), even_b = d[3] + d[4], odd_b = kB * (d[3] - d[4]);
  const V zero = d[0], infinity = d[5];
  d[0] = kA2 * kB2 * zero;
  d[1] = kA2 * kB2 * infinity - kB2 * odd_a - kA2 * odd_b;
  d[2] = -(kA2 + kB2) * zero - kB2 * even_a - kA2 * even_b;
  d[3] = odd_a + odd_b - (kA2 + kB2) * infinity;
  d[4] = zero + even_a + even_b;
}

template <class V>
US3L_INLINE void output_transform(V* m) {  // A': 6 -> 4
  const V even_a = m[1] + m[2], odd_a = kA * (m[1] - m[2]), even_b = m[3] + m[4], odd_b = kB * (m[3] - m[4]);
  m[0] = m[0] + even_a + even_b;
  m[1] = odd_a + odd_b;
  m[2] = kA2 * even_a + kB2 * even_b;
  m[3] = kA2 * odd_a + kB2 * odd_b + m[5];
}

template <class V>
US3L_INLINE void output_adjoint(V* y) {  // A: 4 -> 6
  const V even_a = y[0] + kA2 * y[2], odd_a = kA * (y[1] + kA2 * y[3]);
  const V even_b = y[0] + kB2 * y[2], odd_b = kB * (y[1] + kB2 * y[3]);
  y[5] = y[3];
  y[1] = even_a + odd_a;
  y[2] = even_a - odd_a;
  y[3] = even_b + odd_b;
  y[4] = even_b - odd_b;
}

template <class V>
US3L_INLINE void filter_transform(V* w) {  // G: 3 -> 6
  const V even_a = kScaleA * (w[0] + kA2 * w[2]), odd_a = kScaleA * kA * w[1];
  const V even_b = kScaleB * (w[0] + kB2 * w[2]), odd_b = kScaleB * kB * w[1];
  w[5] = w[2];
  w[0] = kScale0 * w[0];
  w[1] = even_a + odd_a;
  w[2] = even_a - odd_a;
  w[3] = even_b + odd_b;
  w[4] = even_b - odd_b;
}

template <class V>
US3L_INLINE void filter_adjoint(V* u) {  // G': 6 -> 3
  const V even_a = kScaleA * (u[1] + u[2]), odd_a = kScaleA * (u[1] - u[2]);
  const V even_b = kScaleB * (u[3] + u[4]), odd_b = kScaleB * (u[3] - u[4]);
  u[0] = kScale0 * u[0] + even_a + even_b;
  u[1] = kA * odd_a + kB * odd_b;
  u[2] = kA2 * even_a + kB2 * even_b + u[5];
}

// The two dimensions of a transform, I x I -> O x O: columns as they come from load(i, j), then rows, which go to
// store(i, j, value).
template <class V, int I, int O, class Load, class Transform, class Store>
US3L_INLINE void transform_square(const Load& load, const Transform& transform, const Store& store) {
  constexpr int kLarger = I > O ? I : O;
  V square[O][kLarger];
  US3L_UNROLL
  for (int j = 0; j < I; ++j) {
    V column[kLarger];
    US3L_UNROLL
    for (int i = 0; i < I; ++i) column[i] = load(i, j);
    transform(column);
    US3L_UNROLL
    for (int i = 0; i < O; ++i) square[i][j] = column[i];
  }
  US3L_UNROLL
  for (int i = 0; i < O; ++i) {
    transform(square[i]);
    US3L_UNROLL
    for (int j = 0; j < O; ++j) store(i, j, square[i][j]);
  }
}

#define US3L_LAMBDA(...) [&](__VA_ARGS__) __attribute__((always_inline))

// ---------------------------------------------------------------------------------------------- filters

// Rows come by the lane: where that is the outer dimension of the filters, a row at a time would read a cache line of
// each lane for one number of it, and they would push each other out.
void transform_filters(Filters<const float> w, float* u, std::int64_t position) {
  using Vector = Float<LANES>;
  constexpr std::int64_t kRows = 16;
  for (std::int64_t first = 0; first < w.rows; first += kRows) {
    const std::int64_t rows = w.rows - first < kRows ? w.rows - first : kRows;
    float taps[kRows][9][LANES] = {};
    for (std::int64_t l = 0; l < w.lanes; ++l)
      for (int t = 0; t < 9; ++t) {
        const float* filter = w.data + first * w.row + l * w.lane + t / 3 * w.tap_y + t % 3 * w.tap_x;
        for (std::int64_t r = 0; r < rows; ++r, filter += w.row) taps[r][t][l] = *filter;
      }
    for (std::int64_t r = 0; r < rows; ++r) {
      float* const out = u + (first + r) * LANES;
      transform_square<Vector, 3, 6>(
          US3L_LAMBDA(int i, int j) { return load<LANES>(taps[r][i * 3 + j]); },
          US3L_LAMBDA(Vector* v) { filter_transform(v); },
          US3L_LAMBDA(int i, int j, Vector v) { store<LANES>(out + (i * 6 + j) * position, v); });
    }
  }
}

void add_filter_gradients(Stack u, std::int64_t copies, std::int64_t copy, Filters<float> w) {
  using Vector = Float<LANES>;
  for (std::int64_t r = 0; r < w.rows; ++r)
    for (std::int64_t first = 0; first < w.lanes; first += LANES) {
      float taps[9][LANES];
      const float* const in = u.data + r * u.row + first;
      transform_square<Vector, 6, 3>(
          US3L_LAMBDA(int i, int j) {
            const float* const p = in + (i * 6 + j) * u.position;
            Vector sum = load<LANES>(p);
            for (std::int64_t n = 1; n < copies; ++n) sum += load<LANES>(p + n * copy);
            return sum;
          },
          US3L_LAMBDA(Vector* v) { filter_adjoint(v); },
          US3L_LAMBDA(int i, int j, Vector v) { store<LANES>(taps[i * 3 + j], v); });
      const std::int64_t lanes = w.lanes - first < LANES ? w.lanes - first : LANES;
      for (int t = 0; t < 9; ++t) {
        float* out = w.data + r * w.row + first * w.lane + t / 3 * w.tap_y + t % 3 * w.tap_x;
        for (std::int64_t l = 0; l < lanes; ++l, out += w.lane) *out += taps[t][l];
      }
    }
}

// ---------------------------------------------------------------------------------------------- tiles

// A window of S x S pixels of an image, with the distance of its corner from the first element.
template <int S>
struct Window {
  std::int64_t corner;
  std::uint64_t inside;  // bit i * S + j: whether that pixel lies in the image

  static constexpr std::uint64_t kAll = (std::uint64_t{1} << S * S) - 1;
  bool has(int i, int j) const { return inside >> (i * S + j) & 1; }
};

// Calls f(t, window) for each of the tiles, with the window of S x S pixels whose corner is `margin` before the tile's.
template <int S, class T, class F>
US3L_INLINE void for_tiles(const Grid& grid, Tiles tiles, const Pixels<T>& pixels, std::int64_t margin, const F& f) {
  std::int64_t image = tiles.first / grid.tiles_of_image();
  std::int64_t row = tiles.first % grid.tiles_of_image() / grid.columns, column = tiles.first % grid.columns;
  for (std::int64_t t = 0; t < tiles.count; ++t) {
    const std::int64_t y = 4 * row - margin, x = 4 * column - margin;
    const std::int64_t top = y < 0 ? -y : 0, left = x < 0 ? -x : 0;
    const std::int64_t bottom = grid.height - y < S ? grid.height - y : S;
    const std::int64_t right = grid.width - x < S ? grid.width - x : S;
    const std::uint64_t line = ((std::uint64_t{1} << right) - 1) >> left << left;
    std::uint64_t inside = 0;
    for (std::int64_t i = top; i < bottom; ++i) inside |= line << (i * S);
    f(t, Window<S>{image * pixels.image + y * pixels.row + x * pixels.pixel, inside});
    if (++column == grid.columns) {
      column = 0;
      if (++row == grid.rows) {
        row = 0;
        ++image;
      }
    }
  }
}

// Calls f(channel, Width<W>) for vectors of W lanes that together cover [channel, end).
template <int W>
struct Width {
  static constexpr int value = W;
};

template <int W = LANES, class F>
US3L_INLINE void for_channels(std::int64_t channel, std::int64_t end, const F& f) {
  for (; channel + W <= end; channel += W) f(channel, Width<W>{});
  if constexpr (W > 1) for_channels<W / 2>(channel, end, f);
}

// Calls f(Inside) with Inside::value true if the whole window is in the image: the usual case, without conditions.
template <bool kInside>
struct Inside {
  static constexpr bool value = kInside;
};

template <int S, class F>
US3L_INLINE void for_window(const Window<S>& window, const F& f) {
  if (window.inside == Window<S>::kAll)
    f(Inside<true>{});
  else
    f(Inside<false>{});
}

// The pixels of a window as they are read: one outside of the image as the nearest one inside, and then masked.
template <int S>
struct Border {
  std::int64_t row[S], pixel[S];
  std::uint32_t mask[S][S];

  template <class T>
  US3L_INLINE void set(const Window<S>& window, const Pixels<T>& p) {
    int top = S, bottom = 0, left = S, right = 0;
    for (int i = 0; i < S; ++i)
      for (int j = 0; j < S; ++j) {
        mask[i][j] = window.has(i, j) ? ~std::uint32_t{0} : 0;
        if (mask[i][j] == 0) continue;
        top = i < top ? i : top;
        bottom = i;
        left = j < left ? j : left;
        right = j > right ? j : right;
      }
    for (int i = 0; i < S; ++i) {
      row[i] = (i < top ? top : i > bottom ? bottom : i) * p.row;
      pixel[i] = (i < left ? left : i > right ? right : i) * p.pixel;
    }
  }
};

template <int W>
US3L_INLINE Float<W> masked(Float<W> v, std::uint32_t mask) {
  using Word = typename Lanes<W>::Word;
  return (Float<W>)((Word)v & mask);
}

template <int W>
US3L_INLINE Float<W> normalised(Float<W> x, const NormOnRead& norm, std::int64_t of_view, std::int64_t c) {
  return (x - load<W>(norm.mean + of_view + c)) * load<W>(norm.scale + of_view + c) + load<W>(norm.bias + c);
}

// The value of a pixel as it goes into a transform: norms and rounding as the operation alone would do them.
template <class T>
struct Normalised {
  const NormOnRead& norm;
  std::int64_t of_view;  // the view's part of mean and scale

  template <int W>
  US3L_INLINE Float<W> operator()(Float<W> x, std::int64_t, std::int64_t c) const {
    const Float<W> z = normalised<W>(x, norm, of_view, c);
    return rounded<T, W>(z < 0.f ? Float<W>{} : z);
  }
};

template <class T>
struct AsItIs {
  template <int W>
  US3L_INLINE Float<W> operator()(Float<W> x, std::int64_t, std::int64_t) const {
    return x;
  }
};

template <class T, bool kMasked>
struct NormGradient {
  const NormBackwardOnRead<T>& backward;
  std::int64_t of_view, corner;

  // `pixel`: the distance from the window's corner, in a tensor like backward.x.
  template <int W>
  US3L_INLINE Float<W> operator()(Float<W> g, std::int64_t pixel, std::int64_t c) const {
    const NormOnRead& norm = backward.norm;
    const Float<W> x = load<W>(backward.x.data + corner + pixel + c);
    const Float<W> centred = x - load<W>(norm.mean + of_view + c), scale = load<W>(norm.scale + of_view + c);
    if constexpr (kMasked) {
      const Float<W> z = rounded<T, W>(centred * scale + load<W>(norm.bias + c));
      g = z <= 0.f ? Float<W>{} : g;
    }
    return rounded<T, W>(g * scale + (centred * load<W>(backward.slope + of_view + c) +
                                      load<W>(backward.offset + of_view + c)));
  }
};

// v = the transform of the window of each tile, zeros outside of the image. value_of(t) gives what is done to the values
// of a tile as they are read.
template <int S, class T, class ValueOf, class Transform>
US3L_INLINE void transform_windows(const Grid& grid, Tiles tiles, const Pixels<const T>& x, Stack v,
                                   std::int64_t margin, const ValueOf& value_of, const Transform& transform) {
  for_tiles<S>(grid, tiles, x, margin, US3L_LAMBDA(std::int64_t t, const Window<S>& window) {
    const auto value = value_of(t, window);
    for_window(window, US3L_LAMBDA(auto inside) {
      Border<S> border;
      if constexpr (!decltype(inside)::value) border.set(window, x);
      for_channels(0, x.channels, US3L_LAMBDA(std::int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        const T* const in = x.data + window.corner + c;
        float* const out = v.data + t * v.row + c;
        transform_square<Float<W>, S, 6>(
            US3L_LAMBDA(int i, int j) {
              if constexpr (decltype(inside)::value) {
                const std::int64_t pixel = i * x.row + j * x.pixel;
                return value.template operator()<W>(load<W>(in + pixel), pixel, c);
              } else {
                const std::int64_t pixel = border.row[i] + border.pixel[j];
                return masked<W>(value.template operator()<W>(load<W>(in + pixel), pixel, c), border.mask[i][j]);
              }
            },
            transform, US3L_LAMBDA(int i, int j, Float<W> value) { store<W>(out + (i * 6 + j) * v.position, value); });
      });
    });
  });
}

// Where the numbers of a tile's view are.
US3L_INLINE std::int64_t view_of(const Grid& grid, Tiles tiles, std::int64_t t, const NormOnRead& norm,
                                 std::int64_t channels) {
  return (tiles.first + t) / grid.tiles_of_image() / norm.images_of_view * channels;
}

template <class T>
void transform_input(Grid grid, Tiles tiles, Pixels<const T> x, const NormOnRead* norm, Stack v) {
  const auto transform = US3L_LAMBDA(auto* d) { input_transform(d); };
  if (norm == nullptr)
    transform_windows<6>(grid, tiles, x, v, 1,
                         US3L_LAMBDA(std::int64_t, const Window<6>&) { return AsItIs<T>{}; }, transform);
  else
    transform_windows<6>(grid, tiles, x, v, 1, US3L_LAMBDA(std::int64_t t, const Window<6>&) {
      return Normalised<T>{*norm, view_of(grid, tiles, t, *norm, x.channels)};
    }, transform);
}

template <class T, bool kMasked>
void transform_normalised_gradient(const Grid& grid, Tiles tiles, const Pixels<const T>& dy,
                                   const NormBackwardOnRead<T>& norm, Stack m) {
  transform_windows<4>(grid, tiles, dy, m, 0, US3L_LAMBDA(std::int64_t t, const Window<4>& window) {
    return NormGradient<T, kMasked>{norm, view_of(grid, tiles, t, norm.norm, dy.channels), window.corner};
  }, US3L_LAMBDA(auto* d) { output_adjoint(d); });
}

template <class T>
void transform_gradient(Grid grid, Tiles tiles, Pixels<const T> dy, const NormBackwardOnRead<T>* norm, Stack m) {
  if (norm == nullptr)
    transform_windows<4>(grid, tiles, dy, m, 0,
                         US3L_LAMBDA(std::int64_t, const Window<4>&) { return AsItIs<T>{}; },
                         US3L_LAMBDA(auto* d) { output_adjoint(d); });
  else if (norm->norm.bias == nullptr)
    transform_normalised_gradient<T, false>(grid, tiles, dy, *norm, m);
  else
    transform_normalised_gradient<T, true>(grid, tiles, dy, *norm, m);
}

template <class T>
void transform_output(Grid grid, Tiles tiles, Stack m, const float* bias, Pixels<T> y) {
  for_tiles<4>(grid, tiles, y, 0, US3L_LAMBDA(std::int64_t t, const Window<4>& window) {
    for_window(window, US3L_LAMBDA(auto inside) {
      for_channels(0, y.channels, US3L_LAMBDA(std::int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        const float* const in = m.data + t * m.row + c;
        T* const out = y.data + window.corner + c;
        const Float<W> offset = load<W>(bias + c);
        transform_square<Float<W>, 6, 4>(
            US3L_LAMBDA(int i, int j) { return load<W>(in + (i * 6 + j) * m.position); },
            US3L_LAMBDA(Float<W>* d) { output_transform(d); },
            US3L_LAMBDA(int i, int j, Float<W> value) {
              if (decltype(inside)::value || window.has(i, j)) store<W>(out + i * y.row + j * y.pixel, value + offset);
            });
      });
    });
  });
}

void add_input_gradients(Grid grid, Tiles tiles, Stack v, Accumulator dx, bool clear) {
  const Pixels<float>& p = dx.pixels;
  for_tiles<6>(grid, tiles, p, 1, US3L_LAMBDA(std::int64_t t, const Window<6>& window) {
    const std::int64_t image = (tiles.first + t) / grid.tiles_of_image();
    float* const kept = p.data - image / dx.kept * dx.kept * p.image;
    if (clear && image * grid.tiles_of_image() == tiles.first + t)
      __builtin_memset(kept + image * p.image, 0, grid.height * p.row * sizeof(float));
    for_window(window, US3L_LAMBDA(auto inside) {
      for_channels(0, p.channels, US3L_LAMBDA(std::int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        const float* const in = v.data + t * v.row + c;
        float* const out = kept + window.corner + c;
        transform_square<Float<W>, 6, 6>(
            US3L_LAMBDA(int i, int j) { return load<W>(in + (i * 6 + j) * v.position); },
            US3L_LAMBDA(Float<W>* d) { input_adjoint(d); },
            US3L_LAMBDA(int i, int j, Float<W> value) {
              if (!decltype(inside)::value && !window.has(i, j)) return;
              float* const target = out + i * p.row + j * p.pixel;
              store<W>(target, load<W>(target) + value);
            });
      });
    });
  });
}

void to_bfloat16(const float* from, std::int64_t count, BFloat16* to, bool add) {
  for_channels(0, count, US3L_LAMBDA(std::int64_t i, auto width) {
    constexpr int W = decltype(width)::value;
    const Float<W> value = load<W>(from + i);
    store<W>(to + i, add ? value + load<W>(to + i) : value);
  });
}

WinogradKernels winograd_kernels() {
  return {transform_filters,
          add_filter_gradients,
          add_input_gradients,
          to_bfloat16,
          {transform_input<float>, transform_output<float>, transform_gradient<float>},
          {transform_input<BFloat16>, transform_output<BFloat16>, transform_gradient<BFloat16>}};
}

#undef US3L_LAMBDA
