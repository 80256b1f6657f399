#include "pointwise.h"

#include "gemm_kernels.h"
#include "packed_filters.h"
#include "scratch.h"

namespace us3l {
namespace {

constexpr int64_t kWeight = 160 << 10, kSums = 32 << 10;  // floats

int64_t rows_of_block(int64_t columns) { return std::clamp(kBlock / columns, kLeastRows, kMostRows); }

Matrix rows_from(Rows<const float> x, int64_t row) { return {x.data + row * x.stride, x.stride, 1}; }

}  // namespace

bool is_pointwise(int64_t rows, int64_t in, int64_t out) {
  const GemmKernels gemm = gemm_kernels();
  return gemm.whole_halves(in) && gemm.whole_halves(out) && in * out <= kWeight &&
         rows >= torch::stable::get_num_threads() * kLeastRows;
}

int64_t pointwise_parts(int64_t rows) { return balanced_parts(rows, kMostRows); }

void pointwise_forward(int64_t rows, Rows<const float> x, const Norm* norm, const PointwiseWeight& w, Rows<float> y,
                       const RowsDone& done) {
  const GemmKernels gemm = gemm_kernels();
  const PackedFilters filters(gemm, {0}, w.in, w.out, {w.data, w.in_distance, w.out_distance});
  const int64_t parts = pointwise_parts(rows), row = row_of(w.in);
  parallel(parts, [&](int64_t i) {
    const Range own = part(rows, i, parts);
    const int64_t blocks = divide_up(own.end - own.begin, rows_of_block(w.in + w.out));
    const Scratch input(Scratch::kInput, norm == nullptr ? 0 : divide_up(own.end - own.begin, blocks) * row);
    for_parts(own, blocks, [&](Range p) {
      Matrix a = rows_from(x, p.begin);
      if (norm != nullptr) {
        normalise_rows(*norm, x, p, {input.data(), row});
        a = {input.data(), row, 1};
      }
      const int64_t next = std::min(2 * p.end - p.begin, own.end);
      Ahead ahead;
      ahead.add_rows(x, w.in, p.end, next);
      ahead.add_rows({y.data, y.stride}, w.out, p.end, next);
      gemm.multiply(p.end - p.begin, w.out, w.in, a, filters.at(0, 0), y.data + p.begin * y.stride, y.stride, false,
                    ahead);
      done(i, p);
    });
  });
}

void pointwise_backward(int64_t rows, const PointwiseBackward& work) {
  const GemmKernels gemm = gemm_kernels();
  const PointwiseWeight& w = work.w;
  const Rows<float> dx = work.dx;
  std::optional<PackedFilters> filters;
  if (dx.data != nullptr)
    filters.emplace(gemm, std::vector<int64_t>{0}, w.out, w.in, Matrix{w.data, w.out_distance, w.in_distance});

  // A row of few columns on the right side is read for few products: then the sums are turned. Parts have sums of their
  // own: small ones for several to a thread, so that threads stay in balance.
  const int64_t threads = torch::stable::get_num_threads();
  const bool turned = w.in < w.out && w.in < 3 * gemm.lanes;
  const int64_t sums_row = row_of(turned ? w.out : w.in), size = (turned ? w.in : w.out) * sums_row;
  const int64_t most = work.dw == nullptr ? rows : std::max<int64_t>(kSums / size, 1) * threads;
  const int64_t parts = std::min(pointwise_parts(rows), most);
  const Scratch memory(Scratch::kFilterGradients, work.dw == nullptr ? 0 : parts * size);
  const int64_t x_row = row_of(w.in), dy_row = row_of(w.out);

  parallel(parts, [&](int64_t i) {
    const Range own = part(rows, i, parts);
    const int64_t blocks = divide_up(own.end - own.begin, rows_of_block(2 * (w.in + w.out)));
    const int64_t block = divide_up(own.end - own.begin, blocks);
    const Scratch input(Scratch::kInput, work.norm_of_x == nullptr || work.dw == nullptr ? 0 : block * x_row);
    const Scratch gradient(Scratch::kOutput, block * dy_row);
    float* const sums = memory.data() + i * size;
    for_parts(own, blocks, [&](Range p) {
      const int64_t count = p.end - p.begin;
      const int64_t next = std::min(p.end + count, own.end);
      Ahead ahead;
      ahead.add_rows(work.dy.grad, w.out, p.end, next);
      ahead.add_rows(work.dy.c, w.out, p.end, next);
      if (dx.data != nullptr) ahead.add_rows({dx.data, dx.stride}, w.in, p.end, next);
      if (work.dw != nullptr) ahead.add_rows(work.x, w.in, p.end, next);
      input_gradient_rows(work.dy, p, {gradient.data(), dy_row});
      if (dx.data != nullptr) {
        gemm.multiply(count, w.in, w.out, {gradient.data(), dy_row, 1}, filters->at(0, 0),
                      dx.data + p.begin * dx.stride, dx.stride, work.add_to_dx, ahead);
        if (work.done) work.done(i, p);
      }
      if (work.dw == nullptr) return;
      Rows<const float> a = at(work.x, p.begin, 0);
      if (work.norm_of_x != nullptr) {
        normalise_rows(*work.norm_of_x, work.x, p, {input.data(), x_row});
        a = {input.data(), x_row};
      }
      const bool add = p.begin > own.begin;
      if (turned)
        gemm.multiply(w.in, w.out, count, {a.data, 1, a.stride}, {gradient.data(), gemm.lanes, dy_row}, sums, sums_row,
                      add, ahead);
      else
        gemm.multiply(w.out, w.in, count, {gradient.data(), 1, dy_row}, {a.data, gemm.lanes, a.stride}, sums, sums_row,
                      add, ahead);
    });
  });
  if (work.dw == nullptr) return;

  const int64_t out_of = turned ? 1 : sums_row, in_of = turned ? sums_row : 1;
  parallel_if_large(parts * size, threads, [&](int64_t thread) {
    const Range own = part(w.out, thread, threads);
    for (int64_t i = 0; i < parts; ++i) {
      const float* const from = memory.data() + i * size;
      for (int64_t k = own.begin; k < own.end; ++k)
        for (int64_t c = 0; c < w.in; ++c)
          work.dw[k * work.dw_out + c * work.dw_in] += from[k * out_of + c * in_of];
    }
  });
}

}  // namespace us3l
