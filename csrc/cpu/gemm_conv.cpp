// Convolutions as matrix products: pixels x (taps, channels) times (taps, channels) x channels.
//
// Forward, the pixels of y sample x at their taps; backward, those of dx sample dy, each class of pixels (by its position
// within a stride) at the taps that reach it: nothing is scattered, nothing multiplied by inserted zeros. A block of
// pixels is gathered so that it stays in the L2 cache, or read in place where it is a matrix already. The weight's slice
// is packed in every call.
//
// Of bfloat16, pairs of neighbouring channels are words, and all but the products themselves and the results is done with
// them as with floats: half the channels, at half the distances. The weight's gradient has pairs of neighbouring pixels.
//
// Work is cut by the number of threads alone and partial sums are merged in order: same threads, same bits.

#include "gemm_conv.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../ops.h"
#include "gemm_kernels.h"
#include "packed_filters.h"
#include "scratch.h"

namespace us3l {
namespace {

// The tile of a gradient that a thread works on stays in its L2 cache.
constexpr int64_t kTile = 128 << 10;  // floats

// The kernels for images of T, of which a word holds so many.
template <class T>
using Gemm = std::conditional_t<std::is_same_v<T, float>, GemmKernels, GemmPairKernels>;
template <class T>
constexpr int64_t kPerWord = sizeof(float) / sizeof(T);

template <class T>
Gemm<T> kernels_of() {
  if constexpr (std::is_same_v<T, float>)
    return gemm_kernels();
  else
    return gemm_pair_kernels();
}

template <class T>
Images<const float> words_of(const Images<const T>& t) {
  constexpr int64_t n = kPerWord<T>;
  return {{reinterpret_cast<const float*>(t.data), t.channels / n, t.image / n, t.row / n, t.pixel / n},
          t.count, t.height, t.width};
}

// ---------------------------------------------------------------------------------------------- pixels as rows

struct Tap {
  int64_t y, x;    // of the sampled pixel, relative to the point
  int64_t filter;  // where its filter is in the weight
};

// Which pixels the points of a grid sample: point (i, j) of an image, at each tap, (i * step[0] + y, j * step[1] + x).
// Taps come row by row.
struct Samples {
  Images<const float> images;
  std::array<int64_t, 2> step;
  int64_t height, width;  // of the grid
  std::vector<Tap> taps;

  int64_t points() const { return images.count * height * width; }
  int64_t depth() const { return static_cast<int64_t>(taps.size()) * images.channels; }
};

// Whether all pixels are at one distance, in the order of a grid of their size.
template <class T>
bool is_matrix(const Images<T>& t) {
  return (t.height == 1 || t.row == t.width * t.pixel) && (t.count == 1 || t.image == t.height * t.width * t.pixel);
}

bool in_place(const Samples& s) {
  return s.taps.size() == 1 && s.taps[0].y == 0 && s.taps[0].x == 0 && s.height == s.images.height &&
         s.width == s.images.width && s.step[0] == 1 && s.step[1] == 1 && is_matrix(s.images);
}

// A block of gathered points: (tap, channel) for the taps and the channels of two ranges.
struct Columns {
  Range taps, channels;

  int64_t count() const { return (taps.end - taps.begin) * (channels.end - channels.begin); }
};

// Calls f(image, i, j, count) for the rows of a grid, and parts of them, that a range of its points consists of.
template <class F>
void for_rows(Range points, int64_t height, int64_t width, const F& f) {
  for (int64_t p = points.begin; p < points.end;) {
    const int64_t j = p % width, count = std::min(width - j, points.end - p);
    f(p / width / height, p / width % height, j, count);
    p += count;
  }
}

// The samples of points, one row each; zero outside of the images.
void gather(const GemmKernels& gemm, const Samples& s, Range points, Columns columns, float* block, int64_t row) {
  const Images<const float>& from = s.images;
  const int64_t channels = columns.channels.end - columns.channels.begin;
  for_rows(points, s.height, s.width, [&](int64_t n, int64_t i, int64_t first, int64_t count) {
    float* to = block;
    for (int64_t t = columns.taps.begin; t < columns.taps.end;) {
      // Taps beside one another that sample neighbouring pixels are one copy, if there are no other channels between.
      const Tap tap = s.taps[t];
      int64_t run = 1;
      if (from.pixel == channels)
        while (t + run < columns.taps.end && s.taps[t + run].y == tap.y && s.taps[t + run].x == tap.x + run) ++run;

      // The points whose samples are all inside lie together.
      const int64_t y = i * s.step[0] + tap.y;
      const int64_t left = divide_up(std::max<int64_t>(-tap.x, 0), s.step[1]) - first;
      const int64_t right = divide_up(std::max<int64_t>(from.width - run + 1 - tap.x, 0), s.step[1]) - first;
      const bool outside = y < 0 || y >= from.height;
      const int64_t begin = outside ? count : std::clamp<int64_t>(left, 0, count);
      const int64_t end = outside ? count : std::clamp<int64_t>(right, begin, count);
      const float* const pixels = from.data + n * from.image + y * from.row + columns.channels.begin;
      const int64_t x = first * s.step[1] + tap.x, step = s.step[1] * from.pixel;
      if (begin < end)
        gemm.copy_rows(end - begin, run * channels, pixels + (x + begin * s.step[1]) * from.pixel, step,
                       to + begin * row, row);
      for (int64_t p = begin > 0 ? 0 : end; p < count; p = p + 1 == begin ? end : p + 1) {  // at the edges
        for (int64_t r = 0; r < run; ++r) {
          const int64_t column = x + p * s.step[1] + r;
          float* const sample = to + p * row + r * channels;
          if (outside || column < 0 || column >= from.width)
            std::memset(sample, 0, channels * sizeof(float));
          else
            std::memcpy(sample, pixels + column * from.pixel, channels * sizeof(float));
        }
      }
      to += run * channels;
      t += run;
    }
    block += count * row;
  });
}

// ---------------------------------------------------------------------------------------------- pixels from rows

// Where the results of a grid's points go: point (i, j) to pixel (first + i * step, ...).
template <class T>
struct Results {
  Images<T> images;
  std::array<int64_t, 2> first, step;
  int64_t height, width;  // of the grid
};

bool in_place(const Results<float>& r) {
  return r.step[0] == 1 && r.step[1] == 1 && r.first[0] == 0 && r.first[1] == 0 && is_matrix(r.images);
}

// Those of bfloat16 come from blocks of float32.
bool in_place(const Results<BFloat16>&) { return false; }

void write_rows(const GemmKernels& gemm, int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to,
                int64_t to_row) {
  gemm.copy_rows(rows, columns, from, from_row, to, to_row);
}

void write_rows(const GemmPairKernels& gemm, int64_t rows, int64_t columns, const float* from, int64_t from_row,
                BFloat16* to, int64_t to_row) {
  gemm.round_rows(rows, columns, from, from_row, to, to_row);
}

template <class T>
void scatter(const Gemm<T>& gemm, const float* block, int64_t row, Range points, const Results<T>& r) {
  for_rows(points, r.height, r.width, [&](int64_t n, int64_t i, int64_t j, int64_t count) {
    T* const pixel = r.images.data + n * r.images.image + (r.first[0] + i * r.step[0]) * r.images.row +
                     (r.first[1] + j * r.step[1]) * r.images.pixel;
    write_rows(gemm, count, r.images.channels, block, row, pixel, r.step[1] * r.images.pixel);
    block += count * row;
  });
}

// ---------------------------------------------------------------------------------------------- products

std::vector<int64_t> filters_at(const std::vector<Tap>& taps) {
  std::vector<int64_t> places;
  for (const Tap& tap : taps) places.push_back(tap.filter);
  return places;
}

// A weight whose channels of one kind, those that the products sum over, are words.
enum class Summed { in, out };

// Of bfloat16 it is a copy: of words [out][taps][in / 2] or [out / 2][taps][in].
template <class T>
class WordWeight {
 public:
  WordWeight(const Gemm<T>& gemm, const Weight<const float>& w, Summed summed)
      : memory_(Scratch::kImages, kPerWord<T> == 1 ? 0 : w.out * w.height * w.width * w.in / 2), weight(w) {
    if constexpr (kPerWord<T> == 2) {
      const int64_t taps = w.height * w.width, columns = summed == Summed::in ? w.in / 2 : w.in;
      const int64_t rows = summed == Summed::in ? w.out : w.out / 2;
      float* const words = memory_.data();
      weight = {words, rows, columns, w.height, w.width, taps * columns, 1, w.width * columns, columns};
      parallel(rows, [&](int64_t k) {
        std::vector<float> copies(w.in_distance == 1 ? 0 : 2 * w.in);
        const auto filters = [&](int64_t k, int64_t tap, float* copy) {
          const float* const from = w.data + k * w.out_distance + tap / w.width * w.row + tap % w.width * w.column;
          if (w.in_distance == 1) return from;
          for (int64_t c = 0; c < w.in; ++c) copy[c] = from[c * w.in_distance];
          return const_cast<const float*>(copy);
        };
        for (int64_t tap = 0; tap < taps; ++tap) {
          float* const to = words + (k * taps + tap) * columns;
          if (summed == Summed::in)
            gemm.round_rows(1, w.in, filters(k, tap, copies.data()), 0, reinterpret_cast<BFloat16*>(to), 0);
          else
            gemm.round_pairs(w.in, filters(2 * k, tap, copies.data()),
                             filters(2 * k + 1, tap, copies.data() + copies.size() / 2), to);
        }
      });
    }
  }

 private:
  Scratch memory_;

 public:
  Weight<const float> weight;
};

template <class T>
void multiply(const Gemm<T>& gemm, const Samples& s, const PackedFilters& filters, const float* bias,
              const Results<T>& r) {
  const int64_t channels = s.images.channels, columns = r.images.channels, panels = divide_up(columns, gemm.lanes);
  const int64_t points = s.points(), threads = torch::stable::get_num_threads();
  const bool read_in_place = in_place(s), write_in_place = in_place(r) && gemm.whole_halves(columns);

  // Threads have points of their own or, with few points, channels.
  const int64_t column_parts = points >= threads * kLeastRows ? 1 : std::min(threads, panels);
  const int64_t point_parts = column_parts > 1 ? 1 : balanced_parts(points, kMostRows);

  // As many taps at a time as fit; all of them in place.
  const int64_t taps = s.taps.size();
  const int64_t chunk = std::clamp<int64_t>(kBlock / (kLeastRows * channels), 1, taps), chunks = divide_up(taps, chunk);
  const int64_t depth = divide_up(taps, chunks) * channels, row = row_of(depth);
  const int64_t most = read_in_place ? kMostRows : std::clamp(kBlock / depth, kLeastRows, kMostRows);

  parallel(point_parts * column_parts, [&](int64_t part_index) {
    const Range own = part(points, part_index / column_parts, point_parts);
    const Range own_panels = part(panels, part_index % column_parts, column_parts);
    const int64_t width = own_panels.end - own_panels.begin, first = own_panels.begin * gemm.lanes;
    if (own.begin == own.end) return;
    const int64_t blocks = divide_up(own.end - own.begin, most), block = divide_up(own.end - own.begin, blocks);
    const Scratch input(Scratch::kInput, read_in_place ? 0 : block * row);
    const int64_t result_row = write_in_place ? r.images.pixel : row_of(width * gemm.lanes);
    const Scratch output(Scratch::kOutput, write_in_place ? 0 : block * result_row);
    Results<T> results = r;
    results.images.data += first;
    results.images.channels = std::min(columns - first, width * gemm.lanes);
    for_parts(own, blocks, [&](Range p) {
      const int64_t count = p.end - p.begin;
      float* c = output.data();
      if constexpr (std::is_same_v<T, float>)
        if (write_in_place) c = results.images.data + p.begin * result_row;
      if (bias != nullptr)
        gemm.copy_rows(count, results.images.channels, bias + first, 0, c, result_row);
      const int64_t next = std::min(p.end + count, own.end);
      Ahead ahead;
      if (read_in_place) ahead.add_rows({s.images.data, s.images.pixel}, channels, p.end, next);
      if constexpr (std::is_same_v<T, float>)
        if (write_in_place) ahead.add_rows({r.images.data, r.images.pixel}, columns, p.end, next);
      for_parts({0, taps}, chunks, [&](Range t) {
        Matrix a{input.data(), row, 1};
        if (read_in_place)
          a = {s.images.data + p.begin * s.images.pixel, s.images.pixel, 1};
        else
          gather(gemm, s, p, {t, {0, channels}}, input.data(), row);
        gemm.multiply(count, results.images.channels, (t.end - t.begin) * channels, a,
                      filters.at(own_panels.begin, t.begin), c, result_row, bias != nullptr || t.begin > 0, ahead);
      });
      if (!write_in_place) scatter<T>(gemm, c, result_row, p, results);
    });
  });
}

// The taps of a convolution, in the order of the weight.
std::vector<Tap> all_taps(const Geometry& g, int64_t height, int64_t width, int64_t row, int64_t column) {
  std::vector<Tap> taps;
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = 0; j < width; ++j)
      taps.push_back({i * g.dilation[0] - g.padding[0], j * g.dilation[1] - g.padding[1], i * row + j * column});
  return taps;
}

// One dimension of the taps that reach the pixels first, first + stride, ... of dx.
struct Reach {
  int64_t index, offset;  // of the tap; of the pixel of dy that it comes from
};

std::vector<Reach> reach(int64_t taps, int64_t first, int64_t stride, int64_t padding, int64_t dilation) {
  std::vector<Reach> found;
  for (int64_t i = taps - 1; i >= 0; --i)  // ascending pixels
    if ((first + padding - i * dilation) % stride == 0) found.push_back({i, (first + padding - i * dilation) / stride});
  return found;
}

}  // namespace

template <class T>
void convolve(const Images<const T>& x, const Weight<const float>& weight, const float* bias, const Geometry& g,
              const Images<T>& y) {
  if constexpr (std::is_same_v<T, float>)
    if (is_stem(x.channels, y.channels, weight.width, g)) return convolve_stem(x, weight, bias, g, y);
  const Gemm<T> gemm = kernels_of<T>();
  const WordWeight<T> words(gemm, weight, Summed::in);
  const Weight<const float>& w = words.weight;
  const Samples samples{words_of(x), g.stride, y.height, y.width, all_taps(g, w.height, w.width, w.row, w.column)};
  const PackedFilters filters(gemm, filters_at(samples.taps), w.in, w.out, {w.data, w.in_distance, w.out_distance});
  multiply<T>(gemm, samples, filters, bias, {y, {0, 0}, {1, 1}, y.height, y.width});
}

template <class T>
void convolve_input_gradient(const Images<const T>& dy, const Weight<const float>& weight, const Geometry& g,
                             const Images<T>& dx) {
  const Gemm<T> gemm = kernels_of<T>();
  const WordWeight<T> words(gemm, weight, Summed::out);
  const Weight<const float>& w = words.weight;
  for (int64_t i = 0; i < std::min(g.stride[0], dx.height); ++i) {
    const std::vector<Reach> rows = reach(w.height, i, g.stride[0], g.padding[0], g.dilation[0]);
    for (int64_t j = 0; j < std::min(g.stride[1], dx.width); ++j) {
      Samples samples{words_of(dy), {1, 1}, divide_up(dx.height - i, g.stride[0]), divide_up(dx.width - j, g.stride[1]),
                      {}};
      for (const Reach& y : rows)
        for (const Reach& x : reach(w.width, j, g.stride[1], g.padding[1], g.dilation[1]))
          samples.taps.push_back({y.offset, x.offset, y.index * w.row + x.index * w.column});
      const Results<T> results{dx, {i, j}, g.stride, samples.height, samples.width};
      if (samples.taps.empty()) {
        const std::vector<float> zeros(dx.channels);
        parallel_parts(samples.points(), torch::stable::get_num_threads(),
                       [&](Range p) { scatter<T>(gemm, zeros.data(), 0, p, results); });
        continue;
      }
      const PackedFilters filters(gemm, filters_at(samples.taps), w.out, w.in, {w.data, w.out_distance, w.in_distance});
      multiply<T>(gemm, samples, filters, nullptr, results);
    }
  }
}

// ---------------------------------------------------------------------------------------------- the weight's gradient

namespace {

// Sums of a tile, with the distances of two outputs and of two columns.
struct Sums {
  const float* data;
  int64_t out, column;
};

void add_tile(Sums from, int64_t copies, int64_t copy_distance, Range out, Columns columns, const Samples& s,
              const Weight<float>& w) {
  const int64_t channels = columns.channels.end - columns.channels.begin;
  for (int64_t k = out.begin; k < out.end; ++k, from.data += from.out) {
    const float* sums = from.data;
    for (int64_t t = columns.taps.begin; t < columns.taps.end; ++t, sums += channels * from.column) {
      float* const to = w.data + k * w.out_distance + s.taps[t].filter + columns.channels.begin * w.in_distance;
      for (int64_t i = 0; i < copies; ++i) {
        const float* const more = sums + i * copy_distance;
        if (w.in_distance == 1 && from.column == 1)
          for (int64_t c = 0; c < channels; ++c) to[c] += more[c];
        else
          for (int64_t c = 0; c < channels; ++c) to[c * w.in_distance] += more[c * from.column];
      }
    }
  }
}

// Pairs of rows as rows of words, the last one maybe with a row of zeros.
void pair_all(const GemmPairKernels& gemm, int64_t rows, int64_t columns, const BFloat16* from, int64_t from_row,
              float* to, int64_t to_row) {
  const std::vector<BFloat16> zeros(rows % 2 * columns);
  for (int64_t i = 0; i < rows; i += 2, from += 2 * from_row, to += to_row)
    gemm.pair_rows(columns, from, i + 1 < rows ? from + from_row : zeros.data(), to);
}

}  // namespace

template <class T>
void convolve_weight_gradient(const Images<const T>& x, const Images<const T>& dy, const Geometry& g,
                              const Weight<float>* dw, double* db) {
  const Gemm<T> gemm = kernels_of<T>();
  const int64_t threads = torch::stable::get_num_threads(), out = dy.channels, points = dy.count * dy.height * dy.width;

  if constexpr (std::is_same_v<T, float>) {
    if (db != nullptr) {
      const int64_t parts = std::min(threads, points);
      std::vector<double> sums(parts * out);
      parallel(parts, [&](int64_t i) {
        const Range own = part(points, i, parts);
        gemm.add_rows(own.end - own.begin, out, dy.data + own.begin * dy.pixel, dy.pixel, &sums[i * out]);
      });
      for (int64_t i = 0; i < parts; ++i)
        for (int64_t k = 0; k < out; ++k) db[k] += sums[i * out + k];
    }
  }
  if (dw == nullptr) return;
  if constexpr (std::is_same_v<T, float>)
    if (is_stem(x.channels, out, dw->width, g)) return stem_weight_gradient(x, dy, g, *dw);

  const Samples samples{words_of(x), g.stride, dy.height, dy.width, all_taps(g, dw->height, dw->width, dw->row, dw->column)};
  const int64_t taps = samples.taps.size(), channels = x.channels;

  // Tiles of the gradient that stay in the L2 cache while all points pass by. Several threads to a tile have points of
  // their own, and sums of their own.
  const int64_t rows = std::min<int64_t>(out, 256), columns = std::max<int64_t>(kTile / rows, 64);
  const int64_t most = kMostRows * kPerWord<T>;  // points to a block
  const int64_t out_tiles = divide_up(out, rows);
  const int64_t tap_tiles = divide_up(taps, std::max<int64_t>(columns / channels, 1));
  const int64_t channel_tiles = tap_tiles < taps ? 1 : divide_up(channels, columns);
  const int64_t tiles = out_tiles * tap_tiles * channel_tiles;
  const int64_t parts = std::clamp<int64_t>(divide_up(threads, tiles), 1, divide_up(points, most));

  const int64_t tile_out = divide_up(out, out_tiles), tile_taps = divide_up(taps, tap_tiles);
  const int64_t tile_channels = round_up(divide_up(channels, channel_tiles), gemm.lanes);
  const int64_t tile_columns = tile_taps * std::min(tile_channels, channels), row = row_of(tile_columns);

  // A row of few columns on the right side is read for few products: then the gradients are better there, and the sums
  // are turned.
  const bool turned = kPerWord<T> == 1 && out_tiles == 1 && tile_columns < out && tile_columns < 3 * gemm.lanes &&
                      gemm.whole_halves(out);
  const bool whole_halves = gemm.whole_halves(channels), read_in_place = in_place(samples) && (turned || whole_halves);
  const bool add_in_place = !turned && parts == 1 && taps == 1 && dw->in_distance == 1 && whole_halves;
  const int64_t sums_row = add_in_place ? dw->out_distance : turned ? row_of(tile_out) : row;
  const int64_t size = (turned ? tile_columns : tile_out) * sums_row;
  const auto sums_at = [&](const float* data) { return turned ? Sums{data, 1, sums_row} : Sums{data, sums_row, 1}; };
  const Scratch memory(Scratch::kFilterGradients, parts > 1 ? tiles * parts * size : 0);

  struct Tile {
    Range out;
    Columns columns;
  };
  const auto tile_of = [&](int64_t i) {
    const int64_t c = i % channel_tiles * tile_channels, t = i / channel_tiles % tap_tiles;
    return Tile{part(out, i / channel_tiles / tap_tiles, out_tiles),
                {part(taps, t, tap_tiles), {c, std::min(c + tile_channels, channels)}}};
  };

  parallel(tiles * parts, [&](int64_t task) {
    const Tile tile = tile_of(task / parts);
    if (tile.columns.channels.begin >= tile.columns.channels.end) return;
    const Range own = part(points, task % parts, parts);
    const int64_t blocks = divide_up(own.end - own.begin, most), count = tile.columns.count();
    const int64_t block = divide_up(own.end - own.begin, blocks), block_row = row / kPerWord<T>;
    const Scratch input(Scratch::kInput, read_in_place ? 0 : block * block_row);
    const Scratch output(Scratch::kOutput, parts > 1 || add_in_place ? 0 : size);
    const Scratch pairs(Scratch::kFilters, kPerWord<T> == 1 ? 0 : divide_up(block, 2) * (row + tile_out));
    float* const sums = add_in_place ? dw->data + tile.out.begin * dw->out_distance + tile.columns.channels.begin
                        : parts > 1  ? memory.data() + task * size
                                     : output.data();
    for_parts(own, blocks, [&](Range p) {
      const Range from{tile.columns.channels.begin / kPerWord<T>, tile.columns.channels.end / kPerWord<T>};
      if (!read_in_place) gather(gemm, samples, p, {tile.columns.taps, from}, input.data(), block_row);
      Panels b{input.data(), gemm.lanes, block_row};
      if (read_in_place)
        b = {samples.images.data + p.begin * samples.images.pixel + from.begin, gemm.lanes, samples.images.pixel};
      const T* const grads = dy.data + p.begin * dy.pixel + tile.out.begin;
      const int64_t tile_rows = tile.out.end - tile.out.begin, depth = divide_up(p.end - p.begin, kPerWord<T>);
      Matrix a{};
      if constexpr (std::is_same_v<T, float>) {
        a = {grads, 1, dy.pixel};
      } else {
        pair_all(gemm, p.end - p.begin, count, reinterpret_cast<const T*>(b.data), b.row * kPerWord<T>, pairs.data(),
                 row);
        b = {pairs.data(), gemm.lanes, row};
        float* const grad_pairs = pairs.data() + depth * row;
        pair_all(gemm, p.end - p.begin, tile_rows, grads, dy.pixel, grad_pairs, tile_out);
        a = {grad_pairs, 1, tile_out};
      }
      Ahead ahead;
      if constexpr (std::is_same_v<T, float>) {
        const int64_t next = std::min(2 * p.end - p.begin, own.end);
        ahead.add_rows({dy.data, dy.pixel}, tile_rows, p.end, next);
        if (read_in_place) ahead.add_rows({samples.images.data, samples.images.pixel}, count, p.end, next);
      }
      const bool add = add_in_place || p.begin > own.begin;
      if (turned)
        gemm.multiply(count, tile_rows, depth, {b.data, 1, b.row}, {a.data, gemm.lanes, a.column}, sums, sums_row, add,
                      ahead);
      else
        gemm.multiply(tile_rows, count, depth, a, b, sums, sums_row, add, ahead);
    });
    if (parts == 1 && !add_in_place) add_tile(sums_at(sums), 1, 0, tile.out, tile.columns, samples, *dw);
  });
  if (parts > 1)
    for (int64_t i = 0; i < tiles; ++i) {
      const Tile tile = tile_of(i);
      const Sums sums = sums_at(memory.data() + i * parts * size);
      parallel_if_large(parts * size, threads, [&](int64_t thread) {
        const Range r = part(tile.out.end - tile.out.begin, thread, threads);
        add_tile({sums.data + r.begin * sums.out, sums.out, sums.column}, parts, size,
                 {tile.out.begin + r.begin, tile.out.begin + r.end}, tile.columns, samples, *dw);
      });
    }
}

#define US3L_CONVOLVE(T)                                                                                                   \
  template void convolve(const Images<const T>&, const Weight<const float>&, const float*, const Geometry&,                \
                         const Images<T>&);                                                                                \
  template void convolve_input_gradient(const Images<const T>&, const Weight<const float>&, const Geometry&,               \
                                        const Images<T>&);                                                                 \
  template void convolve_weight_gradient(const Images<const T>&, const Images<const T>&, const Geometry&,                  \
                                         const Weight<float>*, double*);
US3L_CONVOLVE(float)
US3L_CONVOLVE(BFloat16)
#undef US3L_CONVOLVE

// ---------------------------------------------------------------------------------------------- operations

namespace {

template <class T>
Images<const T> images_of(const Tensor& t) {
  return {pixels<T>(t), t.size(0), t.size(2), t.size(3)};
}

template <class T>
Weight<T> weight_of(T* data, const Tensor& t, int64_t out, int64_t in) {
  return {data, out, in, t.size(2), t.size(3), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// The part of group i of n.
template <class T>
Images<T> group(Images<T> t, int64_t i, int64_t n) {
  t.channels /= n;
  t.data += i * t.channels;
  return t;
}

template <class T>
Weight<T> group(Weight<T> w, int64_t i, int64_t n) {
  w.out /= n;
  w.data += i * w.out * w.out_distance;
  return w;
}

Geometry geometry_of(const char* op, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": stride, padding and dilation: expected two numbers each");
  return {{stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}};
}

// The full layer's groups -> those that are active.
int64_t active_groups(const char* op, const Tensor& x, const Tensor& weight, int64_t out, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float && weight.size(0) >= out, op,
                  ": weight: expected float32 [>= ", out, ", C, kh, kw], got ", shape_of(weight));
  if (groups == 1) {
    STD_TORCH_CHECK(weight.size(1) >= x.size(1), op, ": weight: expected at least ", x.size(1), " channels, got ",
                    shape_of(weight));
    return 1;
  }
  const int64_t active = x.size(1) / weight.size(1);
  STD_TORCH_CHECK(x.size(1) % weight.size(1) == 0 && active <= groups && weight.size(0) / groups * active == out, op,
                  ": x and out_channels: expected the channels of whole groups of the weight ", shape_of(weight),
                  ", got ", x.size(1), " and ", out);
  return active;
}

// Images of bfloat16 are read as words.
void check_pairs(const char* op, const Tensor& x, const Tensor& weight, int64_t out, int64_t groups) {
  if (x.scalar_type() == ScalarType::Float) return;
  STD_TORCH_CHECK(has_bfloat16_pairs(), op, ": x: bfloat16 needs AVX512-BF16, which this CPU does not have");
  bool even = x.size(1) / groups % 2 == 0 && out / groups % 2 == 0;
  for (int64_t d : {0, 2, 3}) even = even && x.stride(d) % 2 == 0;
  STD_TORCH_CHECK(even, op, ": x: bfloat16 needs even channels of x, and of out_channels, in a group, and even strides");
}

int64_t output_size(int64_t size, int64_t kernel, const Geometry& g, int d) {
  return (size + 2 * g.padding[d] - g.dilation[d] * (kernel - 1) - 1) / g.stride[d] + 1;
}

}  // namespace

Tensor conv2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, int64_t out_channels,
              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
              int64_t groups) {
  const char* op = "conv2d";
  check_float_or_bfloat16_images(op, "x", x);
  STD_TORCH_CHECK(channels_innermost(x), op, ": x: expected channels innermost (channels_last)");
  const int64_t active = active_groups(op, x, weight, out_channels, groups);
  check_pairs(op, x, weight, out_channels, active);
  const Geometry geometry = geometry_of(op, stride, padding, dilation);
  const std::vector<float> offset = bias_of(op, bias, out_channels);
  Tensor y = new_images(x, out_channels, output_size(x.size(2), weight.size(2), geometry, 0),
                        output_size(x.size(3), weight.size(3), geometry, 1));
  if (y.numel() == 0) return y;
  const Weight<const float> filters =
      weight_of(weight.const_data_ptr<float>(), weight, out_channels, x.size(1) / active);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Images<const T> images = images_of<T>(x);
    const Images<T> result{dense_pixels<T>(y), y.size(0), y.size(2), y.size(3)};
    for (int64_t i = 0; i < active; ++i)
      convolve(group(images, i, active), group(filters, i, active),
               bias.has_value() ? offset.data() + i * (out_channels / active) : nullptr, geometry,
               group(result, i, active));
  };
  x.scalar_type() == ScalarType::Float ? run(float{}) : run(BFloat16{});
  return y;
}

Tensor conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, std::optional<Tensor> grad_weight,
                       std::optional<Tensor> grad_bias, bool need_grad_x, std::vector<int64_t> stride,
                       std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "conv2d_backward";
  check_float_or_bfloat16_images(op, "x", x);
  check_float_or_bfloat16_images(op, "grad", grad);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), op, ": grad: expected the dtype of x");
  STD_TORCH_CHECK(channels_innermost(x), op, ": x: expected channels innermost (channels_last)");
  const int64_t out = grad.size(1), active = active_groups(op, x, weight, out, groups), in = x.size(1) / active;
  check_pairs(op, x, weight, out, active);
  const Geometry geometry = geometry_of(op, stride, padding, dilation);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || !grad_bias.has_value(), op,
                  ": grad_bias: expected none with bfloat16");
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(2) == output_size(x.size(2), weight.size(2), geometry, 0) &&
                      grad.size(3) == output_size(x.size(3), weight.size(3), geometry, 1),
                  op, ": grad: expected the images of the output for x ", shape_of(x), ", got ", shape_of(grad));
  Tensor dx = need_grad_x ? new_images(x, x.size(1), x.size(2), x.size(3)) : torch::stable::new_empty(x, {0});
  if (x.numel() == 0 || grad.numel() == 0) return need_grad_x ? torch::stable::zero_(dx) : dx;

  Weight<float> gradient{};
  if (grad_weight.has_value()) {
    active_groups(op, x, *grad_weight, out, groups);
    gradient = weight_of(grad_weight->mutable_data_ptr<float>(), *grad_weight, out, in);
  }
  const Weight<const float> filters = weight_of(weight.const_data_ptr<float>(), weight, out, in);
  std::vector<double> sums(grad_bias.has_value() ? out : 0);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const bool as_it_lies =
        channels_innermost(grad) && is_matrix(images_of<T>(grad)) && images_of<T>(grad).pixel % kPerWord<T> == 0;
    const Tensor dense = as_it_lies ? grad : torch::stable::contiguous(grad, MemoryFormat::ChannelsLast);
    const Images<const T> images = images_of<T>(x), dy = images_of<T>(dense);
    if (need_grad_x) {
      const Images<T> result{dense_pixels<T>(dx), dx.size(0), dx.size(2), dx.size(3)};
      for (int64_t i = 0; i < active; ++i)
        convolve_input_gradient(group(dy, i, active), group(filters, i, active), geometry, group(result, i, active));
    }
    for (int64_t i = 0; i < active; ++i) {
      const Weight<float> of_group = group(gradient, i, active);
      convolve_weight_gradient(group(images, i, active), group(dy, i, active), geometry,
                               grad_weight.has_value() ? &of_group : nullptr,
                               grad_bias.has_value() ? &sums[i * (out / active)] : nullptr);
    }
  };
  x.scalar_type() == ScalarType::Float ? run(float{}) : run(BFloat16{});
  if (grad_bias.has_value()) {
    STD_TORCH_CHECK(grad_bias->dim() == 1 && grad_bias->scalar_type() == ScalarType::Float && grad_bias->size(0) >= out,
                    op, ": grad_bias: expected a float32 vector of at least ", out, " elements, got ",
                    shape_of(*grad_bias));
    float* const to = grad_bias->mutable_data_ptr<float>();
    for (int64_t k = 0; k < out; ++k) to[k * grad_bias->stride(0)] += static_cast<float>(sums[k]);
  }
  return dx;
}

}  // namespace us3l
