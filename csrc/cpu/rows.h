// Rows of channels as the kernels see them, and bfloat16. No torch headers.
#pragma once

#include <cstdint>

namespace us3l {

struct BFloat16 {
  std::uint16_t bits;
};

// A matrix with its columns side by side; the distance of two rows in elements.
template <class T>
struct Rows {
  T* data;
  std::int64_t stride;
};

}  // namespace us3l
