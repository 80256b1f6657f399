#include "scratch.h"

#include <cstdlib>
#include <new>

namespace us3l {
namespace {

constexpr std::int64_t kLine = 64, kKept = std::int64_t{64} << 20;

struct Block {
  float* data = nullptr;
  std::int64_t bytes = 0;

  void resize(std::int64_t wanted) {
    std::free(data);
    data = nullptr;
    bytes = 0;
    if (wanted == 0) return;
    data = static_cast<float*>(std::aligned_alloc(kLine, wanted));
    if (data == nullptr) throw std::bad_alloc();
    bytes = wanted;
  }
  ~Block() { std::free(data); }
};

thread_local Block blocks[Scratch::kSlots];

}  // namespace

Scratch::Scratch(Slot slot, std::int64_t floats) : slot_(slot) {
  const std::int64_t bytes = (floats * static_cast<std::int64_t>(sizeof(float)) + kLine - 1) / kLine * kLine;
  if (blocks[slot].bytes < bytes) blocks[slot].resize(bytes);
  data_ = blocks[slot].data;
}

Scratch::~Scratch() {
  if (blocks[slot_].bytes > kKept) blocks[slot_].resize(0);
}

}  // namespace us3l
