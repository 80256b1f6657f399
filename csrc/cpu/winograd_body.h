// The transforms of winograd_kernels.h, written once. Each winograd_<isa>.cpp includes this file
// inside a namespace of its own, with LANES floats to a vector, under that instruction set's compiler options. So
// nothing here may be a function of the standard library: the linker would keep one copy of it for all.

#include "vector_body.h"
#include "bfloat16_body.h"
#include "winograd_tiles_body.h"

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

// ---------------------------------------------------------------------------------------------- filters

void transform_filters(Filters<const float> w, float* u, std::int64_t position, bool around_cache) {
  transform_taps<6>(w, US3L_LAMBDA(auto* v) { filter_transform(v); },
                    US3L_LAMBDA(std::int64_t row, int i, int j, Float<LANES> v) {
                      float* const out = u + row * LANES + (i * 6 + j) * position;
                      if (around_cache)
                        store_around_cache<LANES>(out, v);
                      else
                        store<LANES>(out, v);
                    });
  if (around_cache) finish_stores_around_cache();
}

void add_filter_gradients(Stack u, std::int64_t copies, std::int64_t copy, Filters<float> w) {
  add_taps<6>(w, US3L_LAMBDA(std::int64_t row, std::int64_t lane, int i, int j) {
    const float* const p = u.data + row * u.row + lane + (i * 6 + j) * u.position;
    Float<LANES> sum = load<LANES>(p);
    for (std::int64_t n = 1; n < copies; ++n) sum += load<LANES>(p + n * copy);
    return sum;
  }, US3L_LAMBDA(auto* v) { filter_adjoint(v); });
}

// ---------------------------------------------------------------------------------------------- tiles

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

  template <int W>
  US3L_INLINE void prefetch(const Grid&, std::int64_t, std::int64_t) const {}
};

template <class T>
struct AsItIs {
  template <int W>
  US3L_INLINE Float<W> operator()(Float<W> x, std::int64_t, std::int64_t) const {
    return x;
  }

  template <int W>
  US3L_INLINE void prefetch(const Grid&, std::int64_t, std::int64_t) const {}
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

  template <int W>
  US3L_INLINE void prefetch(const Grid& grid, std::int64_t tile, std::int64_t c) const {
    prefetch_ahead<W, 4>(grid, backward.x, tile, c);
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
        prefetch_ahead<W, 4>(grid, x, tiles.first + t, c);
        value.template prefetch<W>(grid, tiles.first + t, c);
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
        prefetch_ahead<W, 4>(grid, y, tiles.first + t, c);
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
        prefetch_ahead<W, 4>(grid, Pixels<float>{kept, p.channels, p.image, p.row, p.pixel}, tiles.first + t, c);
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
