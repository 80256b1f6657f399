// The optimizers' arithmetic, written once. Each multi_tensor_<isa>.cpp includes this file inside a namespace of its own,
// with LANES floats to a vector; as in batch_norm_body.h, nothing here may be a function of the standard library.

#include "vector_body.h"

// Calls update.template at<W>(i) for vectors of W elements that together cover [0, n).
template <class Update>
US3L_INLINE void for_elements(std::int64_t n, const Update& update) {
  std::int64_t i = 0;
  for (; i + LANES <= n; i += LANES) update.template at<LANES>(i);
  for (; i < n; ++i) update.template at<1>(i);
}

// From whichever end is nearer, so that both ends are reached exactly.
template <int W>
US3L_INLINE Float<W> lerp(Float<W> start, Float<W> end, Lerp l) {
  return l.weight < 0.5f ? start + l.weight * (end - start) : end - (1.f - l.weight) * (end - start);
}

template <int W>
US3L_INLINE Float<W> square_root(Float<W> v) {
  for (int i = 0; i < W; ++i) v[i] = __builtin_sqrtf(v[i]);  // one instruction with -fno-math-errno
  return v;
}

template <bool kMomentum, bool kTeacher>
struct Sgd {
  float* param;
  const float* grad;
  float *momentum, *teacher;
  float decay;
  SgdOptions options;

  template <int W>
  US3L_INLINE void at(std::int64_t i) const {
    Float<W> p = load<W>(param + i), g = load<W>(grad + i) + decay * p;
    if constexpr (kMomentum) {
      const Float<W> m = options.momentum * load<W>(momentum + i) + g;
      store<W>(momentum + i, m);
      g = options.nesterov ? g + options.momentum * m : m;
    }
    p -= options.lr * g;
    store<W>(param + i, p);
    if constexpr (kTeacher) store<W>(teacher + i, lerp<W>(load<W>(teacher + i), p, options.average));
  }
};

template <bool kMomentum, bool kTeacher>
void sgd_as(float* param, const float* grad, float* momentum, float* teacher, std::int64_t n, float decay,
            const SgdOptions& options) {
  for_elements(n, Sgd<kMomentum, kTeacher>{param, grad, momentum, teacher, decay, options});
}

void sgd(float* param, const float* grad, float* momentum, float* teacher, std::int64_t n, float decay,
         const SgdOptions& options) {
  const auto as = momentum != nullptr ? (teacher != nullptr ? sgd_as<true, true> : sgd_as<true, false>)
                                      : (teacher != nullptr ? sgd_as<false, true> : sgd_as<false, false>);
  as(param, grad, momentum, teacher, n, decay, options);
}

struct Adamw {
  float* param;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  float keep;
  AdamwOptions options;

  template <int W>
  US3L_INLINE void at(std::int64_t i) const {
    const Float<W> g = load<W>(grad + i);
    const Float<W> first = lerp<W>(load<W>(exp_avg + i), g, options.first);
    const Float<W> second = options.beta2 * load<W>(exp_avg_sq + i) + options.rest2 * g * g;
    store<W>(exp_avg + i, first);
    store<W>(exp_avg_sq + i, second);
    const Float<W> deviation = square_root<W>(second) * options.inverse_correction2 + options.eps;
    store<W>(param + i, keep * load<W>(param + i) - options.step_size * first / deviation);
  }
};

void adamw(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, std::int64_t n, float keep,
           const AdamwOptions& options) {
  for_elements(n, Adamw{param, grad, exp_avg, exp_avg_sq, keep, options});
}

struct Ema {
  float* teacher;
  const float* student;
  Lerp average;

  template <int W>
  US3L_INLINE void at(std::int64_t i) const {
    store<W>(teacher + i, lerp<W>(load<W>(teacher + i), load<W>(student + i), average));
  }
};

void ema(float* teacher, const float* student, std::int64_t n, Lerp average) {
  for_elements(n, Ema{teacher, student, average});
}

MultiTensorKernels multi_tensor_kernels() { return {sgd, adamw, ema}; }
