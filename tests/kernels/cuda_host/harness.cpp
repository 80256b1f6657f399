// What the tests ask of the kernels on the host beside the operations.

#include "../../../csrc/cuda/multi_tensor.h"

using namespace us3l;
using namespace us3l::cuda;

extern "C" {
int chunk() { return kChunk; }
long launches() { return cuda_host::launches; }
void set_order(unsigned order) { cuda_host::order = order; }

int32_t group_of(int64_t begin, int64_t group_numel, int32_t i, int32_t groups) {
  return ChunkGroups(begin, group_numel, groups).of(i);
}
}
