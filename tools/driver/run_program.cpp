// Runs a program for an instruction counter: run_program PROGRAM JOB [LIBRARY], on one thread.
//
// JOB holds one job, whose values are the inputs of `forward`. The program runs once before, and then once within
// edgedyn_counted_run, which is what callgrind is told to count: --toggle-collect=edgedyn_counted_run.
#include <dlfcn.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/threadpool/threadpool_guard.h>

#include <cstdio>

#include "tensors.h"

using edgedyn::driver::Held;
using executorch::extension::Module;
using executorch::runtime::EValue;

extern "C" __attribute__((noinline)) bool edgedyn_counted_run(Module& module, const std::vector<EValue>& inputs) {
  return module.forward(inputs).ok();
}

int main(int count, char** words) {
  if (count < 3) return 2;
  if (count > 3 && dlopen(words[3], RTLD_NOW | RTLD_GLOBAL) == nullptr) return std::fputs(dlerror(), stderr), 2;
  const executorch::extension::threadpool::NoThreadPoolGuard no_threads;
  edgedyn::driver::JobFile jobs(words[2]);
  edgedyn::driver::Job job;
  if (!jobs.Next(job)) return 2;
  std::vector<std::unique_ptr<Held>> held;
  std::vector<EValue> inputs;
  for (const auto& value : job.values) {
    held.push_back(std::make_unique<Held>(*value.tensor));
    inputs.emplace_back(executorch::aten::Tensor(held.back()->impl.get()));
  }
  Module module(words[1]);
  return module.forward(inputs).ok() && edgedyn_counted_run(module, inputs) ? 0 : 1;
}
