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

extern const Kernels kernels;
const Kernels kernels = {
#define ONEPASS_X(name, Type) &run<Type, float>,
    {ONEPASS_RULES(ONEPASS_X)},
#undef ONEPASS_X
#define ONEPASS_X(name, Type) &run<Type, double>,
    {ONEPASS_RULES(ONEPASS_X)},
#undef ONEPASS_X
#define ONEPASS_X(name, Type) sums_kernel<Type, float>(),
    {ONEPASS_RULES(ONEPASS_X)},
#undef ONEPASS_X
#define ONEPASS_X(name, Type) sums_kernel<Type, double>(),
    {ONEPASS_RULES(ONEPASS_X)},
#undef ONEPASS_X
    factored_kernels<float>(),
    factored_kernels<double>(),
    {&gather<float>, &distance<float>, &move<float>, &products<float>, &combine<float>},
    {&gather<double>, &distance<double>, &move<double>, &products<double>, &combine<double>},
    &measure<float>,
    &measure<double>,
    &scale<float>,
    &scale<double>,
};

}  // namespace onepass::inline ONEPASS_TARGET
