// The transforms of winograd_stride2_kernels.h, written once. Each winograd_stride2_<isa>.cpp includes this file inside a
// namespace of its own, with LANES floats to a vector, under that instruction set's compiler options. So nothing here may
// be a function of the standard library: the linker would keep one copy of it for all.

#include "vector_body.h"
#include "winograd_tiles_body.h"

using us3l::stride2::Kernels;
using us3l::stride2::Slots;

constexpr int kWindow = 9, kOfWindow = 9, kStep = 8;  // in one dimension: pixels of the input, slots, pixels between tiles

// ---------------------------------------------------------------------------------------------- one dimension

// The points of interpolation are +-a, +-b and infinity. With 1/2 and 5/4 the errors in float32 are among the smallest,
// found by search; all products of them are exact in float32.
constexpr float kA = 0.5f, kB = 1.25f, kA2 = kA * kA, kB2 = kB * kB;
constexpr float kScaleA = static_cast<float>(1.0 / (2 * 0.5 * (0.25 - 1.5625)));
constexpr float kScaleB = static_cast<float>(1.0 / (2 * 1.25 * (1.5625 - 0.25)));

// At the finite points: four values to four, and back.
template <class V>
US3L_INLINE void to_points(V d0, V d1, V d2, V d3, V* v) {
  const V even_a = kA * (d2 - kB2 * d0), odd_a = d3 - kB2 * d1;
  const V even_b = kB * (d2 - kA2 * d0), odd_b = d3 - kA2 * d1;
  v[0] = even_a + odd_a;
  v[1] = even_a - odd_a;
  v[2] = even_b + odd_b;
  v[3] = even_b - odd_b;
}

template <class V>
US3L_INLINE void from_points(const V* v, V& d0, V& d1, V& d2, V& d3) {
  const V even_a = kA * (v[0] + v[1]), odd_a = v[0] - v[1], even_b = kB * (v[2] + v[3]), odd_b = v[2] - v[3];
  d0 = -kB2 * even_a - kA2 * even_b;
  d1 = -kB2 * odd_a - kA2 * odd_b;
  d2 = even_a + even_b;
  d3 = odd_a + odd_b;
}

template <class V>
US3L_INLINE void input_transform(V* d) {  // B': 9 -> 9; the window begins with a pixel of odd index
  V v[kOfWindow];
  to_points(d[0], d[2], d[4], d[6], v);
  v[4] = kA2 * kB2 * d[0] - (kA2 + kB2) * d[4] + d[8];
  to_points(d[1], d[3], d[5], d[7], v + 5);
  US3L_UNROLL
  for (int i = 0; i < kOfWindow; ++i) d[i] = v[i];
}

template <class V>
US3L_INLINE void input_adjoint(V* v) {  // B: 9 -> 9
  V d[kWindow];
  from_points(v, d[0], d[2], d[4], d[6]);
  d[0] += kA2 * kB2 * v[4];
  d[4] -= (kA2 + kB2) * v[4];
  d[8] = v[4];
  from_points(v + 5, d[1], d[3], d[5], d[7]);
  US3L_UNROLL
  for (int i = 0; i < kWindow; ++i) v[i] = d[i];
}

template <class V>
US3L_INLINE void output_transform(V* m) {  // A': 5 -> 4
  const V even_a = m[0] + m[1], odd_a = kA * (m[0] - m[1]), even_b = m[2] + m[3], odd_b = kB * (m[2] - m[3]);
  m[0] = even_a + even_b;
  m[1] = odd_a + odd_b;
  m[2] = kA2 * even_a + kB2 * even_b;
  m[3] = kA2 * odd_a + kB2 * odd_b + m[4];
}

template <class V>
US3L_INLINE void output_adjoint(V* y) {  // A: 4 -> 5
  const V even_a = y[0] + kA2 * y[2], odd_a = kA * (y[1] + kA2 * y[3]);
  const V even_b = y[0] + kB2 * y[2], odd_b = kB * (y[1] + kB2 * y[3]);
  y[4] = y[3];
  y[0] = even_a + odd_a;
  y[1] = even_a - odd_a;
  y[2] = even_b + odd_b;
  y[3] = even_b - odd_b;
}

template <class V>
US3L_INLINE void filter_transform(V* w) {  // G: 3 -> 9
  const V even_a = kScaleA * w[0], odd_a = kScaleA * kA * w[2];
  const V even_b = kScaleB * w[0], odd_b = kScaleB * kB * w[2];
  w[4] = w[2];
  w[5] = w[6] = kScaleA * w[1];
  w[7] = w[8] = kScaleB * w[1];
  w[0] = even_a + odd_a;
  w[1] = even_a - odd_a;
  w[2] = even_b + odd_b;
  w[3] = even_b - odd_b;
}

template <class V>
US3L_INLINE void filter_adjoint(V* u) {  // G': 9 -> 3
  const V even_a = u[0] + u[1], odd_a = u[0] - u[1], even_b = u[2] + u[3], odd_b = u[2] - u[3];
  u[0] = kScaleA * even_a + kScaleB * even_b;
  u[1] = kScaleA * (u[5] + u[6]) + kScaleB * (u[7] + u[8]);
  u[2] = kScaleA * kA * odd_a + kScaleB * kB * odd_b + u[4];
}

// ---------------------------------------------------------------------------------------------- filters

void transform_filters(Filters<const float> w, Slots u) {
  transform_taps<kOfWindow>(w, US3L_LAMBDA(auto* v) { filter_transform(v); },
                         US3L_LAMBDA(std::int64_t row, int i, int j, Float<LANES> v) {
                           store<LANES>(u.data + row * u.row + u.at(i, j), v);
                         });
}

void add_filter_gradients(Slots u, std::int64_t copies, std::int64_t copy, Filters<float> w) {
  add_taps<kOfWindow>(w, US3L_LAMBDA(std::int64_t row, std::int64_t lane, int i, int j) {
    const float* const p = u.data + row * u.row + lane + u.at(i, j);
    Float<LANES> sum = load<LANES>(p);
    for (std::int64_t n = 1; n < copies; ++n) sum += load<LANES>(p + n * copy);
    return sum;
  }, US3L_LAMBDA(auto* v) { filter_adjoint(v); });
}

// ---------------------------------------------------------------------------------------------- tiles

// Calls f(t, window, inside, border, channel, width) for all vectors of the window of each tile; `border` is set unless
// the whole window is inside.
template <int S, int kStep, class T, class F>
US3L_INLINE void for_vectors(const Grid& grid, Tiles tiles, const Pixels<T>& pixels, std::int64_t margin, const F& f) {
  for_tiles<S, kStep>(grid, tiles, pixels, margin, US3L_LAMBDA(std::int64_t t, const Window<S>& window) {
    for_window(window, US3L_LAMBDA(auto inside) {
      Border<S> border;
      if constexpr (!decltype(inside)::value) border.set(window, pixels);
      for_channels(0, pixels.channels, US3L_LAMBDA(std::int64_t c, auto width) {
        f(t, window, inside, border, c, width);
      });
    });
  });
}

// The pixel (i, j) of a window, zero outside of the image.
template <int W, bool kInside, int S>
US3L_INLINE Float<W> load_pixel(const Pixels<const float>& x, const float* in, const Border<S>& border, int i, int j) {
  if constexpr (kInside)
    return load<W>(in + i * x.row + j * x.pixel);
  else
    return masked<W>(load<W>(in + border.row[i] + border.pixel[j]), border.mask[i][j]);
}

void transform_input(Grid input, Tiles tiles, Pixels<const float> x, Slots v) {
  for_vectors<kWindow, kStep>(
      input, tiles, x, 1,
      US3L_LAMBDA(std::int64_t t, const auto& window, auto inside, const auto& border, std::int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        const float* const in = x.data + window.corner + c;
        prefetch_ahead<W, kStep>(input, x, tiles.first + t, c);
        float* const out = v.data + t * v.row + c;
        transform_square<Float<W>, kWindow, kOfWindow>(
            US3L_LAMBDA(int i, int j) { return load_pixel<W, decltype(inside)::value>(x, in, border, i, j); },
            US3L_LAMBDA(Float<W>* d) { input_transform(d); },
            US3L_LAMBDA(int i, int j, Float<W> value) { store<W>(out + v.at(i, j), value); });
      });
}

void transform_gradient(Grid output, Tiles tiles, Pixels<const float> dy, Stack m) {
  for_vectors<4, 4>(
      output, tiles, dy, 0,
      US3L_LAMBDA(std::int64_t t, const auto& window, auto inside, const auto& border, std::int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        const float* const in = dy.data + window.corner + c;
        prefetch_ahead<W, 4>(output, dy, tiles.first + t, c);
        float* const out = m.data + t * m.row + c;
        transform_square<Float<W>, 4, 5>(
            US3L_LAMBDA(int i, int j) { return load_pixel<W, decltype(inside)::value>(dy, in, border, i, j); },
            US3L_LAMBDA(Float<W>* d) { output_adjoint(d); },
            US3L_LAMBDA(int i, int j, Float<W> value) { store<W>(out + (i * 5 + j) * m.position, value); });
      });
}

void transform_output(Grid output, Tiles tiles, Stack m, const float* bias, Pixels<float> y) {
  for_vectors<4, 4>(
      output, tiles, y, 0,
      US3L_LAMBDA(std::int64_t t, const auto& window, auto inside, const auto&, std::int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        const float* const in = m.data + t * m.row + c;
        float* const out = y.data + window.corner + c;
        const Float<W> offset = load<W>(bias + c);
        prefetch_ahead<W, 4>(output, y, tiles.first + t, c);
        transform_square<Float<W>, 5, 4>(
            US3L_LAMBDA(int i, int j) { return load<W>(in + (i * 5 + j) * m.position); },
            US3L_LAMBDA(Float<W>* d) { output_transform(d); },
            US3L_LAMBDA(int i, int j, Float<W> value) {
              if (decltype(inside)::value || window.has(i, j)) store<W>(out + i * y.row + j * y.pixel, value + offset);
            });
      });
}

// Windows share their first row and column with the last of tiles before: these are added to, all others are set.
void set_input_gradients(Grid input, Tiles tiles, Slots v, Pixels<float> dx) {
  for_vectors<kWindow, kStep>(
      input, tiles, dx, 1,
      US3L_LAMBDA(std::int64_t t, const auto& window, auto inside, const auto&, std::int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        const float* const in = v.data + t * v.row + c;
        float* const out = dx.data + window.corner + c;
        prefetch_ahead<W, kStep>(input, dx, tiles.first + t, c);
        transform_square<Float<W>, kOfWindow, kWindow>(
            US3L_LAMBDA(int i, int j) { return load<W>(in + v.at(i, j)); },
            US3L_LAMBDA(Float<W>* d) { input_adjoint(d); },
            US3L_LAMBDA(int i, int j, Float<W> value) {
              if (!decltype(inside)::value && !window.has(i, j)) return;
              float* const target = out + i * dx.row + j * dx.pixel;
              store<W>(target, i == 0 || j == 0 ? load<W>(target) + value : value);
            });
      });
}

Kernels kernels() {
  return {transform_input,     transform_output,  transform_gradient,
          set_input_gradients, transform_filters, add_filter_gradients};
}
