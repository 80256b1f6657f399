// Convolutions as matrix products: any kernel, stride, padding and dilation, one group.
//
// Images are float32, or bfloat16 on a CPU with products of its pairs (isa.h): then weights are rounded to bfloat16, and
// sums are in float32. Of bfloat16 images all channels and distances are even.
#pragma once

#include <array>

#include "tensors.h"

namespace us3l {

template <class T>
struct Images : Pixels<T> {
  int64_t count, height, width;
};

// The active slice of a weight [K, C, kh, kw]; distances in elements.
template <class T>
struct Weight {
  T* data;
  int64_t out, in, height, width;
  int64_t out_distance, in_distance, row, column;
};

struct Geometry {
  std::array<int64_t, 2> stride, padding, dilation;  // of rows, of columns
};

// y = convolution of x + bias, for `w.out` channels of y; bias may be null.
template <class T>
void convolve(const Images<const T>& x, const Weight<const float>& w, const float* bias, const Geometry& geometry,
              const Images<T>& y);

// dx = the adjoint of dy.
template <class T>
void convolve_input_gradient(const Images<const T>& dy, const Weight<const float>& w, const Geometry& geometry,
                             const Images<T>& dx);

// Adds to dw, and the sums of dy over all pixels to db [K] where that is not null (of float32 only). Pixels of dy are at
// one distance.
template <class T>
void convolve_weight_gradient(const Images<const T>& x, const Images<const T>& dy, const Geometry& geometry,
                              const Weight<float>* dw, double* db);

// The same for images of few channels (stem_conv.cpp), which `convolve` and `convolve_weight_gradient` take where they can.
bool is_stem(int64_t channels, int64_t out, int64_t kernel_width, const Geometry& geometry);
void convolve_stem(const Images<const float>& x, const Weight<const float>& w, const float* bias,
                   const Geometry& geometry, const Images<float>& y);
void stem_weight_gradient(const Images<const float>& x, const Images<const float>& dy, const Geometry& geometry,
                          const Weight<float>& dw);

}  // namespace us3l
