// Convolutions with stride 1 and one group on tensor cores, in half precision, for channels that are multiples of 8.
//
// y, dX and dW are products of matrices of pixels and channels, none of which is ever in memory: y of the pixels of x,
// side by side as every tap sees them, and the filters; dX of those of dY, seen by the taps the other way round, and the
// filters transposed; dW of the pixels of x and dY. Taps and channels are one axis, in chunks of 8 channels, which are 16
// bytes: so 40 channels are 40, and not 64 as where tiles are powers of two.
//
// A block's tile has an odd number of chunks to a row, 24 to 72 channels: then 8 rows of 16 bytes below each other lie
// in different banks of shared memory by themselves. Where a row is a power of two, chunks are exchanged within it
// (`swizzled`).

#include "../cpu/tensors.h"
#include "blocks.h"
#include "ops.h"
#include "tensor_cores.h"
#include "types.h"

namespace us3l::cuda {
namespace {

constexpr int kChannels = 8;  // of a chunk
constexpr int kWarp = 32, kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kStages = 3;                        // of the pipeline: tiles that are read while one is multiplied
constexpr int kDepth = 32;                        // terms of a sum in a stage
constexpr int kDepthChunks = kDepth / kChannels;  // where they are channels
constexpr int kPixels = 128;                      // of a tile of y or dX
constexpr int kLines = 128, kLineChunks = kLines / kChannels;  // taps and channels of a tile of dW

struct alignas(kAccess) Chunk {
  uint32_t words[4];
};

// Division by a number that is not known before, of n < 2^31. Source: Granlund and Montgomery, 1994, figure 4.1.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  explicit Divisor(int64_t by) : divisor(static_cast<uint32_t>(by)), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
  __device__ __forceinline__ uint32_t of(uint32_t n) const {
    return (static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> 32) + n) >> shift;
  }
};

// One dimension: pixel p of the result sees pixel p + origin + step * tap.
struct Axis {
  int32_t size, origin, step;
};

// The pixels that a product reads, and where those of the result see them.
template <class T>
struct Seen {
  Pixels<const T> pixels;
  Axis rows, columns;
  Divisor result_rows, result_columns;  // of an image of the result
  Divisor chunks, taps;                 // of a pixel, of a row of the filters
  uint32_t depth_chunks;                // of all taps
};

// A pixel of the result as it sees the others with tap 0.
struct Place {
  int32_t row, column;
  int64_t offset;

  template <class T>
  __device__ __forceinline__ Place(const Seen<T>& seen, uint32_t pixel) {
    const uint32_t line = seen.result_columns.of(pixel), image = seen.result_rows.of(line);
    row = static_cast<int32_t>(line - image * seen.result_rows.divisor) + seen.rows.origin;
    column = static_cast<int32_t>(pixel - line * seen.result_columns.divisor) + seen.columns.origin;
    offset = image * seen.pixels.image + row * seen.pixels.row + column * seen.pixels.pixel;
  }
};

// A chunk of the axis of taps and channels.
struct Tap {
  bool inside;
  int32_t row, column, channel;

  template <class T>
  __device__ __forceinline__ Tap(const Seen<T>& seen, uint32_t chunk) {
    const uint32_t tap = seen.chunks.of(chunk), tap_row = seen.taps.of(tap);
    inside = chunk < seen.depth_chunks;
    row = static_cast<int32_t>(tap_row);
    column = static_cast<int32_t>(tap - tap_row * seen.taps.divisor);
    channel = static_cast<int32_t>((chunk - tap * seen.chunks.divisor) * kChannels);
  }
};

// Copies the chunk that a pixel sees through a tap; zeros beside the image, or the matrix.
template <class T>
__device__ __forceinline__ void copy_seen(const Seen<T>& seen, const Place& place, const Tap& tap, bool inside,
                                          Chunk* to) {
  const int32_t down = tap.row * seen.rows.step, right = tap.column * seen.columns.step;
  const bool row = static_cast<uint32_t>(place.row + down) < static_cast<uint32_t>(seen.rows.size);
  const bool column = static_cast<uint32_t>(place.column + right) < static_cast<uint32_t>(seen.columns.size);
  const int64_t offset = place.offset + down * seen.pixels.row + right * seen.pixels.pixel + tap.channel;
  copy_async(to, seen.pixels.data + offset, inside & tap.inside & row & column);  // no branches
}

// The filters [output][tap row][tap column][input], the distances of the first three; all ends before element 2^31.
template <class T>
struct Filters {
  const T* data;
  int32_t output, row, column;
};

// Where a chunk of a row of `Chunks`, 4 or 16, lies, so that 8 rows below each other are in different banks, and 4 chunks
// of two rows as well. All banks are 8 chunks.
template <int Chunks>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * Chunks + (chunk ^ ((row % 2 * 4 + row / 2 % 4) % Chunks));
}

// The main loop: adds the products of all steps to a block's sums. While one stage is multiplied, the next are copied.
//
// copy(step, stage) starts a thread's copies; left(stage, k, m, to) loads 16 lines and 16 terms of the left factor for
// a warp, right(stage, n, to) 8 columns and all terms of the right one.
template <class T, int MT, int NT, int Chunks, class Copy, class Left, class Right>
__device__ __forceinline__ void add_products(uint32_t steps, Chunk (&shared)[kStages][Chunks], const Copy& copy,
                                             const Left& left, const Right& right, float (&sums)[MT][NT][4]) {
#pragma unroll
  for (uint32_t step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy(step, shared[step]);
    end_group();
  }
#pragma unroll 1
  for (uint32_t step = 0; step < steps; ++step) {
    wait_for_groups<kStages - 2>();
    __syncthreads();  // all copies of this stage are there, and the one before has been read
    const uint32_t next = step + kStages - 1;
    if (next < steps) copy(next, shared[next % kStages]);
    end_group();
    const Chunk* const stage = shared[step % kStages];
    uint32_t a[2][MT][4];
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int m = 0; m < MT; ++m) left(stage, k, m, a[k][m]);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      uint32_t b[4];
      right(stage, n, b);
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int m = 0; m < MT; ++m) multiply_add<T>(a[k][m], b[2 * k], b[2 * k + 1], sums[m][n]);
    }
  }
}

// y, or dX: a tile of kPixels of them and NT chunks of their channels, from all taps and channels of what they see.
//
// TRANSPOSED: the sum is over the filters' outputs (dX), else over their inputs (y). The result is dense.
template <class T, int NT, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads, NT < 9 ? 3 : 2)
    correlate_product_kernel(Seen<T> seen, Filters<T> filters, const float* bias, int channels, uint32_t pixels,
                             uint32_t tiles, T* to) {
  constexpr int MT = kPixels / kWarps / 16, kFilterChunks = NT * kDepth;
  constexpr int kCopies = (kFilterChunks + kThreads - 1) / kThreads;  // of a thread, of the filters
  constexpr int kPixelChunks = kPixels * kDepthChunks;
  static_assert(kPixels * NT <= kStages * (kPixelChunks + kFilterChunks) && NT % 2 == 1);
  __shared__ Chunk shared[kStages][kPixelChunks + kFilterChunks];

  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int first_channel = static_cast<int>(blockIdx.x % tiles) * NT * kChannels;
  const uint32_t first_pixel = blockIdx.x / tiles * kPixels;

  // Of the pixels a thread copies the same chunk of every 32nd.
  constexpr int kRows = kThreads / kDepthChunks;
  const int chunk = thread % kDepthChunks, row = thread / kDepthChunks;
  const auto place_of = [&](int i) {
    const uint32_t pixel = first_pixel + static_cast<uint32_t>(row + i * kRows);
    return Place(seen, pixel < pixels ? pixel : 0);
  };
  const Place places[] = {place_of(0), place_of(1), place_of(2), place_of(3)};
  static_assert(kPixels / kRows == 4);

  const auto copy_stage = [&](uint32_t step, Chunk* stage) {
    const Tap tap(seen, step * kDepthChunks + static_cast<uint32_t>(chunk));
#pragma unroll
    for (int i = 0; i < kPixels / kRows; ++i) {
      const bool inside = first_pixel + static_cast<uint32_t>(row + i * kRows) < pixels;
      copy_seen(seen, places[i], tap, inside, stage + swizzled<kDepthChunks>(row + i * kRows, chunk));
    }
    Chunk* const into = stage + kPixelChunks;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = thread + i * kThreads;
      if (index >= kFilterChunks) break;
      if constexpr (TRANSPOSED) {  // [kDepth][NT]
        const int output = index / NT, column = first_channel + index % NT * kChannels;
        const Tap from(seen, step * kDepthChunks + static_cast<uint32_t>(output / kChannels));
        const bool inside = from.inside && column < channels;
        const int offset = (from.channel + output % kChannels) * filters.output + from.row * filters.row +
                               from.column * filters.column + column;
        copy_async(into + index, filters.data + offset, inside);
      } else {  // [NT * 8][kDepthChunks]
        const int output = row + i * kRows;
        const bool inside = tap.inside && first_channel + output < channels;
        const int offset = (first_channel + output) * filters.output + tap.row * filters.row +
                               tap.column * filters.column + tap.channel;
        copy_async(into + swizzled<kDepthChunks>(output, chunk), filters.data + offset, inside);
      }
    }
  };

  const auto pixels_of = [&](const Chunk* stage, int k, int m, uint32_t(&to)[4]) {
    load_matrices(stage + swizzled<kDepthChunks>((warp * MT + m) * 16 + lane % 16, k * 2 + lane / 16), to);
  };
  const auto filters_of = [&](const Chunk* stage, int n, uint32_t(&to)[4]) {
    const Chunk* const from = stage + kPixelChunks;
    if constexpr (TRANSPOSED)
      load_transposed(from + lane * NT + n, to);
    else
      load_matrices(from + swizzled<kDepthChunks>(n * 8 + lane % 8, lane / 8), to);
  };
  float sums[MT][NT][4] = {};
  const uint32_t steps = (seen.depth_chunks + kDepthChunks - 1) / kDepthChunks;
  add_products<T>(steps, shared, copy_stage, pixels_of, filters_of, sums);

  // By way of shared memory, [kPixels][NT], so that every thread writes 16 bytes.
  __syncthreads();
  Chunk* const tile = shared[0];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int column = n * kChannels + lane % 4 * 2;
    float offset[2] = {};
    if (bias != nullptr && first_channel + column < channels) {
      offset[0] = bias[first_channel + column];
      offset[1] = bias[first_channel + column + 1];
    }
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int line = (warp * MT + m) * 16 + half * 8 + lane / 4;
        const float pair[] = {sums[m][n][2 * half] + offset[0], sums[m][n][2 * half + 1] + offset[1]};
        store(reinterpret_cast<T*>(tile + line * NT) + column, pair);
      }
  }
  __syncthreads();
  static_assert(kPixels == kThreads);
#pragma unroll
  for (int i = 0; i < NT; ++i) {
    const int index = thread + i * kThreads, column = first_channel + index % NT * kChannels;
    const uint32_t pixel = first_pixel + static_cast<uint32_t>(index / NT);
    if (pixel < pixels && column < channels)
      *reinterpret_cast<Chunk*>(to + static_cast<int64_t>(pixel) * channels + column) = tile[index];
  }
}

// dW, a part of it: partials[piece][tap and input][output], a tile of kLines by NT chunks, from a piece of the pixels.
template <class T, int NT>
__global__ void __launch_bounds__(kThreads, NT < 9 ? 3 : 2)
    gradient_product_kernel(Seen<T> seen, const T* grad, int64_t grad_pixel, int channels, uint32_t pixels,
                            uint32_t piece_pixels, float* partials) {
  constexpr int MT = kLines / kWarps / 16;
  constexpr int kGradChunks = NT * kDepth, kCopies = (kGradChunks + kThreads - 1) / kThreads;
  constexpr int kSeenChunks = kLineChunks * kDepth;
  static_assert(NT % 2 == 1);
  __shared__ Chunk shared[kStages][kSeenChunks + kGradChunks];

  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int first_channel = static_cast<int>(blockIdx.y) * NT * kChannels;
  const uint32_t begin = blockIdx.z * piece_pixels, left = pixels - begin;
  const uint32_t count = left < piece_pixels ? left : piece_pixels;

  // A thread copies every 4th chunk of one pixel in a stage, the same ones in all.
  constexpr int kStep = kThreads / kDepth;
  const int chunk = thread % kStep, row = thread / kStep;
  const auto tap_of = [&](int i) {
    return Tap(seen, blockIdx.x * kLineChunks + static_cast<uint32_t>(chunk + i * kStep));
  };
  const Tap taps[] = {tap_of(0), tap_of(1), tap_of(2), tap_of(3)};
  static_assert(kLineChunks / kStep == 4);

  const auto copy_stage = [&](uint32_t step, Chunk* stage) {
    const uint32_t own = step * kDepth + static_cast<uint32_t>(row);
    const Place place(seen, begin + (own < count ? own : 0));
#pragma unroll
    for (int i = 0; i < kLineChunks / kStep; ++i)
      copy_seen(seen, place, taps[i], own < count, stage + swizzled<kLineChunks>(row, chunk + i * kStep));
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = thread + i * kThreads, column = first_channel + index % NT * kChannels;
      if (index >= kGradChunks) break;
      const uint32_t pixel = step * kDepth + static_cast<uint32_t>(index / NT);
      const bool inside = pixel < count && column < channels;
      const int64_t offset = static_cast<int64_t>(begin + pixel) * grad_pixel + column;
      copy_async(stage + kSeenChunks + index, grad + offset, inside);
    }
  };

  const auto seen_of = [&](const Chunk* stage, int k, int m, uint32_t(&to)[4]) {
    const int line = k * 16 + lane / 16 * 8 + lane % 8, column = (warp * MT + m) * 2 + lane / 8 % 2;
    load_transposed(stage + swizzled<kLineChunks>(line, column), to);
  };
  const auto grads_of = [&](const Chunk* stage, int n, uint32_t(&to)[4]) {
    load_transposed(stage + kSeenChunks + lane * NT + n, to);
  };
  float sums[MT][NT][4] = {};
  add_products<T>((count + kDepth - 1) / kDepth, shared, copy_stage, seen_of, grads_of, sums);

  const int64_t lines = static_cast<int64_t>(seen.depth_chunks) * kChannels;
  float* const piece = partials + blockIdx.z * lines * channels;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int column = first_channel + n * kChannels + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t line = int64_t{blockIdx.x} * kLines + (warp * MT + m) * 16 + half * 8 + lane / 4;
        const float pair[] = {sums[m][n][2 * half], sums[m][n][2 * half + 1]};
        if (line < lines && column < channels) store(piece + line * channels + column, pair);
      }
  }
}

// The second stage: adds the pieces to the gradient of the filters, of any strides.
__global__ void __launch_bounds__(kBlock)
    finish_gradient_kernel(const float* partials, Merging merging, int inputs, int outputs, int taps, int tap_columns,
                           float* grad_weight, int64_t output, int64_t input, int64_t row, int64_t column) {
  __shared__ double shared[1][kBlock];
  double sum;
  if (!sum_of_blocks(merging, partials, int64_t{taps} * inputs * outputs, shared, sum)) return;
  const int i = static_cast<int>(merging.column_of_thread()), line = i / outputs, tap = line / inputs;
  grad_weight[i % outputs * output + line % inputs * input + tap / tap_columns * row + tap % tap_columns * column] +=
      static_cast<float>(sum);
}

// f(NT) with the chunks of a tile for so many channels. Every tile reads the pixels again, which is taken to cost as
// much as 32 channels.
template <class F>
auto for_tile(int64_t channels, const F& f) {
  int best = 0;
  int64_t least = INT64_MAX;
  for (const int chunks : {9, 7, 5, 3}) {
    const int64_t cost = (channels + chunks * kChannels - 1) / (chunks * kChannels) * (chunks * kChannels + 32);
    if (cost < least) least = cost, best = chunks;
  }
  switch (best) {
    case 3:
      return f(std::integral_constant<int, 3>());
    case 5:
      return f(std::integral_constant<int, 5>());
    case 7:
      return f(std::integral_constant<int, 7>());
    default:
      return f(std::integral_constant<int, 9>());
  }
}

template <class F>
auto for_half(const char* op, ScalarType type, const F& f) {
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": x: expected bfloat16 or float16");
  return type == ScalarType::Half ? f(Half()) : f(BFloat16());
}

unsigned tiles_of(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

// The stride of a dimension; 0 if that is of no use, and so may be any number: also what is not read is aligned.
int64_t distance(const Tensor& t, int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); }

bool has_chunks(const Tensor& t) {
  bool whole = t.stride(1) == 1 && t.size(1) % kChannels == 0 && aligned(t.const_data_ptr());
  for (const int64_t d : {0, 2, 3}) whole = whole && distance(t, d) % kChannels == 0;
  return whole;
}

// A convolution's geometry and filters, and the launches of its products.
class Convolution {
 public:
  Convolution(const char* op, const Tensor& x, const Tensor& weight, int64_t outputs, const std::vector<int64_t>& stride,
              const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups)
      : x_(x), weight_(weight), outputs_(outputs), padding_(padding), dilation_(dilation), stream_(x) {
    STD_TORCH_CHECK(on_device(x) && x.dim() == 4 && has_chunks(x), op,
                    ": x: expected [N, C, H, W] on a CUDA device, channels innermost, they and strides multiples of 8");
    STD_TORCH_CHECK(stride == std::vector<int64_t>({1, 1}) && groups == 1 && padding.size() == 2 && dilation.size() == 2,
                    op, ": expected stride 1 and one group");
    STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == x.scalar_type() && weight.size(0) >= outputs &&
                        weight.size(1) >= x.size(1) && has_chunks(weight) && same_device(weight),
                    op, ": weight: expected [>= ", outputs, ", >= ", x.size(1),
                    ", kh, kw] of the dtype and device of x, input channels innermost, strides multiples of 8, got ",
                    shape_of(weight));
    STD_TORCH_CHECK(outputs > 0 && outputs % kChannels == 0, op, ": out_channels: expected a multiple of 8, got ",
                    outputs);
    for (int64_t d = 0; d < 2; ++d) {
      size_[d] = x.size(2 + d) + 2 * padding[d] - dilation[d] * (weight.size(2 + d) - 1);
      STD_TORCH_CHECK(weight.size(2 + d) >= 1 && dilation[d] >= 1 && padding[d] >= 0 && size_[d] >= 1, op,
                      ": x: expected at least the pixels that the filter covers, got ", shape_of(x), " for ",
                      shape_of(weight));
    }
    constexpr int64_t kLimit = int64_t{1} << 30;  // the kernels count in 32 bits
    int64_t last = 0;  // element of the weight
    for (int64_t d = 0; d < 4; ++d) last += (weight.size(d) - 1) * weight.stride(d);
    STD_TORCH_CHECK(x.size(0) * std::max(size_[0] * size_[1], x.size(2) * x.size(3)) < kLimit && last < kLimit, op,
                    ": x, weight: expected fewer than 2^30 pixels, and elements from the weight's first to its last");
  }

  int64_t size(int64_t d) const { return size_[d]; }

  template <class T>
  void forward(const float* bias, Tensor& y) const {
    correlate<T, false>(seen_by<T>(y, x_, false), bias, y);
  }

  template <class T>
  void input_gradient(const Tensor& dy, Tensor& dx) const {
    correlate<T, true>(seen_by<T>(dx, dy, true), nullptr, dx);
  }

  // dy: a matrix of rows.
  template <class T>
  void filter_gradient(const Tensor& dy, Tensor& grad_weight) const {
    constexpr int64_t kWanted = 512;       // blocks, whatever the GPU: results do not depend on its size
    constexpr int64_t kLeast = 8 * kDepth;  // pixels of a piece
    const Seen<T> seen = seen_by<T>(dy, x_, false);
    const int64_t pixels = dy.size(0) * dy.size(2) * dy.size(3), taps = weight_.size(2) * weight_.size(3);
    const int64_t lines = taps * x_.size(1);
    for_tile(outputs_, [&](auto chunks) {
      dim3 grid(tiles_of(lines, kLines), tiles_of(outputs_, chunks * kChannels));
      const int64_t share = std::max<int64_t>(kWanted / (int64_t{grid.x} * grid.y), 1);
      const int64_t length = round_up(std::max((pixels + share - 1) / share, kLeast), kDepth);
      grid.z = tiles_of(pixels, length);
      Tensor partials = torch::stable::new_empty(x_, {grid.z, lines, outputs_}, ScalarType::Float);
      stream_.launch(gradient_product_kernel<T, chunks>, grid, kThreads, seen, static_cast<const T*>(dy.const_data_ptr()),
                     row_stride(dy, 1), static_cast<int>(outputs_), static_cast<uint32_t>(pixels),
                     static_cast<uint32_t>(length), partials.mutable_data_ptr<float>());
      const Merging merging(grid.z);
      stream_.launch(finish_gradient_kernel, blocks_for(lines * outputs_, merging.columns), kBlock,
                     partials.const_data_ptr<float>(), merging, static_cast<int>(x_.size(1)), static_cast<int>(outputs_),
                     static_cast<int>(taps), static_cast<int>(weight_.size(3)), grad_weight.mutable_data_ptr<float>(),
                     grad_weight.stride(0), grad_weight.stride(1), grad_weight.stride(2), grad_weight.stride(3));
    });
  }

  bool same_device(const Tensor& t) const { return on_device(t) && t.get_device_index() == x_.get_device_index(); }

 private:
  // reversed: taps go the other way, from the other end.
  template <class T>
  Seen<T> seen_by(const Tensor& result, const Tensor& t, bool reversed) const {
    const auto axis = [&](int64_t d) {
      const auto sign = reversed ? -1 : 1;
      return Axis{static_cast<int32_t>(t.size(2 + d)), static_cast<int32_t>(-sign * padding_[d]),
                  static_cast<int32_t>(sign * dilation_[d])};
    };
    const int64_t chunks = t.size(1) / kChannels, taps = weight_.size(2) * weight_.size(3);
    const Pixels<const T> pixels{static_cast<const T*>(t.const_data_ptr()), t.size(1), distance(t, 0), distance(t, 2),
                                 distance(t, 3)};
    return {pixels,
            axis(0),
            axis(1),
            Divisor(result.size(2)),
            Divisor(result.size(3)),
            Divisor(chunks),
            Divisor(weight_.size(3)),
            static_cast<uint32_t>(chunks * taps)};
  }

  template <class T, bool TRANSPOSED>
  void correlate(const Seen<T>& seen, const float* bias, Tensor& to) const {
    const auto narrow = [&](int64_t d) { return static_cast<int32_t>(distance(weight_, d)); };
    const Filters<T> filters{static_cast<const T*>(weight_.const_data_ptr()), narrow(0), narrow(2), narrow(3)};
    const int64_t channels = to.size(1), pixels = to.numel() / channels;
    for_tile(channels, [&](auto chunks) {
      const unsigned tiles = tiles_of(channels, chunks * kChannels);
      stream_.launch(correlate_product_kernel<T, chunks, TRANSPOSED>, dim3(tiles * tiles_of(pixels, kPixels)), kThreads,
                     seen, filters, bias, static_cast<int>(channels), static_cast<uint32_t>(pixels), tiles,
                     static_cast<T*>(to.mutable_data_ptr()));
    });
  }

  const Tensor &x_, &weight_;
  int64_t outputs_, size_[2];
  const std::vector<int64_t>&padding_, &dilation_;
  Stream stream_;
};

}  // namespace

Tensor conv2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, int64_t out_channels,
              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "conv2d";
  const Convolution convolution(op, x, weight, out_channels, stride, padding, dilation, groups);
  const float* const b = input_vector(op, "bias", bias, out_channels);
  STD_TORCH_CHECK(!bias.has_value() || convolution.same_device(*bias), op, ": bias: expected the device of x");
  Tensor y = new_images(x, out_channels, convolution.size(0), convolution.size(1));
  if (y.numel() == 0) return y;
  for_half(op, x.scalar_type(), [&](auto type) { convolution.forward<decltype(type)>(b, y); });
  return y;
}

Tensor conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, std::optional<Tensor> grad_weight,
                       std::optional<Tensor> grad_bias, bool need_grad_x, std::vector<int64_t> stride,
                       std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "conv2d_backward";
  STD_TORCH_CHECK(grad.dim() == 4, op, ": grad: expected [N, K, H, W], got ", shape_of(grad));
  const int64_t outputs = grad.size(1);
  const Convolution convolution(op, x, weight, outputs, stride, padding, dilation, groups);
  STD_TORCH_CHECK(!grad_bias.has_value(), op, ": grad_bias: expected none, a sum over pixels is torch's");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && convolution.same_device(grad) && grad.size(0) == x.size(0) &&
                      grad.size(2) == convolution.size(0) && grad.size(3) == convolution.size(1),
                  op, ": grad: expected [", x.size(0), ", ", outputs, ", ", convolution.size(0), ", ", convolution.size(1),
                  "] of the dtype and device of x, got ", shape_of(grad));
  if (grad_weight.has_value())
    STD_TORCH_CHECK(grad_weight->scalar_type() == ScalarType::Float && convolution.same_device(*grad_weight) &&
                        grad_weight->dim() == 4 && grad_weight->size(0) >= outputs && grad_weight->size(1) >= x.size(1) &&
                        grad_weight->size(2) == weight.size(2) && grad_weight->size(3) == weight.size(3),
                    op, ": grad_weight: expected float32 [>= ", outputs, ", >= ", x.size(1), ", ", weight.size(2), ", ",
                    weight.size(3), "], got ", shape_of(*grad_weight));
  Tensor dx = need_grad_x ? new_images(x, x.size(1), x.size(2), x.size(3)) : torch::stable::new_empty(x, {0});
  if (x.numel() == 0) return dx;
  const bool rows = has_chunks(grad) && row_stride(grad, 1) % kChannels == 0;
  const Tensor dy = rows ? grad : torch::stable::contiguous(grad, MemoryFormat::ChannelsLast);
  for_half(op, x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (grad_weight.has_value()) convolution.filter_gradient<T>(dy, *grad_weight);
    if (need_grad_x) convolution.input_gradient<T>(dy, dx);
  });
  return dx;
}

}  // namespace us3l::cuda
