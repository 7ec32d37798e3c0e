// The machine behind cuda_runtime.h: every thread of a block is a fiber, which runs from barrier to barrier.
//
// Threads run in order up to a barrier, then in reverse order up to the next: a kernel that works in both
// does not depend on order. Every block starts with shared memory of NaN (as INT8: -1); so are bytes before
// their copy arrives.
#include <ucontext.h>

#include <csetjmp>
#include <csignal>
#include <deque>
#include <vector>

#include "cuda_pipeline_primitives.h"
#include "cuda_runtime.h"

namespace edgedyn {
constexpr size_t kShared = 64 * 1024;
__attribute__((aligned(128))) unsigned char shared_memory[kShared];
}  // namespace edgedyn

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr unsigned char kPoison = 0xFF;  // four of them are a NaN, and so are two

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  std::deque<std::vector<Copy>> groups;  // of copies on their way; the last is not committed
  bool is_done;
};

std::deque<Fiber> fibers;
ucontext_t machine;
Fiber* running;
const std::function<void()>* work;
int votes, last_votes;
sigjmp_buf fault;

void Enter() {
  (*work)();
  running->is_done = true;
}

void Fault(int) { siglongjmp(fault, 1); }

void Begin(Fiber& fiber) {
  fiber.groups.assign(1, {});
  fiber.is_done = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = &machine;
  makecontext(&fiber.context, Enter, 0);
}

// Runs one block; false where its threads do not meet.
bool RunBlock(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) Begin(fibers[i]);
  for (bool is_forward = true;; is_forward = !is_forward) {
    unsigned done = 0;
    for (unsigned k = 0; k < threads; ++k) {
      const unsigned i = is_forward ? k : threads - 1 - k;
      threadIdx.x = i;
      running = &fibers[i];
      swapcontext(&machine, &running->context);
      done += running->is_done;
    }
    if (done == threads) return true;
    if (done > 0) return false;
    last_votes = votes, votes = 0;
  }
}

cudaError_t RunBlocks(const cudaLaunchConfig_t& config) {
  using edgedyn::shared_memory;
  while (fibers.size() < config.blockDim.x) fibers.emplace_back();
  for (blockIdx.x = 0; blockIdx.x < config.gridDim.x; ++blockIdx.x) {
    memset(shared_memory, kPoison, sizeof(shared_memory));
    if (!RunBlock(config.blockDim.x)) return cudaErrorLaunchFailure;
    for (size_t i = config.dynamicSmemBytes; i < edgedyn::kShared; ++i) {
      if (shared_memory[i] != kPoison) return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t RunOnHost(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  if (config.gridDim.x == 0 || config.blockDim.x > 1024 || config.dynamicSmemBytes > 48 * 1024) {
    return cudaErrorInvalidValue;
  }
  work = &thread, blockDim = config.blockDim, gridDim = config.gridDim;
  struct sigaction action{}, before_segv, before_bus;
  action.sa_handler = Fault;
  sigaction(SIGSEGV, &action, &before_segv);
  sigaction(SIGBUS, &action, &before_bus);
  const cudaError_t result = sigsetjmp(fault, 1) ? cudaErrorIllegalAddress : RunBlocks(config);
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
  return result;
}

void __syncthreads() { swapcontext(&running->context, &machine); }

int __syncthreads_or(int predicate) {
  votes |= predicate;
  __syncthreads();
  return last_votes;
}

void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes) raise(SIGBUS);
  memset(to, kPoison, bytes);
  running->groups.back().push_back({to, from, bytes});
}

void __pipeline_commit() { running->groups.emplace_back(); }

void __pipeline_wait_prior(size_t groups) {
  while (running->groups.size() > groups + 1) {
    for (const Copy& copy : running->groups.front()) memcpy(copy.to, copy.from, copy.bytes);
    running->groups.pop_front();
  }
}
