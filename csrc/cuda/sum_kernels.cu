// The kernels of rules whose update depends on sums over its tensor, compiled once for each arithmetic type,
// ONEPASS_REAL: float or double (see cmake/cuda.cmake).
#include "cuda/kernels.h"
#include "cuda/sum_kernel.h"
#include "rules/all.h"

namespace onepass::inline ONEPASS_TARGET {

// Adds up each sum of all threads. Only the first thread gets the totals.
template <class Rule>
__device__ Sums<Rule> sums_of_block(const Sums<Rule>& own) {
  __shared__ double shared[Rule::sums][cuda::kThreads];
#pragma unroll
  for (std::size_t k = 0; k < Rule::sums; ++k) shared[k][threadIdx.x] = own.values[k];
  for (std::uint32_t distance = cuda::kThreads / 2; distance > 0; distance /= 2) {
    __syncthreads();
#pragma unroll
    for (std::size_t k = 0; k < Rule::sums; ++k)
      combine_pair(Measure::sum_of_squares, shared[k], threadIdx.x, distance);
  }
  Sums<Rule> totals;
  if (threadIdx.x == 0) {
#pragma unroll
    for (std::size_t k = 0; k < Rule::sums; ++k) totals.values[k] = shared[k][0];
  }
  return totals;
}

template <class Rule, class T>
__global__ void __launch_bounds__(cuda::kThreads, 2) sum_kernel(const __grid_constant__ cuda::LargeTable table) {
  const Sums<Rule> sums = sums_of_block(sum_chunk<Rule, T>(table, blockIdx.x, threadIdx.x));
  if (threadIdx.x == 0) write_sums(table, blockIdx.x, sums);
}

// Returns the sums of a row. Only the first thread gets them.
template <class Rule>
__device__ Sums<Rule> sums_of_row(const cuda::LargeTable& table, std::uint32_t row) {
  Sums<Rule> own;
#pragma unroll
  for (std::size_t k = 0; k < Rule::sums; ++k) own.values[k] = add_blocks<Rule>(table, row, k, threadIdx.x);
  return sums_of_block(own);
}

template <class Rule, class T>
__global__ void __launch_bounds__(cuda::kThreads) total_kernel(const __grid_constant__ cuda::LargeTable table) {
  const Sums<Rule> sums = sums_of_row<Rule>(table, blockIdx.x);
  if (threadIdx.x == 0) write_totals(table, blockIdx.x, sums);
}

template <class Rule, class T>
__global__ void __launch_bounds__(cuda::kThreads) complete_kernel(const __grid_constant__ cuda::LargeTable table) {
  const Sums<Rule> sums = sums_of_row<Rule>(table, blockIdx.x);
  if (threadIdx.x == 0) complete_row<Rule, T>(table, blockIdx.x, sums);
}

template <class Rule, class T>
cuda::SumKernels kernels_of_sums() {
  if constexpr (requires { Rule::sums; }) {
    return {reinterpret_cast<const void*>(&sum_kernel<Rule, T>), reinterpret_cast<const void*>(&total_kernel<Rule, T>),
            reinterpret_cast<const void*>(&complete_kernel<Rule, T>)};
  } else {
    return {};
  }
}

}  // namespace onepass::inline ONEPASS_TARGET

namespace onepass::cuda {

template <>
SumKernels sum_kernels_of<ONEPASS_REAL>(RuleId rule) {
  static const SumKernels kKernels[] = {
#define ONEPASS_X(name, Type) kernels_of_sums<Type, ONEPASS_REAL>(),
      ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
  };
  return kKernels[static_cast<int>(rule)];
}

}  // namespace onepass::cuda
