// 1x1 convolutions with stride 1, as products of rows, with the batch norms around them done in passing.
#pragma once

#include <optional>

#include "norm_in_passing.h"

namespace us3l {

// The active slice of a weight [K, C, 1, 1].
struct PointwiseWeight {
  const float* data;
  int64_t out, in, out_distance, in_distance;
};

// Whether it may be done so: with few channels, whose weight and gradient stay in the L2 cache while the rows go by, and
// rows for every thread. With many channels the norms take little of the time, and the product is better cut in other ways
// (gemm_conv.h).
bool is_pointwise(int64_t rows, int64_t in, int64_t out);

// At most so many parts are told of to `done`.
int64_t pointwise_parts(int64_t rows);

// y = w norm(x), of x itself with norm null.
void pointwise_forward(int64_t rows, Rows<const float> x, const Norm* norm, const PointwiseWeight& w, Rows<float> y,
                       const RowsDone& done);

struct PointwiseBackward {
  Rows<const float> x;
  const Norm* norm_of_x = nullptr;  // the convolution's input is norm(x)
  OutputGradient<float> dy;         // its output's gradient is that of a norm's input
  PointwiseWeight w;
  float* dw = nullptr;  // added to, unless null; at the distances of `dw_out` and `dw_in`
  int64_t dw_out = 0, dw_in = 0;
  Rows<float> dx{nullptr, 0};  // not computed if null
  bool add_to_dx = false;
  RowsDone done;  // hears of dx's rows
};

void pointwise_backward(int64_t rows, const PointwiseBackward& work);

}  // namespace us3l
