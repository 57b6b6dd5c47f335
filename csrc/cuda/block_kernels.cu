// The kernels for rows with states in blocks.
#include "cuda/block_kernel.h"
#include "cuda/kernels.h"
#include "rules/all.h"

namespace onepass::inline ONEPASS_TARGET {

// Two blocks for each multiprocessor: with more, the kernels would have too few registers.
template <class Rule>
__global__ void __launch_bounds__(cuda::kThreads, 2) block_kernel(const __grid_constant__ cuda::LargeTable table) {
  step_chunk_in_blocks<Rule>(table, blockIdx.x, threadIdx.x);
}

template <class Rule>
const void* pointer_of() {
  if constexpr (has_codings<Rule> && !requires { requires !Rule::takes_dense; }) {
    return reinterpret_cast<const void*>(&block_kernel<Rule>);
  } else {
    return nullptr;
  }
}

}  // namespace onepass::inline ONEPASS_TARGET

namespace onepass::cuda {

const void* block_kernel_of(RuleId rule) {
  static const void* const kPointers[] = {
#define ONEPASS_X(name, Type) pointer_of<Type>(),
      ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
  };
  return kPointers[static_cast<int>(rule)];
}

}  // namespace onepass::cuda
