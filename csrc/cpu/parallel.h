// One loop over tasks for all threads of a call, in the floating-point mode of the contract.
#pragma once
#include <cfenv>
#include <cstdint>

namespace zo {

// torch.set_flush_denormal(True) would make subnormal weights vanish; the contract is plain IEEE 754.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&saved_); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;

 private:
  std::fenv_t saved_;
};

template <class Body>
void parallel_for(int64_t tasks, int threads, Body body) {
#pragma omp parallel num_threads(threads) if (tasks > 1 && threads > 1)
  {
    DefaultFloatingPoint ieee;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) body(task);
  }
}

}  // namespace zo
