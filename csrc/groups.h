// The groups of rows whose weight decay differs, as the optimizers of the CPU and of CUDA see them. No torch headers.
#pragma once

#include <cstdint>

namespace us3l {

// Elements of one group of a non-empty tensor whose rows are its outermost dimension: a group is contiguous, and what is
// left over belongs to the last one. Rows are the output channels of 4-D parameters and the elements of 1-D ones; any
// other parameter is one group.
inline std::int64_t group_numel(std::int64_t dim, std::int64_t rows, std::int64_t numel, std::int64_t groups) {
  if (dim != 1 && dim != 4) return numel;
  const std::int64_t rows_per_group = rows / groups;
  return (rows_per_group > 1 ? rows_per_group : 1) * (numel / rows);
}

}  // namespace us3l
