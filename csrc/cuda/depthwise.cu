// Depthwise convolution with multiplier 1, channels innermost: every thread computes some pixels of a vector of channels.
//
// Square filters of 3, 5 and 7 taps with stride 1 or 2 have kernels of their own, in which a thread computes kPixels
// neighbours and reads what lies under them once. All else (any filter, stride, dilation, number of channels, alignment)
// runs on kernels of one pixel and one channel to a thread.
//
// Filters are rearranged first, [kh][kw][channels] in float32: what neighbouring threads read lies side by side.

#include "../cpu/tensors.h"
#include "blocks.h"
#include "ops.h"
#include "types.h"

namespace us3l::cuda {
namespace {

constexpr int kPixels = 4;

// One dimension of the convolution, `padding` and so on as in torch.
struct Axis {
  int32_t in, out, kernel, stride, padding, dilation;
};

// What a launch covers: groups of neighbouring pixels in rows of images, times tiles of channels.
struct Cut {
  Tiles tiles;
  int32_t depth;         // groups of a block
  uint32_t rows, groups;  // of an image, of a row
  int64_t images;

  Cut(int64_t images, int64_t rows, int64_t groups, int64_t channels, int width)
      : tiles(channels, width),
        depth(kBlock / tiles.lanes),
        rows(static_cast<uint32_t>(rows)),
        groups(static_cast<uint32_t>(groups)),
        images(images) {}

  int64_t count() const { return images * rows * groups; }
  dim3 grid() const {
    return dim3(static_cast<unsigned>((count() + depth - 1) / depth), static_cast<unsigned>(tiles.count));
  }
  unsigned threads() const { return static_cast<unsigned>(tiles.lanes * depth); }
};

// What a thread works on.
struct Place {
  int channel;
  bool inside;
  int64_t image;
  int row, group;

  __device__ __forceinline__ Place(const Cut& cut, int width) {
    const auto thread = static_cast<int>(threadIdx.x);
    channel = (static_cast<int>(blockIdx.y) * cut.tiles.lanes + thread % cut.tiles.lanes) * width;
    const uint32_t i = blockIdx.x * static_cast<uint32_t>(cut.depth) + static_cast<uint32_t>(thread / cut.tiles.lanes);
    const uint32_t line = i / cut.groups;
    group = static_cast<int>(i - line * cut.groups);
    image = line / cut.rows;
    row = static_cast<int>(line % cut.rows);
    inside = channel < cut.tiles.channels && image < cut.images;
  }
};

// The filters of some channels, [kh][kw][channels]; reversed: the first tap last.
__global__ void __launch_bounds__(kBlock)
    filters_kernel(const float* weight, int64_t channel, int64_t row, int64_t column, int channels, int height, int width,
                   bool reversed, float* filters) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x, taps = int64_t{height} * width;
  if (i >= taps * channels) return;
  const int64_t tap = i / channels, source = reversed ? taps - 1 - tap : tap;
  filters[i] = weight[i % channels * channel + source / width * row + source % width * column];
}

// What is read outside of an image: behind a branch, each load would be waited for before the next.
alignas(kAccess) __device__ const unsigned char kOutside[kAccess] = {};

// W elements of each of N neighbouring pixels, zeros outside of the image. Kernels ask for all of a row's pixels before
// they use the first; their launch bounds leave registers for that, with two blocks on an SM where it can be.
template <class T, int N, int W>
__device__ __forceinline__ void load_pixels(const T* row, int64_t pixel, int first, int columns, float (&to)[N][W]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const bool inside = first + j >= 0 && first + j < columns;
    load(inside ? row + (first + j) * pixel : reinterpret_cast<const T*>(kOutside), to[j]);
  }
}

template <int W>
__device__ __forceinline__ void add_product(const float (&a)[W], const float (&b)[W], float (&sum)[W]) {
#pragma unroll
  for (int k = 0; k < W; ++k) sum[k] = fmaf(a[k], b[k], sum[k]);
}

template <class T, int W>
__device__ __forceinline__ void store_pixels(const Pixels<T>& to, const Place& place, int column, int columns,
                                             const float (&sums)[kPixels][W]) {
  T* const row = to.data + place.image * to.image + place.row * to.row + place.channel;
#pragma unroll
  for (int p = 0; p < kPixels; ++p)
    if (column + p >= 0 && column + p < columns) store(row + (column + p) * to.pixel, sums[p]);
}

// y = the correlation of x with filters of K x K taps, S apart; bias null: none.
template <class T, int K, int S>
__global__ void __launch_bounds__(kBlock, K == 3 ? 2 : 1)
    correlate_kernel(Pixels<const T> x, Pixels<T> y, const float* filters, const float* bias, Axis rows, Axis columns,
                     Cut cut) {
  constexpr int W = kWidth<T>;
  const Place place(cut, W);
  if (!place.inside) return;
  const int column = place.group * kPixels, first = column * S - columns.padding;
  float sums[kPixels][W];
#pragma unroll
  for (int p = 0; p < kPixels; ++p)
#pragma unroll
    for (int k = 0; k < W; ++k) sums[p][k] = bias != nullptr ? bias[place.channel + k] : 0.0f;

#pragma unroll 1
  for (int tap = 0; tap < K; ++tap) {
    const int in = place.row * S - rows.padding + tap;
    if (in < 0 || in >= rows.in) continue;
    const T* const source = x.data + place.image * x.image + in * x.row + place.channel;
    float filter[K][W];
#pragma unroll
    for (int t = 0; t < K; ++t) load(filters + (tap * K + t) * x.channels + place.channel, filter[t]);
    float v[(kPixels - 1) * S + K][W];
    load_pixels(source, x.pixel, first, columns.in, v);
#pragma unroll
    for (int j = 0; j < (kPixels - 1) * S + K; ++j)
#pragma unroll
      for (int p = 0; p < kPixels; ++p)
        if (j - p * S >= 0 && j - p * S < K) add_product(v[j], filter[j - p * S], sums[p]);
  }
  store_pixels(y, place, column, columns.out, sums);
}

// dx of a correlation with stride 2: an input sees every other tap, beginning with one that its position tells. A group of
// pixels begins under an output, so that the taps of each are known.
template <class T, int K>
__global__ void __launch_bounds__(kBlock, 2)
    adjoint_stride2_kernel(Pixels<const T> dy, Pixels<T> dx, const float* filters, Axis rows, Axis columns, Cut cut) {
  constexpr int W = kWidth<T>;
  static_assert(kPixels % 2 == 0, "groups begin at even distances");
  const Place place(cut, W);
  if (!place.inside) return;
  const int column = place.group * kPixels - columns.padding % 2, first = (column + columns.padding) / 2;
  float sums[kPixels][W] = {};
#pragma unroll 1
  for (int tap = (place.row + rows.padding) % 2; tap < K; tap += 2) {
    const int out = (place.row + rows.padding - tap) / 2;  // not -1 / 2, which is 0: tap <= K - 1 may exceed the rest
    if (place.row + rows.padding < tap || out >= rows.out) continue;
    const T* const source = dy.data + place.image * dy.image + out * dy.row + place.channel;
    float filter[K][W];
#pragma unroll
    for (int t = 0; t < K; ++t) load(filters + (tap * K + t) * dy.channels + place.channel, filter[t]);
    constexpr int kLeft = (K - 1) / 2, kRight = (kPixels - 1) / 2;
    float v[kLeft + 1 + kRight][W];
    load_pixels(source, dy.pixel, first - kLeft, columns.out, v);
#pragma unroll
    for (int j = -kLeft; j <= kRight; ++j)
#pragma unroll
      for (int p = 0; p < kPixels; ++p)
        if (p - 2 * j >= 0 && p - 2 * j < K) add_product(v[kLeft + j], filter[p - 2 * j], sums[p]);
  }
  store_pixels(dx, place, column, columns.in, sums);
}

// Where `tap` of pixel i of the result looks: a position outside of the image for nowhere.
template <bool kAdjoint>
__device__ __forceinline__ int under_tap(const Axis& axis, int i, int tap) {
  if (!kAdjoint) return i * axis.stride - axis.padding + tap * axis.dilation;
  const int offset = i + axis.padding - tap * axis.dilation;
  return offset >= 0 && offset % axis.stride == 0 ? offset / axis.stride : -1;
}

// y, or dx from dy, of any geometry: one pixel and one channel to a thread.
template <class T, bool kAdjoint>
__global__ void __launch_bounds__(kBlock)
    general_kernel(Pixels<const T> from, Pixels<T> to, const float* filters, const float* bias, Axis rows, Axis columns,
                   Cut cut) {
  const Place place(cut, 1);
  if (!place.inside) return;
  const int height = kAdjoint ? rows.out : rows.in, width = kAdjoint ? columns.out : columns.in;
  float sum = bias != nullptr ? bias[place.channel] : 0.0f;
  for (int i = 0; i < rows.kernel; ++i) {
    const int row = under_tap<kAdjoint>(rows, place.row, i);
    if (row < 0 || row >= height) continue;
    for (int j = 0; j < columns.kernel; ++j) {
      const int column = under_tap<kAdjoint>(columns, place.group, j);
      if (column < 0 || column >= width) continue;
      const auto v = static_cast<float>(from.data[place.image * from.image + row * from.row + column * from.pixel +
                                                  place.channel]);
      sum = fmaf(v, filters[(int64_t{i} * columns.kernel + j) * from.channels + place.channel], sum);
    }
  }
  to.data[place.image * to.image + place.row * to.row + place.group * to.pixel + place.channel] = static_cast<T>(sum);
}

// The rows of dy, cut into blocks for the filters' gradient. With K taps to a row, a thread has the K products of one row
// of the filter, and a block all rows of it; otherwise (K = 0) a thread has one tap, and so has a block.
struct RowCut {
  Tiles tiles;
  int32_t depth, filter_rows, taps;  // rows of dy at a time, rows of the filter in a block, taps that blocks have apart
  int32_t rows, block_rows, blocks;

  RowCut(int64_t rows, int64_t width, int64_t channels, int vector, int filter_rows, int64_t taps)
      : tiles(channels, vector),
        depth(kBlock / (tiles.lanes * filter_rows)),
        filter_rows(filter_rows),
        taps(static_cast<int32_t>(taps)),
        rows(static_cast<int32_t>(rows)) {
    constexpr int64_t kWanted = 512;     // blocks that fill a GPU; not asked of it: results do not depend on its size
    constexpr int64_t kLongest = 1024;  // products of a thread: its sums are float32
    const int64_t steps = (rows + depth - 1) / depth, share = std::max<int64_t>(kWanted / (tiles.count * taps), 1);
    const int64_t length = std::clamp<int64_t>((steps + share - 1) / share, 1, std::max<int64_t>(kLongest / width, 1));
    block_rows = static_cast<int32_t>(length * depth);
    blocks = static_cast<int32_t>((rows + block_rows - 1) / block_rows);
  }

  int64_t grid_blocks() const { return int64_t{blocks} * taps; }
  dim3 grid() const { return dim3(static_cast<unsigned>(grid_blocks()), static_cast<unsigned>(tiles.count)); }
  unsigned threads() const { return static_cast<unsigned>(tiles.lanes * filter_rows * depth); }
};

// Sums of x dy under each tap: partial results [blocks][kh][kw][channels] of the blocks.
template <class T, int W, int K, int S>
__global__ void __launch_bounds__(kBlock, K == 3 ? 2 : 1)
    filter_gradient_kernel(Pixels<const T> x, Pixels<const T> dy, Axis rows, Axis columns, RowCut cut, float* partials) {
  constexpr int kTaps = K == 0 ? 1 : K, kStep = K == 0 ? 1 : kPixels;
  __shared__ float shared[W][kBlock];
  const int thread = static_cast<int>(threadIdx.x), row_threads = cut.tiles.lanes * cut.filter_rows;
  const int channel = (static_cast<int>(blockIdx.y) * cut.tiles.lanes + thread % cut.tiles.lanes) * W;
  const bool inside = channel < cut.tiles.channels;
  // The first of the thread's taps, which are side by side.
  const int tap = K == 0 ? static_cast<int>(blockIdx.x % static_cast<unsigned>(cut.taps))
                         : thread / cut.tiles.lanes % cut.filter_rows * K;
  const int block = static_cast<int>(blockIdx.x / static_cast<unsigned>(cut.taps));
  const int tap_row = tap / columns.kernel, tap_column = tap % columns.kernel;
  const int stride = S == 0 ? columns.stride : S;

  float sums[kTaps][W] = {};
  const int first = block * cut.block_rows, left_rows = cut.rows - first;
  const int count = !inside ? 0 : left_rows < cut.block_rows ? left_rows : cut.block_rows;
  for (int i = thread / row_threads; i < count; i += cut.depth) {
    const int64_t image = (first + i) / rows.out;
    const int out = (first + i) % rows.out;
    const int in = out * rows.stride - rows.padding + tap_row * rows.dilation;
    if (in < 0 || in >= rows.in) continue;
    const T* const source = x.data + image * x.image + in * x.row + channel;
    const T* const upstream = dy.data + image * dy.image + out * dy.row + channel;
#pragma unroll 1
    for (int column = 0; column < columns.out; column += kStep) {
      float g[kStep][W], v[(kStep - 1) * S + kTaps][W];
      load_pixels(upstream, dy.pixel, column, columns.out, g);
      load_pixels(source, x.pixel, column * stride - columns.padding + tap_column * columns.dilation, columns.in, v);
#pragma unroll
      for (int j = 0; j < (kStep - 1) * S + kTaps; ++j)
#pragma unroll
        for (int p = 0; p < kStep; ++p)
          if (j - p * S >= 0 && j - p * S < kTaps) add_product(v[j], g[p], sums[j - p * S]);
    }
  }

#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    __syncthreads();  // the sums of the tap before have been read
#pragma unroll
    for (int k = 0; k < W; ++k) shared[k][thread] = sums[t][k];
    merge_rows(cut.depth, row_threads, [&](int own, int other) {
#pragma unroll
      for (int k = 0; k < W; ++k) shared[k][own] += shared[k][other];
    });
    if (thread >= row_threads || !inside) continue;
    float sum[W];
#pragma unroll
    for (int k = 0; k < W; ++k) sum[k] = shared[k][thread];
    const int64_t taps = int64_t{rows.kernel} * columns.kernel;
    store(partials + (int64_t{block} * taps + tap + t) * cut.tiles.channels + channel, sum);
  }
}

// The second stage: adds the blocks' sums to the gradient of the filters, of any strides.
__global__ void __launch_bounds__(kBlock)
    finish_filter_gradient_kernel(const float* partials, Merging merging, int64_t taps, int channels, int width,
                                  float* grad_weight, int64_t channel, int64_t row, int64_t column) {
  __shared__ double shared[1][kBlock];
  double sum;
  if (!sum_of_blocks(merging, partials, taps * channels, shared, sum)) return;
  const int64_t i = merging.column_of_thread();
  const int64_t tap = i / channels;
  grad_weight[i % channels * channel + tap / width * row + tap % width * column] += static_cast<float>(sum);
}

template <class T>
bool has_vectors(const Pixels<T>& p) {
  constexpr int W = kWidth<std::remove_const_t<T>>;
  return aligned(p.data) && p.channels % W == 0 && p.image % W == 0 && p.row % W == 0 && p.pixel % W == 0;
}

// f(K, S), constants, if there are kernels for this geometry; else false.
template <class F>
bool for_geometry(const Axis& rows, const Axis& columns, const F& f) {
  if (rows.kernel != columns.kernel || rows.stride != columns.stride || rows.dilation != 1 || columns.dilation != 1)
    return false;
  const auto with_stride = [&](auto kernel) {
    if (rows.stride == 1) return f(kernel, std::integral_constant<int, 1>()), true;
    if (rows.stride == 2) return f(kernel, std::integral_constant<int, 2>()), true;
    return false;
  };
  switch (rows.kernel) {
    case 3:
      return with_stride(std::integral_constant<int, 3>());
    case 5:
      return with_stride(std::integral_constant<int, 5>());
    case 7:
      return with_stride(std::integral_constant<int, 7>());
    default:
      return false;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The launches of an operation: what they have in common.
class Depthwise {
 public:
  Depthwise(const char* op, const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
            const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation)
      : op_(op), rows_(axis(x, weight, stride, padding, dilation, 0)), columns_(axis(x, weight, stride, padding, dilation, 1)),
        stream_(x), weight_(weight), channels_(x.size(1)) {}

  const Axis& rows() const { return rows_; }
  const Axis& columns() const { return columns_; }

  template <class T>
  void forward(const Pixels<const T>& x, const Pixels<T>& y, int64_t images, const float* bias) const {
    const bool fast = has_vectors(x) && has_vectors(y) && for_geometry(rows_, columns_, [&](auto k, auto s) {
      launch(images, rows_.out, ceil_div(columns_.out, kPixels), kWidth<T>, correlate_kernel<T, k, s>, x, y,
             filters(false), bias, rows_, columns_);
    });
    if (!fast)
      launch(images, rows_.out, columns_.out, 1, general_kernel<T, false>, x, y, filters(false), bias, rows_, columns_);
  }

  template <class T>
  void input_gradient(const Pixels<const T>& dy, const Pixels<T>& dx, int64_t images) const {
    const bool vectors = has_vectors(dy) && has_vectors(dx);
    const bool fast = vectors && for_geometry(rows_, columns_, [&](auto k, auto s) {
      if constexpr (s == 1) {
        // The correlation of dy with the reversed filters, padded by the rest of them.
        launch(images, rows_.in, ceil_div(columns_.in, kPixels), kWidth<T>, correlate_kernel<T, k, 1>, dy, dx,
               filters(true), static_cast<const float*>(nullptr), adjoint(rows_), adjoint(columns_));
      } else {
        launch(images, rows_.in, ceil_div(columns_.in + columns_.padding % 2, kPixels), kWidth<T>,
               adjoint_stride2_kernel<T, k>, dy, dx, filters(false), rows_, columns_);
      }
    });
    if (!fast)
      launch(images, rows_.in, columns_.in, 1, general_kernel<T, true>, dy, dx, filters(false),
             static_cast<const float*>(nullptr), rows_, columns_);
  }

  template <class T>
  void filter_gradient(const Pixels<const T>& x, const Pixels<const T>& dy, int64_t images, Tensor& grad_weight) const {
    const auto run = [&](auto width, auto kernel, auto stride) {
      const int64_t taps = kernel == 0 ? this->taps() : 1;
      STD_TORCH_CHECK(images * rows_.out <= INT32_MAX, op_, ": grad: expected at most 2^31 - 1 rows of images, got ",
                      images * rows_.out);
      const RowCut cut(images * rows_.out, columns_.out, channels_, width, std::max<int>(kernel, 1), taps);
      STD_TORCH_CHECK(cut.grid_blocks() <= INT32_MAX, op_, ": x: expected fewer images for filters of this size");
      Tensor partials = floats({cut.blocks, this->taps(), channels_});
      stream_.launch(filter_gradient_kernel<T, width, kernel, stride>, cut.grid(), cut.threads(), x, dy, rows_, columns_,
                     cut, partials.mutable_data_ptr<float>());
      const Merging merging(cut.blocks);
      stream_.launch(finish_filter_gradient_kernel, blocks_for(this->taps() * channels_, merging.columns), kBlock,
                     partials.const_data_ptr<float>(), merging, this->taps(), static_cast<int>(channels_),
                     columns_.kernel, static_cast<float*>(grad_weight.mutable_data_ptr()), grad_weight.stride(0),
                     grad_weight.stride(2), grad_weight.stride(3));
    };
    const bool fast = has_vectors(x) && has_vectors(dy) && for_geometry(rows_, columns_, [&](auto k, auto s) {
      run(std::integral_constant<int, kWidth<T>>(), k, s);
    });
    if (!fast) run(std::integral_constant<int, 1>(), std::integral_constant<int, 0>(), std::integral_constant<int, 0>());
  }

 private:
  static Axis axis(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t d) {
    const int64_t slack = x.size(2 + d) + 2 * padding[d] - dilation[d] * (weight.size(2 + d) - 1) - 1;
    const auto narrow = [](int64_t n) { return static_cast<int32_t>(n); };
    return {narrow(x.size(2 + d)), narrow(slack / stride[d] + 1), narrow(weight.size(2 + d)),
            narrow(stride[d]),     narrow(padding[d]),            narrow(dilation[d])};
  }
  static Axis adjoint(const Axis& a) { return {a.out, a.in, a.kernel, 1, a.kernel - 1 - a.padding, 1}; }

  int64_t taps() const { return int64_t{rows_.kernel} * columns_.kernel; }
  Tensor floats(std::vector<int64_t> sizes) const {
    return torch::stable::new_empty(weight_, sizes, ScalarType::Float);
  }

  // The filters of the active channels, valid until the next call.
  const float* filters(bool reversed) const {
    filters_ = floats({taps(), channels_});
    stream_.launch(filters_kernel, blocks_for(taps() * channels_, kBlock), kBlock,
                   static_cast<const float*>(weight_.const_data_ptr()), weight_.stride(0), weight_.stride(2),
                   weight_.stride(3), static_cast<int>(channels_), rows_.kernel, columns_.kernel, reversed,
                   filters_.mutable_data_ptr<float>());
    return filters_.const_data_ptr<float>();
  }

  template <class Kernel, class... Arguments>
  void launch(int64_t images, int64_t rows, int64_t groups, int width, Kernel kernel, const Arguments&... arguments) const {
    const Cut cut(images, rows, groups, channels_, width);
    STD_TORCH_CHECK(cut.count() <= INT32_MAX, op_, ": x: expected at most 2^31 - 1 pixels, or groups of ", kPixels,
                    ", got ", cut.count());
    stream_.launch(kernel, cut.grid(), cut.threads(), arguments..., cut);
  }

  const char* op_;
  Axis rows_, columns_;
  Stream stream_;
  const Tensor& weight_;
  int64_t channels_;
  mutable Tensor filters_;
};

void check_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(on_device(t) && t.get_device_index() == x.get_device_index(), op, ": ", name,
                  ": expected the device of x");
}

void check_filters(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Float && t.size(0) >= x.size(1) && t.size(1) == 1, op,
                  ": ", name, ": expected float32 [>= ", x.size(1), ", 1, kh, kw], got ", shape_of(t));
  check_device(op, name, t, x);
}

// The checks that both directions share.
void check(const char* op, const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(on_device(x) && x.dim() == 4, op, ": x: expected [N, C, H, W] on a CUDA device, got ", shape_of(x));
  STD_TORCH_CHECK(channels_innermost(x), op, ": x: expected channels innermost (channels_last)");
  check_filters(op, "weight", weight, x);
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": stride, padding, dilation: expected two numbers each");
  for (int64_t d = 0; d < 2; ++d) {
    constexpr int64_t kLimit = int64_t{1} << 30;  // the kernels count the pixels of a row in 32 bits
    STD_TORCH_CHECK(stride[d] >= 1 && padding[d] >= 0 && dilation[d] >= 1, op,
                    ": stride, padding, dilation: expected at least 1, 0 and 1, got ", stride[d], ", ", padding[d],
                    " and ", dilation[d]);
    STD_TORCH_CHECK(weight.size(2 + d) >= 1 &&
                        x.size(2 + d) + 2 * padding[d] >= dilation[d] * (weight.size(2 + d) - 1) + 1 &&
                        x.size(2 + d) + 2 * padding[d] < kLimit && stride[d] < kLimit,
                    op, ": x: expected at least the pixels that the filter covers, got ", shape_of(x), " for ",
                    shape_of(weight));
  }
}

}  // namespace

Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const char* op = "depthwise_conv2d";
  check(op, x, weight, stride, padding, dilation);
  const int64_t channels = x.size(1);
  const float* const b = input_vector(op, "bias", bias, channels);
  if (bias.has_value()) check_device(op, "bias", *bias, x);
  const Depthwise convolution(op, x, weight, stride, padding, dilation);
  Tensor y = new_images(x, channels, convolution.rows().out, convolution.columns().out);
  if (y.numel() == 0) return y;
  for_type(op, "x", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    convolution.forward<T>(pixels<T>(x), dense_pixels<T>(y), x.size(0), b);
  });
  return y;
}

Tensor depthwise_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                 std::optional<Tensor> grad_weight, bool need_grad_x, std::vector<int64_t> stride,
                                 std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const char* op = "depthwise_conv2d_backward";
  check(op, x, weight, stride, padding, dilation);
  const int64_t channels = x.size(1);
  const Depthwise convolution(op, x, weight, stride, padding, dilation);
  const Axis &rows = convolution.rows(), &columns = convolution.columns();
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), op, ": grad: expected the dtype of x");
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == channels && grad.size(2) == rows.out &&
                      grad.size(3) == columns.out,
                  op, ": grad: expected [", x.size(0), ", ", channels, ", ", rows.out, ", ", columns.out, "], got ",
                  shape_of(grad));
  check_device(op, "grad", grad, x);
  if (grad_weight.has_value()) {
    check_filters(op, "grad_weight", *grad_weight, x);
    STD_TORCH_CHECK(grad_weight->size(2) == rows.kernel && grad_weight->size(3) == columns.kernel, op,
                    ": grad_weight: expected the filters of the weight, ", shape_of(weight), ", got ",
                    shape_of(*grad_weight));
  }
  const Tensor dy = channels_innermost(grad) ? grad : torch::stable::contiguous(grad, MemoryFormat::ChannelsLast);
  Tensor dx = need_grad_x ? new_images(x, channels, rows.in, columns.in) : torch::stable::new_empty(x, {0});
  if (x.numel() == 0) return dx;
  for_type(op, "x", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto upstream = pixels<T>(dy);
    if (grad_weight.has_value()) convolution.filter_gradient<T>(pixels<T>(x), upstream, x.size(0), *grad_weight);
    if (need_grad_x) convolution.input_gradient<T>(upstream, dense_pixels<T>(dx), x.size(0));
  });
  return dx;
}

}  // namespace us3l::cuda
