// Compiled once for each instruction set, with ONEPASS_TARGET as its name (see CMakeLists.txt).
#include "cpu/kernels.h"

#include "cpu/driver.h"
#include "cpu/factored_driver.h"
#include "cpu/flat_kernels.h"
#include "cpu/followers.h"
#include "cpu/measure_kernels.h"
#include "cpu/scale_kernels.h"
#include "cpu/tensor_sums.h"
#include "rules/all.h"

namespace onepass::inline ONEPASS_TARGET {

template <class T>
constexpr KernelsOfType kKernelsOf = {
#define ONEPASS_X(name, Type) &run<Type, T>,
    {ONEPASS_RULES(ONEPASS_X)},
#undef ONEPASS_X
#define ONEPASS_X(name, Type) sums_kernel<Type, T>(),
    {ONEPASS_RULES(ONEPASS_X)},
#undef ONEPASS_X
    factored_kernels<T>(),      {&gather<T>, &distance<T>, &move<T>, &products<T>, &combine<T>}, &measure<T>, &scale<T>,
};

extern const KernelsOfType narrow_kernels;
const KernelsOfType narrow_kernels = kKernelsOf<float>;
#ifndef ONEPASS_NARROW_ONLY
extern const KernelsOfType wide_kernels;
const KernelsOfType wide_kernels = kKernelsOf<double>;
#endif

}  // namespace onepass::inline ONEPASS_TARGET
