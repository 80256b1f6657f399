// Images as the kernels see them. No torch headers.
#pragma once

#include <cstdint>

namespace us3l {

// Images with channels innermost; distances in elements.
template <class T>
struct Pixels {
  T* data;
  std::int64_t channels, image, row, pixel;
};

}  // namespace us3l
