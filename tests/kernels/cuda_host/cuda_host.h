// CUDA C++ as far as csrc/cuda uses it, on the CPU: its sources compile with an ordinary compiler, and their kernels run,
// block after block, on tensors of the CPU. It stands in for what csrc/cuda/launch.h includes.
//
// A block's threads take turns: one runs until __syncthreads(), or something that its warp does together, or its end, then
// the next does. Which is next, of the threads and of the blocks, is drawn anew at every turn from `order`: a result that
// depends on it shows a barrier that is missing, or an address that two threads write. A barrier that only some threads
// reach ends the process with a message.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <iterator>
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
      : body_(std::move(body)), random_(random), to_start_(turns(threads, random)), in_warp_((threads - 1) / kWarp + 1) {}

  void run() {
    current_ = this;
    do {
      // Every thread up to its next barrier, or to its end: those that go on, then those that have not begun.
      while (!ready_.empty() || started_ < to_start_.size()) resume(ready_.empty() ? begun() : next_ready());
      for (const auto& warp : in_warp_) check(warp.empty(), "something that a warp does together");
      check(finished_ == 0 || at_barrier_.empty(), "__syncthreads()");
      std::swap(ready_, at_barrier_);
    } while (!ready_.empty());
  }

  static void barrier() { current_->wait_in(&current_->at_barrier_); }

  // Returns when all threads of the warp have come here.
  static void warp_barrier() { current_->wait_in(&current_->in_warp_[threadIdx.x / kWarp]); }

  // Whether something that may happen now or later happens now.
  static bool at_once() { return order != 0 && current_->random_() % 2 == 0; }

  static constexpr unsigned kWarp = 32;

 private:
  struct Coroutine;
  using Waiting = std::deque<std::unique_ptr<Coroutine>>;

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
      self.leave();
    }

    void leave() {
      start_switch(&fake_stack, block.stack_bottom, block.stack_size);
      swapcontext(&context, &block.context_);
    }
    void arrived() { finish_switch(fake_stack, &block.stack_bottom, &block.stack_size); }

    Block& block;
    std::unique_ptr<char[]> stack;
    ucontext_t context;
    unsigned thread = 0;
    Waiting* waits_in = nullptr;  // null: it has ended
    void* fake_stack = nullptr;
  };

  std::unique_ptr<Coroutine> begun() { return std::make_unique<Coroutine>(*this); }

  std::unique_ptr<Coroutine> next_ready() {
    if (order != 0) std::swap(ready_.front(), ready_[random_() % ready_.size()]);
    auto next = std::move(ready_.front());
    ready_.pop_front();
    return next;
  }

  void wait_in(Waiting* waiting) {
    Coroutine& self = *running_;
    self.waits_in = waiting;
    self.leave();
    self.arrived();
    threadIdx = dim3(self.thread);
  }

  void check(bool all, const char* what) const {
    if (all) return;
    std::fprintf(stderr, "%s in block (%u, %u, %u): %u threads of %zu have ended without it, or wait elsewhere\n", what,
                 blockIdx.x, blockIdx.y, blockIdx.z, finished_, to_start_.size());
    std::abort();
  }

  void resume(std::unique_ptr<Coroutine> coroutine) {
    running_ = coroutine.get();
    running_->waits_in = nullptr;
    void* fake_stack = nullptr;
    start_switch(&fake_stack, coroutine->stack.get(), kStack);
    swapcontext(&context_, &coroutine->context);
    finish_switch(fake_stack, nullptr, nullptr);
    Waiting* const waiting = coroutine->waits_in;
    if (waiting == nullptr) return;
    waiting->push_back(std::move(coroutine));
    if (waiting != &at_barrier_ && waiting->size() == kWarp) {
      std::move(waiting->begin(), waiting->end(), std::back_inserter(ready_));
      waiting->clear();
    }
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
  Waiting ready_, at_barrier_;
  std::vector<Waiting> in_warp_;
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
