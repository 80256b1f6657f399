// CUDA C++ as far as csrc/cuda uses it, on the CPU: its sources compile with an ordinary compiler, and their kernels run,
// block after block, on tensors of the CPU. It stands in for what csrc/cuda/launch.h includes.
//
// A block's threads take turns: one runs until __syncthreads() or its end, then the next does. Which is next, of the
// threads and of the blocks, is drawn anew at every turn from `order`: a result that depends on it shows a barrier that is
// missing, or an address that two threads write. A barrier that only some threads reach ends the process with a message.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace us3l::cuda_host {

// The seed of all turns; 0: one after the other.
inline unsigned order = 0;

// Calls that have been launched, for the tests to count.
inline long launches = 0;

inline std::vector<unsigned> turns(unsigned count, std::mt19937& random) {
  std::vector<unsigned> turns(count);
  std::iota(turns.begin(), turns.end(), 0u);
  if (order != 0) std::shuffle(turns.begin(), turns.end(), random);
  return turns;
}

// Runs the threads of one block after the other as coroutines. A coroutine goes on to the next thread when one has come to
// its end, so that a kernel without barriers needs a single one.
class Block {
 public:
  Block(std::function<void()> body, unsigned threads, std::mt19937& random)
      : body_(std::move(body)), random_(random), to_start_(turns(threads, random)) {}

  void run() {
    current_ = this;
    do {
      // Every thread up to its next barrier, or to its end: those that wait at one, then those that have not begun.
      std::vector<std::unique_ptr<Coroutine>> waiting;
      std::swap(waiting, coroutines_);
      if (order != 0) std::shuffle(waiting.begin(), waiting.end(), random_);
      for (auto& coroutine : waiting) resume(std::move(coroutine));
      while (started_ < to_start_.size()) resume(std::make_unique<Coroutine>(*this));
      if (finished_ > 0 && !coroutines_.empty()) {
        std::fprintf(stderr, "__syncthreads() in block (%u, %u, %u): %u threads of %zu have ended without it\n",
                     blockIdx.x, blockIdx.y, blockIdx.z, finished_, to_start_.size());
        std::abort();
      }
    } while (!coroutines_.empty());
  }

  static void barrier() { current_->running_->wait(); }

 private:
  struct Coroutine {
    explicit Coroutine(Block& block) : block(block), stack(new char[kStack]) {
      getcontext(&context);
      context.uc_stack.ss_sp = stack.get();
      context.uc_stack.ss_size = kStack;
      context.uc_link = nullptr;
      makecontext(&context, &Coroutine::main, 0);
    }

    static void main() {
      Block& block = *current_;
      Coroutine& self = *block.running_;
      self.arrived();
      while (block.started_ < block.to_start_.size()) {
        self.thread = block.to_start_[block.started_++];
        threadIdx = dim3(self.thread);
        block.body_();
        ++block.finished_;
      }
      self.ended = true;
      self.leave();
    }

    void wait() { leave(), arrived(), threadIdx = dim3(thread); }
    void leave() {
      start_switch(&fake_stack, block.stack_bottom, block.stack_size);
      swapcontext(&context, &block.context_);
    }
    void arrived() { finish_switch(fake_stack, &block.stack_bottom, &block.stack_size); }

    Block& block;
    std::unique_ptr<char[]> stack;
    ucontext_t context;
    unsigned thread = 0;
    bool ended = false;
    void* fake_stack = nullptr;
  };

  void resume(std::unique_ptr<Coroutine> coroutine) {
    running_ = coroutine.get();
    void* fake_stack = nullptr;
    start_switch(&fake_stack, coroutine->stack.get(), kStack);
    swapcontext(&context_, &coroutine->context);
    finish_switch(fake_stack, nullptr, nullptr);
    if (!coroutine->ended) coroutines_.push_back(std::move(coroutine));
  }

#if defined(__SANITIZE_ADDRESS__)
  static void start_switch(void** save, const void* bottom, size_t size) {
    __sanitizer_start_switch_fiber(save, bottom, size);
  }
  static void finish_switch(void* fake, const void** bottom, size_t* size) {
    __sanitizer_finish_switch_fiber(fake, bottom, size);
  }
#else
  static void start_switch(void**, const void*, size_t) {}
  static void finish_switch(void*, const void**, size_t*) {}
#endif

  static constexpr size_t kStack = 64 << 10;
  static inline Block* current_ = nullptr;

  std::function<void()> body_;
  std::mt19937& random_;
  std::vector<unsigned> to_start_;
  unsigned started_ = 0, finished_ = 0;
  std::vector<std::unique_ptr<Coroutine>> coroutines_;  // that wait at a barrier
  Coroutine* running_ = nullptr;
  ucontext_t context_;
  const void* stack_bottom = nullptr;  // of the caller, as the sanitizer tells
  size_t stack_size = 0;
};

}  // namespace us3l::cuda_host

inline void __syncthreads() { us3l::cuda_host::Block::barrier(); }

namespace us3l::cuda {

inline bool on_device(const torch::stable::Tensor& t) { return t.is_cpu(); }

class Stream {
 public:
  explicit Stream(const torch::stable::Tensor&) {}

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, const Arguments&... arguments) const {
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (blocks == 0 || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024) {
      std::fprintf(stderr, "no GPU takes %u x %u x %u blocks of %u threads\n", grid.x, grid.y, grid.z, threads);
      std::abort();
    }
    ++cuda_host::launches;
    std::mt19937 random(cuda_host::order);
    gridDim = grid;
    blockDim = dim3(threads);
    for (const unsigned block : cuda_host::turns(static_cast<unsigned>(blocks), random)) {
      blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
      cuda_host::Block([&] { kernel(arguments...); }, threads, random).run();
    }
  }
};

}  // namespace us3l::cuda
