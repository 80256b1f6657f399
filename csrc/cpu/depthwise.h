// Depthwise convolutions with the batch norms around them done in passing. Images are float32, and their pixels at one
// distance.
#pragma once

#include <vector>

#include "norm_in_passing.h"

namespace us3l {

// At most so many parts are told of to `done`.
int64_t depthwise_parts(int64_t images);

// y = the convolution of norm(x), of x itself with norm null; without dilation. weight [>= c, 1, kh, kw].
void depthwise_forward(const Tensor& x, const Norm* norm, const Tensor& weight, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, Tensor& y, const RowsDone& done);

struct DepthwiseBackward {
  const Tensor& x;
  const Norm* norm_of_x;  // the convolution's input is norm(x)
  const Tensor& weight;
  const std::vector<int64_t>&stride, &padding;
  OutputGradient<float> dy;  // its output's gradient is that of a norm's input
  Tensor* dw;                // added to, unless null
  Tensor* dx;                // dense; not computed if null
  RowsDone done;             // hears of dx's rows
};

void depthwise_backward(const DepthwiseBackward& work);

}  // namespace us3l
