// Prefixes of many float32 parameters copied to dense tensors of low precision, and gradients of those added to prefixes
// of float32: one launch for all layers of a width.

#include "../cpu/tensors.h"
#include "multi_tensor.h"
#include "ops.h"
#include "types.h"

namespace us3l::cuda {
namespace {

// Rows of n1 x n2 elements from one tensor to another, in the order of the latter's memory: n2 elements side by side.
struct Copy {
  const void* from;
  void* to;
  int64_t from_row, to_row;  // distances in elements
  int32_t from1, from2, to1;
  int32_t rows, n1, n2;
  bool vectors;  // n2 elements lie side by side in both, and can be had eight at a time

  __host__ __device__ int64_t numel() const { return static_cast<int64_t>(rows) * n1 * n2; }
};

constexpr int kElements = 8;  // of a thread at a time: 16 bytes of half precision

template <class From, class To, bool kAdd>
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ Table<Copy> table) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const int t = table.entry_of(block);
  const Copy& copy = table.entries[t];
  const Chunk chunk(block - table.first_block[t], copy.numel());
  const From* const from = static_cast<const From*>(copy.from);
  To* const to = static_cast<To*>(copy.to);

  // One division in 64 bits; the elements of the chunk count in 32 from the beginning of its first row.
  const int32_t row_numel = copy.n1 * copy.n2;
  const int64_t first_row = chunk.begin / row_numel;
  const auto rest = static_cast<uint32_t>(chunk.begin - first_row * row_numel);
  struct Place {
    int64_t from, to;
  };
  const auto place = [&](int i) {
    const uint32_t element = rest + static_cast<uint32_t>(i), row = element / static_cast<uint32_t>(row_numel);
    const uint32_t inside = element - row * static_cast<uint32_t>(row_numel), i1 = inside / static_cast<uint32_t>(copy.n2);
    const int64_t k = first_row + row, j = inside - i1 * static_cast<uint32_t>(copy.n2);
    return Place{k * copy.from_row + static_cast<int64_t>(i1) * copy.from1 + j * copy.from2,
                 k * copy.to_row + static_cast<int64_t>(i1) * copy.to1 + j};
  };

  const int thread = static_cast<int>(threadIdx.x);
  if (copy.vectors) {
    for (int i = kElements * thread; i < chunk.count; i += kElements * kThreads) {
      const Place at = place(i);
      float values[kElements], sums[kElements];
      load(from + at.from, values);
      if constexpr (kAdd) {
        load(to + at.to, sums);
#pragma unroll
        for (int e = 0; e < kElements; ++e) values[e] += sums[e];
      }
      store(to + at.to, values);
    }
  } else {
    for (int i = thread; i < chunk.count; i += kThreads) {
      const Place at = place(i);
      const auto value = static_cast<float>(from[at.from]);
      to[at.to] = static_cast<To>(kAdd ? static_cast<float>(to[at.to]) + value : value);
    }
  }
}

bool multiples_of_an_access(std::initializer_list<int64_t> distances, int64_t size) {
  for (const int64_t distance : distances)
    if (distance * size % kAccess != 0) return false;
  return true;
}

// t as [rows, channels, taps]
struct Filters {
  int64_t rows, channels, taps, row, channel, tap;  // sizes, then distances
};

Filters filters_of(const char* op, const char* name, size_t index, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.dim() <= 4, op, ": ", name, "[", index, "]: expected 1 to 4 dimensions, got ",
                  shape_of(t));
  Filters f{t.size(0), 1, 1, t.stride(0), 1, 1};
  if (t.dim() > 1) f.channels = t.size(1), f.channel = t.stride(1);
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    STD_TORCH_CHECK(f.taps == 1 || t.stride(d) == f.taps * f.tap, op, ": ", name, "[", index,
                    "]: expected the last two dimensions to lie like one");
    if (f.taps == 1) f.tap = t.stride(d);
    f.taps *= t.size(d);
  }
  return f;
}

// One list of an operator's arguments: of whole parameters in float32, or of prefixes of them.
struct List {
  const char* name;
  const Tensors& tensors;
};

Copy copy_of(const char* op, const List& from, const List& to, const List& whole, const List& prefix, size_t k) {
  const Tensor &w = whole.tensors[k], &p = prefix.tensors[k];
  for (const List* list : {&whole, &prefix})
    STD_TORCH_CHECK(on_device(list->tensors[k]) &&
                        list->tensors[k].get_device_index() == whole.tensors[0].get_device_index(),
                    op, ": ", list->name, "[", k, "]: expected a tensor on the device of the first");
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Float, op, ": ", whole.name, "[", k, "]: expected float32");
  STD_TORCH_CHECK(p.scalar_type() == prefix.tensors[0].scalar_type(), op, ": ", prefix.name, "[", k,
                  "]: expected the dtype of the first");
  bool fits = w.dim() == p.dim();
  for (int64_t d = 0; fits && d < w.dim(); ++d) fits = d < 2 ? p.size(d) <= w.size(d) : p.size(d) == w.size(d);
  STD_TORCH_CHECK(fits, op, ": ", prefix.name, "[", k, "]: expected a prefix of ", whole.name, ", ", shape_of(w), ", got ",
                  shape_of(p));

  Filters source = filters_of(op, from.name, k, from.tensors[k]), target = filters_of(op, to.name, k, to.tensors[k]);
  const int64_t channels = filters_of(op, prefix.name, k, p).channels, taps = target.taps;
  Copy copy{};
  copy.from = from.tensors[k].const_data_ptr();
  copy.to = to.tensors[k].mutable_data_ptr();
  copy.rows = static_cast<int32_t>(p.size(0));
  copy.from_row = source.row;
  copy.to_row = target.row;
  const bool channels_inside = taps == 1 || target.channel == 1;
  STD_TORCH_CHECK(channels_inside ? target.channel == 1 || channels == 1 : target.tap == 1, op, ": ", to.name, "[", k,
                  "]: expected channels or taps side by side");
  const int64_t sizes[] = {channels_inside ? taps : channels, channels_inside ? channels : taps};
  const int64_t distances[] = {channels_inside ? source.tap : source.channel,
                               channels_inside ? source.channel : source.tap,
                               channels_inside ? target.tap : target.channel};
  constexpr int64_t kLimit = int64_t{1} << 30;  // of a row, so that the kernel can count in 32 bits
  STD_TORCH_CHECK(sizes[0] * sizes[1] < kLimit && p.size(0) < kLimit && distances[0] < kLimit && distances[1] < kLimit &&
                      distances[2] < kLimit,
                  op, ": ", whole.name, "[", k, "]: expected rows of fewer than 2^30 elements, got ", shape_of(w));
  copy.n1 = static_cast<int32_t>(sizes[0]);
  copy.n2 = static_cast<int32_t>(sizes[1]);
  copy.from1 = static_cast<int32_t>(distances[0]);
  copy.from2 = static_cast<int32_t>(distances[1]);
  copy.to1 = static_cast<int32_t>(distances[2]);
  const auto size_of = [](const Tensor& t) { return t.scalar_type() == ScalarType::Float ? 4 : 2; };
  copy.vectors = copy.from2 == 1 && copy.n2 % kElements == 0 && aligned(copy.from) && aligned(copy.to) &&
                 multiples_of_an_access({copy.from_row, copy.from1}, size_of(from.tensors[k])) &&
                 multiples_of_an_access({copy.to_row, copy.to1}, size_of(to.tensors[k]));
  return copy;
}

void run(const char* op, const List& from, const List& to, const List& whole, const List& prefix,
         void (*kernel)(Table<Copy>)) {
  const Stream stream(whole.tensors[0]);
  const auto launch = [&](const Table<Copy>& table) {
    static_assert(sizeof(table) <= 4096, "kernel arguments");
    stream.launch(kernel, dim3(table.blocks()), kThreads, table);
  };
  Launches<Copy, decltype(launch)> launches(launch);
  for (size_t k = 0; k < whole.tensors.size(); ++k) {
    const Copy copy = copy_of(op, from, to, whole, prefix, k);
    if (copy.numel() > 0) launches.add(copy, copy.numel());
  }
  launches.flush();
}

void check_lengths(const char* op, const List& first, const List& second) {
  STD_TORCH_CHECK(first.tensors.size() == second.tensors.size(), op, ": ", second.name, ": expected ",
                  first.tensors.size(), " tensors, as many as ", first.name, ", got ", second.tensors.size());
}

}  // namespace

void multi_tensor_pack(Tensors parameters, Tensors packed) {
  const char* op = "multi_tensor_pack";
  const List whole{"parameters", parameters}, prefix{"packed", packed};
  check_lengths(op, whole, prefix);
  if (parameters.empty()) return;
  for_type(op, prefix.name, prefix.tensors[0].scalar_type(), [&](auto type) {
    run(op, whole, prefix, whole, prefix, copy_kernel<float, decltype(type), false>);
  });
}

void multi_tensor_scatter_add(Tensors gradients, Tensors full_gradients) {
  const char* op = "multi_tensor_scatter_add";
  const List prefix{"gradients", gradients}, whole{"full_gradients", full_gradients};
  check_lengths(op, prefix, whole);
  if (gradients.empty()) return;
  for_type(op, prefix.name, prefix.tensors[0].scalar_type(), [&](auto type) {
    run(op, prefix, whole, whole, prefix, copy_kernel<decltype(type), float, true>);
  });
}

}  // namespace us3l::cuda
