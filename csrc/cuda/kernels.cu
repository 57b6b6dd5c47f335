// The kernels of all rules, compiled once for each arithmetic type, ONEPASS_REAL: float or double (see
// cmake/cuda.cmake).
#include "cuda/kernel.h"
#include "cuda/kernels.h"
#include "rules/all.h"

namespace onepass::inline ONEPASS_TARGET {

// Blocks for each multiprocessor, so that the loops have enough registers. 1024 threads that each load 16 bytes of each
// operand saturate the memory. Doubles need twice the registers, so they have half the blocks.
template <class T>
inline constexpr int kBlocksPerMultiprocessor = sizeof(T) == sizeof(float) ? 4 : 2;

template <class Rule, class T, class TableType>
__global__ void __launch_bounds__(cuda::kThreads, kBlocksPerMultiprocessor<T>)
    step_kernel(const __grid_constant__ TableType table) {
  step_chunk<Rule, T>(table, blockIdx.x, threadIdx.x);
}

template <class Rule, class T, class TableType>
__global__ void __launch_bounds__(cuda::kThreads) prepare_kernel(const __grid_constant__ TableType table) {
  prepare_row<Rule, T>(table, blockIdx.x * cuda::kThreads + threadIdx.x);
}

template <class Rule, class T, class TableType>
cuda::Pair pair_of() {
  if constexpr (requires { requires !Rule::takes_dense; }) {
    return {};  // a rule for sparse gradients only, which have no CUDA kernels
  } else {
    return {reinterpret_cast<const void*>(&prepare_kernel<Rule, T, TableType>),
            reinterpret_cast<const void*>(&step_kernel<Rule, T, TableType>)};
  }
}

}  // namespace onepass::inline ONEPASS_TARGET

namespace onepass::cuda {

template <>
const Kernels& kernels_of<ONEPASS_REAL>() {
  static const Kernels kKernels = {
#define ONEPASS_X(name, Type) pair_of<Type, ONEPASS_REAL, SmallTable>(),
      .small = {ONEPASS_RULES(ONEPASS_X)},
#undef ONEPASS_X
#define ONEPASS_X(name, Type) pair_of<Type, ONEPASS_REAL, LargeTable>(),
      .large = {ONEPASS_RULES(ONEPASS_X)},
#undef ONEPASS_X
  };
  return kKernels;
}

}  // namespace onepass::cuda
