// The kernels for rows that are rounded with random bits.
#include "cuda/kernels.h"
#include "cuda/stochastic_kernel.h"
#include "rules/all.h"

namespace onepass::inline ONEPASS_TARGET {

// Two blocks for each multiprocessor: with more, the kernels would have too few registers.
template <class Rule>
__global__ void __launch_bounds__(cuda::kThreads, 2) stochastic_kernel(const __grid_constant__ cuda::LargeTable table) {
  step_stochastic_chunk<Rule>(table, blockIdx.x, threadIdx.x);
}

template <class Rule>
const void* pointer_of() {
  if constexpr (!requires { requires !Rule::takes_dense; }) {
    return reinterpret_cast<const void*>(&stochastic_kernel<Rule>);
  } else {
    return nullptr;
  }
}

}  // namespace onepass::inline ONEPASS_TARGET

namespace onepass::cuda {

const void* stochastic_kernel_of(RuleId rule) {
  static const void* const kPointers[] = {
#define ONEPASS_X(name, Type) pointer_of<Type>(),
      ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
  };
  return kPointers[static_cast<int>(rule)];
}

}  // namespace onepass::cuda
