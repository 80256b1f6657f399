// y = x W' + bias and its adjoints, for the active slice of a weight.
//
// Many rows of x are the pixels of one image and go through a 1x1 convolution. With few rows the weight is most of what is
// read, and a packed copy of it would cost as much as the product: forward, y' = W x' takes the weight as it lies for the
// left side, and x is packed; the gradient of x takes it as it lies for the right side, or copies it block by block, each
// just before its use, where its columns do not end with half a panel.

#include <algorithm>
#include <optional>
#include <vector>

#include "../ops.h"
#include "gemm_conv.h"
#include "gemm_kernels.h"
#include "scratch.h"
#include "tensors.h"

namespace us3l {
namespace {

constexpr int64_t kFewRows = 256;

template <class T>
struct RowMajor {
  T* data;
  int64_t rows, columns, row;  // the distance of two rows

  Images<T> as_image() const { return {{data, columns, 0, 0, row}, 1, 1, rows}; }
};

int64_t panels_of(const GemmKernels& gemm, int64_t columns) { return (columns + gemm.lanes - 1) / gemm.lanes; }

// y' = W x' + bias, the threads having rows of W of their own.
void forward(const RowMajor<const float>& x, const Weight<const float>& w, const float* bias, const RowMajor<float>& y) {
  constexpr int64_t kRows = 112;
  const GemmKernels gemm = gemm_kernels();
  const int64_t panels = panels_of(gemm, x.rows), panel = w.in * gemm.lanes, row = panels * gemm.lanes;
  const Scratch packed(Scratch::kFilters, panels * panel);
  parallel(panels, [&](int64_t i) {
    const int64_t first = i * gemm.lanes;
    gemm.pack(w.in, std::min(gemm.lanes, x.rows - first), {x.data + first * x.row, 1, x.row}, packed.data() + i * panel,
              panel);
  });
  parallel_parts(w.out, torch::stable::get_num_threads(), [&](Range own) {
    const Scratch output(Scratch::kOutput, kRows * row);
    for_parts(own, (own.end - own.begin + kRows - 1) / kRows, [&](Range k) {
      gemm.multiply(k.end - k.begin, x.rows, w.in, {w.data + k.begin * w.out_distance, w.out_distance, w.in_distance},
                    {packed.data(), panel, gemm.lanes}, output.data(), row, false);
      for (int64_t i = 0; i < y.rows; ++i) {
        const float* from = output.data() + i;
        float* const to = y.data + i * y.row;
        for (int64_t j = k.begin; j < k.end; ++j, from += row) to[j] = bias != nullptr ? *from + bias[j] : *from;
      }
    });
  });
}

// dx = dy W, the threads having columns of W of their own.
void input_gradient(const RowMajor<const float>& dy, const Weight<const float>& w, const RowMajor<float>& dx) {
  constexpr int64_t kDepth = 128, kPanels = 64;  // of a block, 256 KiB with 16 lanes
  const GemmKernels gemm = gemm_kernels();
  parallel_parts(panels_of(gemm, w.in), torch::stable::get_num_threads(), [&](Range own) {
    const Scratch block(Scratch::kInput, kDepth * kPanels * gemm.lanes);
    for_parts(own, (own.end - own.begin + kPanels - 1) / kPanels, [&](Range p) {
      const int64_t first = p.begin * gemm.lanes, panels = p.end - p.begin;
      const int64_t columns = std::min(panels * gemm.lanes, w.in - first);
      const bool whole = gemm.whole_halves(columns);
      const Scratch output(Scratch::kOutput, whole ? 0 : dx.rows * panels * gemm.lanes);
      float* const c = whole ? dx.data + first : output.data();
      const int64_t c_row = whole ? dx.row : panels * gemm.lanes;
      if (whole && w.in_distance == 1) {
        gemm.multiply(dy.rows, columns, w.out, {dy.data, dy.row, 1}, {w.data + first, gemm.lanes, w.out_distance}, c,
                      c_row, false);
        return;
      }
      for_parts({0, w.out}, (w.out + kDepth - 1) / kDepth, [&](Range k) {
        const int64_t depth = k.end - k.begin, panel = depth * gemm.lanes;
        gemm.pack(depth, columns,
                  {w.data + k.begin * w.out_distance + first * w.in_distance, w.out_distance, w.in_distance},
                  block.data(), panel);
        gemm.multiply(dy.rows, columns, depth, {dy.data + k.begin, dy.row, 1}, {block.data(), panel, gemm.lanes}, c,
                      c_row, k.begin > 0);
      });
      if (!whole) gemm.copy_rows(dx.rows, columns, c, c_row, dx.data + first, dx.row);
    });
  });
}

void check_rows(const char* op, const char* name, const Tensor& t, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == ScalarType::Float && (columns < 0 || t.size(1) == columns) &&
                      (t.stride(1) == 1 || t.size(1) == 1),
                  op, ": ", name, ": expected float32 [N, ", columns < 0 ? "C" : std::to_string(columns),
                  "] with contiguous rows, got ", shape_of(t));
}

void check_matrix(const char* op, const char* name, const Tensor& t, int64_t out, int64_t in) {
  STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == ScalarType::Float && t.size(0) >= out && t.size(1) >= in, op, ": ",
                  name, ": expected float32 [>= ", out, ", >= ", in, "], got ", shape_of(t));
}

template <class T>
Weight<T> weight_of(T* data, const Tensor& t, int64_t out, int64_t in) {
  return {data, out, in, 1, 1, t.stride(0), t.stride(1), 0, 0};
}

RowMajor<const float> rows_of(const Tensor& t) { return {t.const_data_ptr<float>(), t.size(0), t.size(1), t.stride(0)}; }

RowMajor<float> dense_rows(Tensor& t) { return {t.mutable_data_ptr<float>(), t.size(0), t.size(1), t.size(1)}; }

constexpr Geometry kPlain{{1, 1}, {0, 0}, {1, 1}};

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, int64_t out_features) {
  const char* op = "linear";
  check_rows(op, "x", x, -1);
  check_matrix(op, "weight", weight, out_features, x.size(1));
  const float* const offset = input_vector(op, "bias", bias, out_features);
  Tensor y = torch::stable::new_empty(x, {x.size(0), out_features});
  if (y.numel() == 0) return y;
  const RowMajor<float> result = dense_rows(y);
  const Weight<const float> w = weight_of(weight.const_data_ptr<float>(), weight, out_features, x.size(1));
  if (x.size(0) <= kFewRows)
    forward(rows_of(x), w, offset, result);
  else
    convolve<float>(rows_of(x).as_image(), w, offset, kPlain, result.as_image());
  return y;
}

Tensor linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, std::optional<Tensor> grad_weight,
                       std::optional<Tensor> grad_bias, bool need_grad_x) {
  const char* op = "linear_backward";
  check_rows(op, "x", x, -1);
  check_rows(op, "grad", grad, -1);
  STD_TORCH_CHECK(grad.size(0) == x.size(0), op, ": grad: expected the rows of x, ", x.size(0), ", got ",
                  grad.size(0));
  const int64_t out = grad.size(1), in = x.size(1);
  check_matrix(op, "weight", weight, out, in);
  Tensor dx = torch::stable::new_empty(x, {need_grad_x ? x.size(0) : 0, in});
  float* const db = output_vector(op, "grad_bias", grad_bias, out);
  if (grad_weight.has_value()) check_matrix(op, "grad_weight", *grad_weight, out, in);
  if (x.size(0) == 0) return dx;

  if (need_grad_x) {
    const Weight<const float> w = weight_of(weight.const_data_ptr<float>(), weight, out, in);
    if (x.size(0) <= kFewRows)
      input_gradient(rows_of(grad), w, dense_rows(dx));
    else
      convolve_input_gradient<float>(rows_of(grad).as_image(), w, kPlain, dense_rows(dx).as_image());
  }
  Weight<float> dw{};
  if (grad_weight.has_value()) dw = weight_of(grad_weight->mutable_data_ptr<float>(), *grad_weight, out, in);
  std::vector<double> sums(db != nullptr ? out : 0);
  convolve_weight_gradient<float>(rows_of(x).as_image(), rows_of(grad).as_image(), kPlain,
                           grad_weight.has_value() ? &dw : nullptr, db != nullptr ? sums.data() : nullptr);
  for (std::size_t k = 0; k < sums.size(); ++k) db[k] += static_cast<float>(sums[k]);
  return dx;
}

}  // namespace us3l
