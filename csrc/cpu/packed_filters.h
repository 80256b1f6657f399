// The filters of a convolution as the right side of a matrix product.
#pragma once

#include <vector>

#include "gemm_kernels.h"
#include "scratch.h"
#include "tensors.h"

namespace us3l {

// Filters at taps, packed: [panels][taps][depth][lanes]. From `depth` channels to `columns` channels, whose distances in
// the weight are given, as are the places of the taps' filters there.
class PackedFilters {
 public:
  PackedFilters(const GemmKernels& gemm, const std::vector<int64_t>& taps, int64_t depth, int64_t columns,
                Matrix filters)
      : depth_(depth),
        lanes_(gemm.lanes),
        panel_(static_cast<int64_t>(taps.size()) * depth * lanes_),
        memory_(Scratch::kFilters, divide_up(columns, lanes_) * panel_) {
    float* const data = memory_.data();
    const int64_t count = taps.size();
    parallel_if_large(divide_up(columns, lanes_) * panel_, divide_up(columns, lanes_) * count, [&](int64_t i) {
      const int64_t panel = i / count, tap = i % count, lane = panel * lanes_;
      const float* const from = filters.data + taps[tap] + lane * filters.column;
      gemm.pack(depth, std::min(lanes_, columns - lane), {from, filters.row, filters.column},
                data + panel * panel_ + tap * depth * lanes_, panel_);
    });
  }

  Panels at(int64_t panel, int64_t tap) const {
    return {memory_.data() + panel * panel_ + tap * depth_ * lanes_, panel_, lanes_};
  }

 private:
  int64_t depth_, lanes_, panel_;
  Scratch memory_;
};

}  // namespace us3l
