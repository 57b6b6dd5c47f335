// The kernels that measure gradients and decide how the step depends on their norm.
#include "cuda/kernels.h"
#include "cuda/norm_kernel.h"

namespace onepass::inline ONEPASS_TARGET {

// Combines the measures of all threads. The first is then the block's.
__device__ void combine_block(Measure what, double* measures) {
  for (std::uint32_t distance = cuda::kThreads / 2; distance > 0; distance /= 2) {
    __syncthreads();
    combine_pair(what, measures, threadIdx.x, distance);
  }
}

template <Measure what, class T, class TableType>
__global__ void __launch_bounds__(cuda::kThreads) measure_kernel(const __grid_constant__ TableType table) {
  __shared__ double measures[cuda::kThreads];
  measures[threadIdx.x] = measure_chunk<what, T>(table, blockIdx.x, threadIdx.x);
  combine_block(what, measures);
  if (threadIdx.x == 0) at_address<double>(table.header.workspace)[blockIdx.x] = measures[0];
}

__global__ void __launch_bounds__(cuda::kThreads) decision_kernel(const __grid_constant__ cuda::Decision decision) {
  __shared__ double measures[cuda::kThreads];
  measures[threadIdx.x] = combine_measures(decision, threadIdx.x);
  combine_block(decision.what, measures);
  if (threadIdx.x == 0) decide(decision, measures[0]);
}

template <Measure what, class T, class TableType>
const void* measure_pointer() {
  return reinterpret_cast<const void*>(&measure_kernel<what, T, TableType>);
}

}  // namespace onepass::inline ONEPASS_TARGET

namespace onepass::cuda {

const NormKernels& norm_kernels() {
  constexpr auto squares = Measure::sum_of_squares;
  constexpr auto largest = Measure::largest_magnitude;
  static const NormKernels kKernels = {
      .small = {{measure_pointer<squares, float, SmallTable>(), measure_pointer<squares, double, SmallTable>()},
                {measure_pointer<largest, float, SmallTable>(), measure_pointer<largest, double, SmallTable>()}},
      .large = {{measure_pointer<squares, float, LargeTable>(), measure_pointer<squares, double, LargeTable>()},
                {measure_pointer<largest, float, LargeTable>(), measure_pointer<largest, double, LargeTable>()}},
      .decide = reinterpret_cast<const void*>(&decision_kernel),
  };
  return kKernels;
}

}  // namespace onepass::cuda
