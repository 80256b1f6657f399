// Working memory that outlives a call: fresh pages cost more than many a kernel that would use them. No torch headers.
#pragma once

#include <cstdint>

namespace us3l {

// `floats` of uninitialised memory, aligned to a cache line, until the object goes out of scope.
//
// Each thread keeps one block per slot for the next call and grows it as needed; blocks of more than 64 MiB are not
// kept. So at most 320 MiB per thread stay in use, until the thread ends. A thread holds a slot once at a time; the block
// itself may be used by other threads meanwhile.
class Scratch {
 public:
  enum Slot { kFilters, kFilterGradients, kInput, kOutput, kImages, kSlots };

  Scratch(Slot slot, std::int64_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return data_; }

 private:
  Slot slot_;
  float* data_;
};

}  // namespace us3l
