// What Winograd's algorithms share, whatever their transforms: a transform in two dimensions, the taps of filters in and
// out, the tiles of images with their borders. Included after vector_body.h.

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

// Copies 16 or fewer rows of filters to taps[row][tap][lane], in vectors along the dimension that is the inner one in
// memory: along the other, each number would be one of another cache line, and these would push each other out.
US3L_INLINE void copy_taps(const Filters<const float>& w, std::int64_t first, std::int64_t rows,
                           float (*taps)[9][LANES]) {
  const bool whole = rows == LANES && w.lanes == LANES;
  for (int t = 0; t < 9; ++t) {
    const float* const from = w.data + first * w.row + t / 3 * w.tap_y + t % 3 * w.tap_x;
    if (whole && w.row == 1) {
      Float<LANES> v[LANES];
      US3L_UNROLL
      for (int l = 0; l < LANES; ++l) v[l] = load<LANES>(from + l * w.lane);
      transpose(v);
      US3L_UNROLL
      for (int r = 0; r < LANES; ++r) store<LANES>(taps[r][t], v[r]);
    } else if (whole && w.lane == 1) {
      for (int r = 0; r < LANES; ++r) store<LANES>(taps[r][t], load<LANES>(from + r * w.row));
    } else if (w.row < w.lane) {
      for (std::int64_t l = 0; l < w.lanes; ++l)
        for (std::int64_t r = 0; r < rows; ++r) taps[r][t][l] = from[r * w.row + l * w.lane];
    } else {
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t l = 0; l < w.lanes; ++l) taps[r][t][l] = from[r * w.row + l * w.lane];
    }
  }
}

// The filters of one panel, transformed; store_to(row, i, j, vector) takes them, with zeros in lanes that are not there.
template <int O, class Transform, class Store>
US3L_INLINE void transform_taps(const Filters<const float>& w, const Transform& transform, const Store& store_to) {
  using Vector = Float<LANES>;
  float taps[LANES][9][LANES] = {};
  for (std::int64_t first = 0; first < w.rows; first += LANES) {
    const std::int64_t rows = w.rows - first < LANES ? w.rows - first : LANES;
    copy_taps(w, first, rows, taps);
    for (std::int64_t r = 0; r < rows; ++r)
      transform_square<Vector, 3, O>(
          US3L_LAMBDA(int i, int j) { return load<LANES>(taps[r][i * 3 + j]); }, transform,
          US3L_LAMBDA(int i, int j, Vector v) { store_to(first + r, i, j, v); });
  }
}

// Adds to the filters what the adjoint makes of load_from(row, lane, i, j).
template <int I, class Load, class Adjoint>
US3L_INLINE void add_taps(const Filters<float>& w, const Load& load_from, const Adjoint& adjoint) {
  using Vector = Float<LANES>;
  for (std::int64_t r = 0; r < w.rows; ++r)
    for (std::int64_t first = 0; first < w.lanes; first += LANES) {
      float taps[9][LANES];
      transform_square<Vector, I, 3>(
          US3L_LAMBDA(int i, int j) { return load_from(r, first, i, j); }, adjoint,
          US3L_LAMBDA(int i, int j, Vector v) { store<LANES>(taps[i * 3 + j], v); });
      const std::int64_t lanes = w.lanes - first < LANES ? w.lanes - first : LANES;
      for (int t = 0; t < 9; ++t) {
        float* out = w.data + r * w.row + first * w.lane + t / 3 * w.tap_y + t % 3 * w.tap_x;
        if (lanes == LANES && w.lane == 1)
          store<LANES>(out, load<LANES>(out) + load<LANES>(taps[t]));
        else
          for (std::int64_t l = 0; l < lanes; ++l, out += w.lane) *out += taps[t][l];
      }
    }
}

// ---------------------------------------------------------------------------------------------- tiles

// A window of S x S pixels of an image, with the distance of its corner from the first element.
template <int S>
struct Window {
  std::int64_t corner;
  std::uint32_t rows, columns;  // bit i: whether that one of the window lies in the image

  bool inside() const { return (rows & columns) == (std::uint32_t{1} << S) - 1; }
  bool has(int i, int j) const { return rows >> i & columns >> j & 1; }
};

// The bits [begin, end) of those that lie in [0, size), where bit 0 is `corner` and there are S.
template <int S>
US3L_INLINE std::uint32_t bits_inside(std::int64_t corner, std::int64_t size) {
  const std::int64_t begin = corner < 0 ? -corner : 0, end = size - corner < S ? size - corner : S;
  return ((std::uint32_t{1} << end) - 1) >> begin << begin;
}

// Calls f(t, window) for each of the tiles of `step` x `step` pixels, with the window of S x S pixels whose corner is
// `margin` before the tile's.
template <int S, int kStep = 4, class T, class F>
US3L_INLINE void for_tiles(const Grid& grid, Tiles tiles, const Pixels<T>& pixels, std::int64_t margin, const F& f) {
  std::int64_t image = tiles.first / grid.tiles_of_image();
  std::int64_t row = tiles.first % grid.tiles_of_image() / grid.columns, column = tiles.first % grid.columns;
  for (std::int64_t t = 0; t < tiles.count; ++t) {
    const std::int64_t y = kStep * row - margin, x = kStep * column - margin;
    f(t, Window<S>{image * pixels.image + y * pixels.row + x * pixels.pixel, bits_inside<S>(y, grid.height),
                   bits_inside<S>(x, grid.width)});
    if (++column == grid.columns) {
      column = 0;
      if (++row == grid.rows) {
        row = 0;
        ++image;
      }
    }
  }
}

// Fetches into the L2 cache what tiles one and a half rows of them ahead will read or write of the images: a tile's share of
// its image's memory, in steps along with the vectors of W channels. Windows jump between the image's rows, but a row of
// tiles is one stretch of memory, and in that order the memory delivers fastest. Nothing comes of addresses beyond the end.
template <int W, int kStep, class T>
US3L_INLINE void prefetch_ahead(const Grid& grid, const Pixels<T>& pixels, std::int64_t tile, std::int64_t c) {
  constexpr int kPixels = kStep * kStep, kPerLine = 64 / sizeof(T), kWrite = std::is_const_v<T> ? 0 : 1;
  const std::int64_t ahead = grid.columns + grid.columns / 2 + 1;
  const auto first = reinterpret_cast<std::uintptr_t>(pixels.data) +
                     ((tile + ahead) * (pixels.image / grid.tiles_of_image()) + c * kPixels) * sizeof(T);
  US3L_UNROLL
  for (int i = 0; i < (kPixels * W + kPerLine - 1) / kPerLine; ++i)
    __builtin_prefetch(reinterpret_cast<const void*>(first + 64 * i), kWrite, 2);
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
  if (window.inside())
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
    const int top = __builtin_ctz(window.rows), bottom = 31 - __builtin_clz(window.rows);
    const int left = __builtin_ctz(window.columns), right = 31 - __builtin_clz(window.columns);
    for (int i = 0; i < S; ++i) {
      for (int j = 0; j < S; ++j) mask[i][j] = window.has(i, j) ? ~std::uint32_t{0} : 0;
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
