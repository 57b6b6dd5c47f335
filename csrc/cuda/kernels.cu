// The kernels of all rules, compiled once for each arithmetic (see CMakeLists.txt): ONEPASS_REAL is float or double.
#include "cuda/kernel.h"
#include "cuda/kernels.h"
#include "rules/all.h"

namespace onepass::inline ONEPASS_TARGET {

// Blocks for each multiprocessor: what leaves the loops enough registers. 1024 threads with 16 bytes of each operand on
// their way are enough to keep the memory busy; of doubles, which need twice the registers, half as many.
template <class T>
inline constexpr int kBlocks = sizeof(T) == sizeof(float) ? 4 : 2;

template <class Rule, class T, class TableType>
__global__ void __launch_bounds__(cuda::kThreads, kBlocks<T>) step_kernel(const __grid_constant__ TableType table) {
  step_chunk<Rule, T>(table, blockIdx.x, threadIdx.x);
}

template <class Rule, class T, class TableType>
__global__ void __launch_bounds__(cuda::kThreads) prepare_kernel(const __grid_constant__ TableType table) {
  prepare_row<Rule, T>(table, blockIdx.x * cuda::kThreads + threadIdx.x);
}

template <class Rule, class T, class TableType>
cuda::Pair pair_of() {
  if constexpr (requires { requires !Rule::takes_dense; }) {
    return {};  // for the rows of sparse gradients alone, which have no kernel here
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
