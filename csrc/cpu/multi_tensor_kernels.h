// The optimizers' arithmetic on `n` elements that lie one after the other, and the table that holds it per instruction
// set. No torch headers.
#pragma once

#include <cstdint>

#include "isa.h"

namespace us3l {

// start + weight * (end - start), exactly `start` where both are equal, and `end` for weight 1.
struct Lerp {
  float weight;
};

struct SgdOptions {
  float lr, momentum;
  bool nesterov;
  Lerp average;  // of the teacher
};

struct AdamwOptions {
  Lerp first;          // of exp_avg
  float beta2, rest2;  // rest2 = 1 - beta2
  float step_size, inverse_correction2, eps;
};

struct MultiTensorKernels {
  // grad + decay * param goes into the momentum, that into the parameter, and that into the teacher's average;
  // momentum and teacher may be null.
  void (*sgd)(float* param, const float* grad, float* momentum, float* teacher, std::int64_t n, float decay,
              const SgdOptions& options);

  // The parameter is multiplied by `keep` first.
  void (*adamw)(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, std::int64_t n, float keep,
                const AdamwOptions& options);

  void (*ema)(float* teacher, const float* student, std::int64_t n, Lerp average);
};

namespace portable {
MultiTensorKernels multi_tensor_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
MultiTensorKernels multi_tensor_kernels();
}
namespace avx512 {
MultiTensorKernels multi_tensor_kernels();
}
#endif

inline MultiTensorKernels multi_tensor_kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::multi_tensor_kernels();
    case Isa::avx2:
      return avx2::multi_tensor_kernels();
#endif
    default:
      return portable::multi_tensor_kernels();
  }
}

}  // namespace us3l
