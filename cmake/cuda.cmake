# The module _cuda, of the package that ONEPASS_CUDA_PACKAGE names: onepass, or onepass_cuda for a wheel of its own
# (cuda/pyproject.toml).

set(ONEPASS_CUDA_PACKAGE onepass CACHE STRING "The Python package that has the CUDA kernels: onepass or onepass_cuda")

# Machine code of one device runs on all later devices of the same major version. For later major versions, the driver
# compiles the virtual code. The front end runs only once, because no newer instructions are used.
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[0-9]+" known "${known}")
function(onepass_known_devices)  # sets `devices` to those of the arguments that nvcc knows
  set(chosen "")
  foreach(device IN LISTS ARGN)
    if(device IN_LIST known)
      list(APPEND chosen ${device})
    endif()
  endforeach()
  set(devices ${chosen} PARENT_SCOPE)
endfunction()
onepass_known_devices(${cuda_devices})
if(NOT devices AND ONEPASS_CUDA_ARCH)
  message(FATAL_ERROR "onepass: nvcc ${CMAKE_CUDA_COMPILER_VERSION} does not know ONEPASS_CUDA_ARCH=${ONEPASS_CUDA_ARCH}")
elseif(NOT devices)
  onepass_known_devices(70 75 80 90 100 120)
  if(70 IN_LIST devices)
    list(REMOVE_ITEM devices 75)  # it runs the code of 70
  endif()
endif()
list(GET devices 0 oldest)
list(TRANSFORM devices PREPEND sm_)
list(JOIN devices "," codes)
list(JOIN devices " " names)
message(STATUS "onepass: CUDA kernels with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${names}")

# The same bits as on the CPU: no contraction, IEEE division and square root, denormals flushed.
set(flags -O3 --expt-relaxed-constexpr -fmad=false -ftz=true -prec-div=true -prec-sqrt=true
  "-gencode=arch=compute_${oldest},code=[${codes},compute_${oldest}]"
  -Xcompiler=-Wall,-Wextra,-Wshadow,-Wconversion,-Wno-unknown-pragmas)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
  list(APPEND flags --compress-mode=size)  # a few MB instead of 30; needs a driver of CUDA 12.4 or later
endif()
if(ONEPASS_WERROR)
  list(APPEND flags -Werror=all-warnings)
endif()

function(onepass_cuda_kernels name source)
  add_library(onepass_cuda_${name} OBJECT ${source})
  target_include_directories(onepass_cuda_${name} PRIVATE csrc)
  target_compile_definitions(onepass_cuda_${name} PRIVATE ONEPASS_TARGET=gpu ${ARGN})
  target_compile_options(onepass_cuda_${name} PRIVATE ${flags})
  set_target_properties(onepass_cuda_${name} PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
endfunction()
onepass_cuda_kernels(float csrc/cuda/kernels.cu ONEPASS_REAL=float)
onepass_cuda_kernels(double csrc/cuda/kernels.cu ONEPASS_REAL=double)
onepass_cuda_kernels(sums_float csrc/cuda/sum_kernels.cu ONEPASS_REAL=float)
onepass_cuda_kernels(sums_double csrc/cuda/sum_kernels.cu ONEPASS_REAL=double)
onepass_cuda_kernels(norm csrc/cuda/norm_kernels.cu)
onepass_cuda_kernels(stochastic csrc/cuda/stochastic_kernels.cu)

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module Development.SABIModule)
set(abi WITH_SOABI)
if(SKBUILD_SABI_VERSION)
  set(abi USE_SABI ${SKBUILD_SABI_VERSION} WITH_SOABI)
endif()
Python_add_library(_cuda MODULE ${abi} csrc/cuda/module.cpp $<TARGET_OBJECTS:onepass_cuda_float>
  $<TARGET_OBJECTS:onepass_cuda_double> $<TARGET_OBJECTS:onepass_cuda_sums_float>
  $<TARGET_OBJECTS:onepass_cuda_sums_double> $<TARGET_OBJECTS:onepass_cuda_norm>
  $<TARGET_OBJECTS:onepass_cuda_stochastic>)
target_include_directories(_cuda PRIVATE csrc)
target_compile_options(_cuda PRIVATE ${ONEPASS_WARNINGS})
target_compile_definitions(_cuda PRIVATE ONEPASS_VERSION="${SKBUILD_PROJECT_VERSION}" ONEPASS_CUDA_VERSION="${CUDAToolkit_VERSION}" ONEPASS_CUDA_DEVICES="${names}")
# The runtime is linked statically, and loads the driver when it is first used, so the module can be imported anywhere.
target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
install(TARGETS _cuda DESTINATION ${ONEPASS_CUDA_PACKAGE})
