// What the operations share on the side of torch: checks, images out of tensors, work cut into parts for the threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "images.h"
#include "rows.h"

namespace us3l {

using std::int64_t;
using torch::headeronly::Layout;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x, const char* other = "x") {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name, ": expected the dtype of ", other);
  const auto a = t.sizes(), b = x.sizes();
  STD_TORCH_CHECK(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()), op, ": ", name,
                  ": expected the shape of ", other, ", ", shape_of(x), ", got ", shape_of(t));
}

inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t channels) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) >= channels &&
                      (t.stride(0) == 1 || t.size(0) == 1),
                  op, ": ", name, ": expected a contiguous float32 vector of at least ", channels, " elements, got ",
                  shape_of(t));
}

// The data of an optional vector, of which at least `channels` elements are there; null for none.
inline const float* input_vector(const char* op, const char* name, const std::optional<Tensor>& t, int64_t channels) {
  if (!t.has_value()) return nullptr;
  check_vector(op, name, *t, channels);
  return t->const_data_ptr<float>();
}

inline float* output_vector(const char* op, const char* name, const std::optional<Tensor>& t, int64_t channels) {
  if (!t.has_value()) return nullptr;
  check_vector(op, name, *t, channels);
  return t->mutable_data_ptr<float>();
}

// The distance of two rows if t is a matrix where it lies, with the dimension `channels` as its columns and all others
// as its rows; else -1.
inline int64_t row_stride(const Tensor& t, int64_t channels) {
  if (t.size(channels) > 1 && t.stride(channels) != 1) return -1;
  int64_t stride = -1, expected = -1;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (d == channels || t.size(d) <= 1) continue;
    if (stride < 0) stride = t.stride(d);
    if (expected >= 0 && t.stride(d) != expected) return -1;
    expected = t.stride(d) * t.size(d);
  }
  return stride < 0 ? t.size(channels) : stride;
}

template <class T>
Rows<const T> rows_of(const Tensor& t, int64_t channels) {
  return {static_cast<const T*>(t.const_data_ptr()), row_stride(t, channels)};
}

template <class T>
Rows<T> rows_of(Tensor& t, int64_t channels) {
  return {static_cast<T*>(t.mutable_data_ptr()), row_stride(t, channels)};
}

// The active part of a bias as a dense vector; zeros for none.
inline std::vector<float> bias_of(const char* op, const std::optional<Tensor>& bias, int64_t channels) {
  std::vector<float> offset(channels);
  if (!bias.has_value()) return offset;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->scalar_type() == ScalarType::Float && bias->size(0) >= channels, op,
                  ": bias: expected a float32 vector of at least ", channels, " elements, got ", shape_of(*bias));
  for (int64_t k = 0; k < channels; ++k) offset[k] = bias->const_data_ptr<float>()[k * bias->stride(0)];
  return offset;
}

inline bool channels_innermost(const Tensor& t) { return t.stride(1) == 1 || t.size(1) == 1; }

inline void check_images(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Float, op, ": ", name,
                  ": expected float32 [N, C, H, W], got ", shape_of(t));
}

inline void check_float_or_bfloat16_images(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(
      t.dim() == 4 && (t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16), op, ": ", name,
      ": expected float32 or bfloat16 [N, C, H, W], got ", shape_of(t));
}

// Strides of dimensions of size 1 say nothing: the distances there are those of images that follow each other.
template <class T = float>
Pixels<const T> pixels(const Tensor& t) {
  const int64_t images = t.size(0), height = t.size(2), width = t.size(3);
  const int64_t pixel = width > 1 ? t.stride(3) : height > 1 ? t.stride(2) : images > 1 ? t.stride(0) : t.size(1);
  const int64_t row = height > 1 ? t.stride(2) : width * pixel;
  return {static_cast<const T*>(t.const_data_ptr()), t.size(1), images > 1 ? t.stride(0) : height * row, row, pixel};
}

inline Tensor new_images(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  return torch::stable::empty({like.size(0), channels, height, width}, like.scalar_type(), Layout::Strided,
                              like.device(), false, MemoryFormat::ChannelsLast);
}

template <class T = float>
Pixels<T> dense_pixels(Tensor& t) {
  const int64_t channels = t.size(1), row = t.size(3) * channels;
  return {static_cast<T*>(t.mutable_data_ptr()), channels, t.size(2) * row, row, channels};
}

// Work on fewer floats than this takes about as long as starting a thread.
constexpr int64_t kSerial = 32768;

// Calls f(i) for each i < count, in parallel. Each thread takes the next as it comes free: one that other programs hold up
// does not hold up the rest. So which thread has which i is not known, and no result may depend on it.
template <class F>
void parallel(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min(count, static_cast<int64_t>(torch::stable::get_num_threads()));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  });
}

// The same, in parallel where it is work on enough floats.
template <class F>
void parallel_if_large(int64_t floats, int64_t count, const F& f) {
  if (floats >= kSerial)
    parallel(count, f);
  else
    for (int64_t i = 0; i < count; ++i) f(i);
}

// Into how many parts to cut n items of work: several for a thread, so that threads stay in balance, but parts of at least
// `least` items if these are enough for all threads.
inline int64_t balanced_parts(int64_t n, int64_t least) {
  constexpr int64_t kPartsOfThread = 4;  // more would cost more around each part than they gain
  const int64_t threads = torch::stable::get_num_threads();
  return threads == 1 ? 1 : std::clamp(n / least, threads, kPartsOfThread * threads);
}

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The distance of two of many parallel streams: an odd number of cache lines, or they would share few sets of the cache.
inline int64_t odd_lines(int64_t floats) { return (round_up(floats, 16) / 16 | 1) * 16; }

// The distance of two rows of a block; those of a multiple of 512 bytes get a line more, against the same sharing of sets.
inline int64_t row_of(int64_t columns) {
  const int64_t row = round_up(columns, 16);
  return row % 128 == 0 ? row + 16 : row;
}

struct Range {
  int64_t begin, end;
};

inline Range part(int64_t n, int64_t i, int64_t parts) { return {n * i / parts, n * (i + 1) / parts}; }

// Calls f(begin, end) for the given number of equal parts of a range; empty ones are left out.
template <class F>
void for_parts(Range range, int64_t parts, const F& f) {
  for (int64_t i = 0; i < parts; ++i) {
    const Range p = part(range.end - range.begin, i, parts);
    if (p.begin < p.end) f(Range{range.begin + p.begin, range.begin + p.end});
  }
}

// Calls f(range) for one range of 0..n per thread, in parallel.
template <class F>
void parallel_parts(int64_t n, int64_t threads, const F& f) {
  parallel(threads, [&](int64_t i) { for_parts(part(n, i, threads), 1, f); });
}

}  // namespace us3l
