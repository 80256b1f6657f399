// The transforms of winograd_kernels.h, written once. Each winograd_<isa>.cpp includes this file
// inside a namespace of its own, with LANES floats to a vector, under that instruction set's compiler options. So
// nothing here may be a function of the standard library: the linker would keep one copy of it for all.

#include "vector_body.h"

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

void transform_filters(Filters<const float> w, float* u, std::int64_t position) {
  using Vector = Float<LANES>;
  for (std::int64_t r = 0; r < w.rows; ++r) {
    float taps[9][LANES] = {};
    const float* filter = w.data + r * w.row;
    for (std::int64_t l = 0; l < w.lanes; ++l, filter += w.lane)
      for (int t = 0; t < 9; ++t) taps[t][l] = filter[t / 3 * w.tap_y + t % 3 * w.tap_x];
    float* const out = u + r * LANES;
    transform_square<Vector, 3, 6>(
        US3L_LAMBDA(int i, int j) { return load<LANES>(taps[i * 3 + j]); },
        US3L_LAMBDA(Vector* v) { filter_transform(v); },
        US3L_LAMBDA(int i, int j, Vector v) { store<LANES>(out + (i * 6 + j) * position, v); });
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

// v = the transform of the window of each tile, zeros outside of the image.
template <int S, class Transform>
US3L_INLINE void transform_windows(const Grid& grid, Tiles tiles, const Pixels<const float>& x, Stack v,
                                   std::int64_t margin, const Transform& transform) {
  for_tiles<S>(grid, tiles, x, margin, US3L_LAMBDA(std::int64_t t, const Window<S>& window) {
    for_window(window, US3L_LAMBDA(auto inside) {
      for_channels(0, x.channels, US3L_LAMBDA(std::int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        const float* const in = x.data + window.corner + c;
        float* const out = v.data + t * v.row + c;
        transform_square<Float<W>, S, 6>(
            US3L_LAMBDA(int i, int j) {
              return decltype(inside)::value || window.has(i, j) ? load<W>(in + i * x.row + j * x.pixel) : Float<W>{};
            },
            transform, US3L_LAMBDA(int i, int j, Float<W> value) { store<W>(out + (i * 6 + j) * v.position, value); });
      });
    });
  });
}

void transform_input(Grid grid, Tiles tiles, Pixels<const float> x, Stack v) {
  transform_windows<6>(grid, tiles, x, v, 1, US3L_LAMBDA(auto* d) { input_transform(d); });
}

void transform_gradient(Grid grid, Tiles tiles, Pixels<const float> dy, Stack m) {
  transform_windows<4>(grid, tiles, dy, m, 0, US3L_LAMBDA(auto* d) { output_adjoint(d); });
}

void transform_output(Grid grid, Tiles tiles, Stack m, const float* bias, Pixels<float> y) {
  for_tiles<4>(grid, tiles, y, 0, US3L_LAMBDA(std::int64_t t, const Window<4>& window) {
    for_window(window, US3L_LAMBDA(auto inside) {
      for_channels(0, y.channels, US3L_LAMBDA(std::int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        const float* const in = m.data + t * m.row + c;
        float* const out = y.data + window.corner + c;
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

void add_input_gradients(Grid grid, Tiles tiles, Stack v, Pixels<float> dx) {
  for_tiles<6>(grid, tiles, dx, 1, US3L_LAMBDA(std::int64_t t, const Window<6>& window) {
    const std::int64_t image = (tiles.first + t) / grid.tiles_of_image();
    if (image * grid.tiles_of_image() == tiles.first + t)
      __builtin_memset(dx.data + image * dx.image, 0, grid.height * dx.row * sizeof(float));
    for_window(window, US3L_LAMBDA(auto inside) {
      for_channels(0, dx.channels, US3L_LAMBDA(std::int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        const float* const in = v.data + t * v.row + c;
        float* const out = dx.data + window.corner + c;
        transform_square<Float<W>, 6, 6>(
            US3L_LAMBDA(int i, int j) { return load<W>(in + (i * 6 + j) * v.position); },
            US3L_LAMBDA(Float<W>* d) { input_adjoint(d); },
            US3L_LAMBDA(int i, int j, Float<W> value) {
              if (!decltype(inside)::value && !window.has(i, j)) return;
              float* const p = out + i * dx.row + j * dx.pixel;
              store<W>(p, load<W>(p) + value);
            });
      });
    });
  });
}

WinogradKernels winograd_kernels() {
  return {transform_filters, add_filter_gradients, transform_input,
          transform_output,  transform_gradient,   add_input_gradients};
}

#undef US3L_LAMBDA
