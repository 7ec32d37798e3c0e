// Calls ExecuTorch kernels as its runtime does, from the operator registry, without a program around them.
//
//   run_kernels                                         prints the instruction sets that can be chosen here
//   run_kernels JOBS RESULTS THREADS TARGET [LIBRARY]   TARGET: one of them, or "best"; LIBRARY: of the kernels,
//                                                       where they are not linked in
//
// parallel_for is this file's: plain threads which the thread sanitizer sees through, and it stands before that of
// the package for a LIBRARY, too.
// also sets that only some kernels are compiled for
#define HWY_WANT_AVX3_DL
#include <dlfcn.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

#include <cstdio>
#include <thread>

#include "hwy/highway.h"
#include "tensors.h"

namespace {
int64_t threads = 1;
std::string messages;  // what the runtime logged
}  // namespace

namespace executorch::extension {

bool parallel_for(const int64_t begin, const int64_t end, const int64_t,
                  ::executorch::runtime::FunctionRef<void(int64_t, int64_t)> f) {
  const int64_t parts = std::min(threads, end - begin);
  std::vector<std::thread> pool;
  for (int64_t k = 1; k < parts; ++k) {
    pool.emplace_back([=] { f(begin + (end - begin) * k / parts, begin + (end - begin) * (k + 1) / parts); });
  }
  if (parts > 0) f(begin, begin + (end - begin) / parts);
  for (std::thread& thread : pool) thread.join();
  return true;
}

}  // namespace executorch::extension

namespace {

using edgedyn::driver::Held;
using edgedyn::driver::Job;
using edgedyn::driver::Value;
using executorch::aten::Tensor;
using executorch::runtime::EValue;

void Log(et_timestamp_t, et_pal_log_level_t, const char*, const char*, size_t, const char* message, size_t length) {
  messages.append(message, length).append("\n");
}

// The arguments of one call, as the runtime holds them.
struct Stack {
  explicit Stack(const Job& job) : texts(job.values.size()), values(job.values.size()) {
    for (size_t k = 0; k < job.values.size(); ++k) {
      const Value& value = job.values[k];
      texts[k] = executorch::aten::ArrayRef<char>(value.text.data(), value.text.size());
      if (value.kind == 'i') values[k] = EValue(value.integer);
      if (value.kind == 'd') values[k] = EValue(value.real);
      if (value.kind == 'b') values[k] = EValue(value.integer != 0);
      if (value.kind == 's') values[k] = EValue(&texts[k]);
      if (value.kind == 't') {
        held.push_back(std::make_unique<Held>(*value.tensor));
        values[k] = EValue(Tensor(held.back()->impl.get()));
      }
      pointers.push_back(&values[k]);
    }
  }

  std::vector<executorch::aten::ArrayRef<char>> texts;
  std::vector<EValue> values;
  std::vector<EValue*> pointers;
  std::vector<std::unique_ptr<Held>> held;
};

void Call(const Job& job, edgedyn::driver::ResultFile& results) {
  messages.clear();
  Stack stack(job);
  const auto kernel = executorch::runtime::get_op_function_from_registry(job.name.c_str());
  if (!kernel.ok()) return results.Write(static_cast<int64_t>(kernel.error()), "no such kernel", {}, "");
  executorch::runtime::KernelRuntimeContext context;
  (*kernel)(context, {stack.pointers.data(), stack.pointers.size()});
  const std::string damage = job.Damage();
  if (!damage.empty()) return results.Write(-1, damage, {}, "");
  const Tensor& out = stack.values.back().toTensor();
  const std::vector<int64_t> sizes(out.sizes().begin(), out.sizes().end());
  results.Write(static_cast<int64_t>(context.failure_state()), messages, sizes,
                job.out().buffer.bytes().substr(0, out.nbytes()));
}

int Choose(const std::string& name) {
  if (name == "best") return 0;
  for (int64_t left = hwy::SupportedTargets() & HWY_TARGETS; left != 0; left &= left - 1) {
    if (name != hwy::TargetName(left & -left)) continue;
    hwy::SetSupportedTargetsForTest(left & -left);
    return 0;
  }
  return std::fprintf(stderr, "%s cannot be chosen here\n", name.c_str()), 2;
}

}  // namespace

int main(int count, char** words) {
  if (count < 5) {
    for (int64_t left = hwy::SupportedTargets() & HWY_TARGETS; left != 0; left &= left - 1) {
      std::puts(hwy::TargetName(left & -left));
    }
    return 0;
  }
  threads = std::atoll(words[3]);
  if (Choose(words[4]) != 0) return 2;
  if (count > 5 && dlopen(words[5], RTLD_NOW | RTLD_GLOBAL) == nullptr) return std::fputs(dlerror(), stderr), 2;
  executorch::runtime::runtime_init();
  executorch::runtime::register_pal(executorch::runtime::PalImpl::create(Log, __FILE__));
  edgedyn::driver::JobFile jobs(words[1]);
  edgedyn::driver::ResultFile results(words[2]);
  for (Job job; jobs.Next(job);) Call(job, results);
  return 0;
}
