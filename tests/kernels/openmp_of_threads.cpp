// An OpenMP runtime for ThreadSanitizer, as small as torch's parallel_for needs it.
//
// GCC's own runtime is not instrumented: the sanitizer does not see its barriers, and takes every parallel region for a
// race. Here a region is a set of new threads that are joined at its end, which the sanitizer does see. It comes before
// the real one by LD_PRELOAD; what it does not define (barriers, worksharing) the kernels do not use.
#include <thread>
#include <vector>

namespace {
thread_local int number = 0, members = 1, depth = 0;
thread_local int wanted = 1;
}  // namespace

extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return members; }
int omp_get_max_threads() { return wanted; }
int omp_in_parallel() { return depth > 0 && members > 1; }
void omp_set_num_threads(int threads) { wanted = threads; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  const int count = depth > 0 ? 1 : threads > 0 ? static_cast<int>(threads) : wanted;
  const auto member = [=](int i) {
    const int before[] = {number, members};
    number = i;
    members = count;
    ++depth;
    body(data);
    --depth;
    number = before[0];
    members = before[1];
  };
  std::vector<std::thread> others;
  for (int i = 1; i < count; ++i) others.emplace_back(member, i);
  member(0);
  for (std::thread& other : others) other.join();
}

}  // extern "C"
