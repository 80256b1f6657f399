// Convolutions of images with few channels, such as the first one of a network, as matrix products without gathering.
//
// Taps beside one another sample neighbouring pixels, which with few channels are one short run of floats: gathering such
// runs takes a third as long as the products. Here the rows of x that one row of y samples are copied with the zeros
// around them, and the products read the runs there; those of neighbouring points overlap.
//
// Work is cut by the number of threads alone and partial sums are merged in order: same threads, same bits.

#include <algorithm>
#include <cstring>
#include <vector>

#include "gemm_conv.h"
#include "gemm_kernels.h"
#include "packed_filters.h"
#include "scratch.h"

namespace us3l {
namespace {

// The rows of x that neighbouring rows of y sample, with zeros around. A point's samples in one of them are a run.
class Band {
 public:
  Band(const GemmKernels& gemm, const Images<const float>& x, const Geometry& g, int64_t taps, int64_t most)
      : gemm_(gemm), x_(x), g_(g), reach_((taps - 1) * g.dilation[0] + 1), left_(g.padding[1] * x.channels),
        row_(row_of((x.width + 2 * g.padding[1]) * x.channels)), size_(((most - 1) * g.stride[0] + reach_) * row_),
        memory_(Scratch::kInput, size_) {
    std::memset(memory_.data(), 0, size_ * sizeof(float));
  }

  // For some rows of image n of y.
  void fill(int64_t n, Range rows) {
    float* to = memory_.data() + left_;
    const int64_t first = rows.begin * g_.stride[0] - g_.padding[0];
    const int64_t end = (rows.end - 1) * g_.stride[0] - g_.padding[0] + reach_;
    for (int64_t y = first; y < end; ++y, to += row_) {
      const float* const from = x_.data + n * x_.image + y * x_.row;
      if (y < 0 || y >= x_.height)
        std::memset(to, 0, x_.width * x_.channels * sizeof(float));
      else if (x_.pixel == x_.channels)
        std::memcpy(to, from, x_.width * x_.channels * sizeof(float));
      else
        gemm_.copy_rows(x_.width, x_.channels, from, x_.pixel, to, x_.channels);
    }
  }

  // Distances: of the runs of two points, of two rows of taps, of two rows of y.
  int64_t point() const { return g_.stride[1] * x_.channels; }
  int64_t taps() const { return g_.dilation[0] * row_; }
  int64_t rows() const { return g_.stride[0] * row_; }
  const float* data() const { return memory_.data(); }

 private:
  const GemmKernels& gemm_;
  const Images<const float>& x_;
  const Geometry& g_;
  int64_t reach_, left_, row_, size_;
  Scratch memory_;
};

// Calls f(image, rows) for the rows of images that are at most so many and lie in a range of all rows.
template <class F>
void for_rows(Range range, int64_t height, int64_t most, const F& f) {
  for (int64_t p = range.begin; p < range.end;) {
    const int64_t i = p % height, count = std::min({most, height - i, range.end - p});
    f(p / height, Range{i, i + count});
    p += count;
  }
}

}  // namespace

bool is_stem(int64_t channels, int64_t out, int64_t kernel_width, const Geometry& g) {
  constexpr int64_t kMostChannels = 4;
  return channels <= kMostChannels && kernel_width > 1 && g.dilation[1] == 1 && gemm_kernels().whole_halves(out);
}

void convolve_stem(const Images<const float>& x, const Weight<const float>& w, const float* bias, const Geometry& g,
                   const Images<float>& y) {
  const GemmKernels gemm = gemm_kernels();
  const int64_t run = w.width * w.in;
  std::vector<int64_t> taps;
  for (int64_t i = 0; i < w.height * w.width; ++i) taps.push_back(i / w.width * w.row + i % w.width * w.column);
  const PackedFilters filters(gemm, taps, w.in, w.out, {w.data, w.in_distance, w.out_distance});
  const int64_t rows = y.count * y.height, parts = balanced_parts(rows, 1);
  parallel(parts, [&](int64_t i) {
    Band band(gemm, x, g, w.height, 1);
    for_rows(part(rows, i, parts), y.height, 1, [&](int64_t n, Range r) {
      band.fill(n, r);
      float* const c = y.data + n * y.image + r.begin * y.row;
      if (bias != nullptr) gemm.copy_rows(y.width, w.out, bias, 0, c, y.pixel);
      gemm.multiply(y.width, w.out, w.height * run, {band.data(), band.point(), 1, run, band.taps()}, filters.at(0, 0),
                    c, y.pixel, bias != nullptr);
    });
  });
}

void stem_weight_gradient(const Images<const float>& x, const Images<const float>& dy, const Geometry& g,
                          const Weight<float>& dw) {
  constexpr int64_t kMostPoints = 128;  // of a product: few calls, and the sums of not too many
  const GemmKernels gemm = gemm_kernels();
  const int64_t run = dw.width * dw.in, depth = dw.height * run, row = row_of(dw.out), size = depth * row;
  const int64_t most = std::clamp<int64_t>(kMostPoints / dy.width, 1, dy.height);
  const int64_t rows = dy.count * dy.height, parts = balanced_parts(rows, most);
  const Scratch sums(Scratch::kFilterGradients, parts * size);  // [parts][taps][in][out]
  parallel(parts, [&](int64_t i) {
    Band band(gemm, x, g, dw.height, most);
    bool add = false;
    for_rows(part(rows, i, parts), dy.height, most, [&](int64_t n, Range r) {
      band.fill(n, r);
      const Panels grads{dy.data + n * dy.image + r.begin * dy.row, gemm.lanes, dy.pixel};
      for (int64_t t = 0; t < dw.height; ++t)
        gemm.multiply(run, dw.out, (r.end - r.begin) * dy.width,
                      {band.data() + t * band.taps(), 1, band.point(), dy.width, band.rows()}, grads,
                      sums.data() + i * size + t * run * row, row, add);
      add = true;
    });
    if (!add) std::memset(sums.data() + i * size, 0, size * sizeof(float));
  });
  for (int64_t k = 0; k < dw.out; ++k)
    for (int64_t t = 0; t < dw.height * dw.width; ++t)
      for (int64_t c = 0; c < dw.in; ++c) {
        const float* const from = sums.data() + (t * dw.in + c) * row + k;
        float sum = 0;
        for (int64_t i = 0; i < parts; ++i) sum += from[i * size];
        dw.data[k * dw.out_distance + t / dw.width * dw.row + t % dw.width * dw.column + c * dw.in_distance] += sum;
      }
}

}  // namespace us3l
