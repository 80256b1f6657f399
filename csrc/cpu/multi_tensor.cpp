// The optimizers over lists of tensors: all elements of all parameters, one parameter after the other, are one sequence
// that is cut into equal parts for the threads. Every element is computed alone: results do not depend on the cut.

#include "multi_tensor_kernels.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "../groups.h"
#include "../ops.h"

namespace us3l {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

constexpr int64_t kSerial = 32768;  // elements below which starting a thread takes longer than they do

// One list of an operator's arguments.
struct Operand {
  const char* name;
  Tensors& tensors;  // one for each parameter, or none at all
  bool written;
};

// Whether t fills its memory without gaps and, if it is to be cut into groups of rows, has those outermost.
bool is_dense(const Tensor& t, bool grouped) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 1) continue;
    if (grouped && d > 0 && t.stride(d) > t.stride(0) && t.size(0) > 1) return false;
    dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

void check(const char* op, const Operand& operand, size_t k, const Tensor& param) {
  const Tensor& t = operand.tensors[k];
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float, op, ": ", operand.name, "[", k,
                  "]: expected a float32 tensor on the CPU");
  const auto a = t.sizes(), b = param.sizes();
  STD_TORCH_CHECK(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()), op, ": ", operand.name, "[", k,
                  "]: expected the shape of its parameter");
}

// Calls f(k, data, n, g) for runs of n elements of group g of parameter k that together cover all parameters, in
// parallel. data[i] is where the run begins in the tensor of operand i (null if that has none); operand 0 are the
// parameters.
template <size_t kOperands, class F>
void for_runs(const char* op, const std::array<Operand, kOperands>& operands, int64_t groups, const F& f) {
  STD_TORCH_CHECK(groups >= 1, op, ": groups: expected at least 1, got ", groups);
  Tensors& params = operands[0].tensors;
  for (const Operand& operand : operands)
    STD_TORCH_CHECK(operand.tensors.empty() || operand.tensors.size() == params.size(), op, ": ", operand.name,
                    ": expected one for each of ", params.size(), " parameters, got ", operand.tensors.size());

  struct Item {
    size_t index;
    std::array<float*, kOperands> data;
    int64_t begin, numel, group_numel;
  };
  std::vector<Item> items;
  std::vector<std::pair<Tensor, Tensor>> copies;  // what has to be written back: where it belongs, what
  int64_t total = 0;
  for (size_t k = 0; k < params.size(); ++k) {
    for (const Operand& operand : operands)
      if (!operand.tensors.empty()) check(op, operand, k, params[k]);
    const Tensor param = params[k];
    if (param.numel() == 0) continue;
    const bool grouped = groups > 1 && (param.dim() == 1 || param.dim() == 4);
    const Tensor layout = is_dense(param, grouped) ? param : torch::stable::contiguous(param);
    Item item{k, {}, total, param.numel(),
              grouped ? group_numel(param.dim(), param.size(0), param.numel(), groups) : param.numel()};
    for (size_t i = 0; i < kOperands; ++i) {
      if (operands[i].tensors.empty()) continue;
      Tensor& t = operands[i].tensors[k];
      if (!same_strides(t, layout)) {
        Tensor copy = torch::stable::empty_like(layout);
        torch::stable::copy_(copy, t);
        if (operands[i].written) copies.emplace_back(t, copy);
        t = copy;  // the list keeps it alive
      }
      item.data[i] = operands[i].written ? t.mutable_data_ptr<float>() : const_cast<float*>(t.const_data_ptr<float>());
    }
    items.push_back(item);
    total += item.numel;
  }

  torch::stable::parallel_for(0, total, kSerial, [&](int64_t at, int64_t end) {
    auto item = std::upper_bound(items.begin(), items.end(), at, [](int64_t i, const Item& x) { return i < x.begin; });
    for (--item; at < end; ++item) {
      const int64_t item_end = std::min(end, item->begin + item->numel);
      while (at < item_end) {
        const int64_t offset = at - item->begin, group = std::min(offset / item->group_numel, groups - 1);
        const int64_t group_end = group == groups - 1 ? item_end : item->begin + (group + 1) * item->group_numel;
        const int64_t n = std::min(item_end, group_end) - at;
        auto data = item->data;
        for (float*& pointer : data)
          if (pointer != nullptr) pointer += offset;
        f(item->index, data, n, group);
        at += n;
      }
    }
  });
  for (auto& [target, copy] : copies) torch::stable::copy_(target, copy);
}

}  // namespace

void sgd_(Tensors params, Tensors grads, Tensors momentum_buffers, Tensors teachers, double lr, double momentum,
          double weight_decay, bool nesterov, double alpha, int64_t groups, double ema_momentum) {
  STD_TORCH_CHECK(momentum_buffers.empty() == (momentum == 0.0) || params.empty(), "sgd_: momentum_buffers: expected ",
                  momentum == 0.0 ? "none without momentum" : "one for each parameter, got none");
  STD_TORCH_CHECK(grads.size() == params.size(), "sgd_: grads: expected ", params.size(), ", got ", grads.size());
  const SgdOptions options{static_cast<float>(lr), static_cast<float>(momentum), nesterov,
                           {static_cast<float>(1.0 - ema_momentum)}};
  const auto update = multi_tensor_kernels().sgd;
  const std::array<Operand, 4> operands{{{"params", params, true},
                                         {"grads", grads, false},
                                         {"momentum_buffers", momentum_buffers, true},
                                         {"teachers", teachers, true}}};
  for_runs("sgd_", operands, weight_decay * alpha == 0.0 ? 1 : groups,
           [&](size_t, const auto& data, int64_t n, int64_t group) {
             const auto decay = static_cast<float>(weight_decay * (1.0 - alpha * static_cast<double>(group)));
             update(data[0], data[1], data[2], data[3], n, decay, options);
           });
}

void adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, std::vector<int64_t> steps,
            double lr, double beta1, double beta2, double eps, double weight_decay, double alpha, int64_t groups) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                      steps.size() == count,
                  "adamw_: grads, exp_avgs, exp_avg_sqs, steps: expected ", count, " each, got ", grads.size(), ", ",
                  exp_avgs.size(), ", ", exp_avg_sqs.size(), " and ", steps.size());
  std::vector<AdamwOptions> options;
  for (const int64_t step : steps) {
    STD_TORCH_CHECK(step >= 1, "adamw_: steps: expected at least 1, got ", step);
    const double correction1 = 1.0 - std::pow(beta1, step), correction2 = 1.0 - std::pow(beta2, step);
    options.push_back({{static_cast<float>(1.0 - beta1)},
                       static_cast<float>(beta2),
                       static_cast<float>(1.0 - beta2),
                       static_cast<float>(lr / correction1),
                       static_cast<float>(1.0 / std::sqrt(correction2)),
                       static_cast<float>(eps)});
  }
  const auto update = multi_tensor_kernels().adamw;
  const std::array<Operand, 4> operands{{{"params", params, true},
                                         {"grads", grads, false},
                                         {"exp_avgs", exp_avgs, true},
                                         {"exp_avg_sqs", exp_avg_sqs, true}}};
  for_runs("adamw_", operands, weight_decay * alpha == 0.0 ? 1 : groups,
           [&](size_t k, const auto& data, int64_t n, int64_t group) {
             const auto keep = static_cast<float>(1.0 - lr * weight_decay * (1.0 - alpha * static_cast<double>(group)));
             update(data[0], data[1], data[2], data[3], n, keep, options[k]);
           });
}

void ema_(Tensors teachers, Tensors students, double momentum) {
  STD_TORCH_CHECK(students.size() == teachers.size(), "ema_: students: expected ", teachers.size(), ", got ",
                  students.size());
  const auto update = multi_tensor_kernels().ema;
  const std::array<Operand, 2> operands{{{"teachers", teachers, true}, {"students", students, false}}};
  for_runs("ema_", operands, 1, [&](size_t, const auto& data, int64_t n, int64_t) {
    update(data[0], data[1], n, {static_cast<float>(1.0 - momentum)});
  });
}

}  // namespace us3l
