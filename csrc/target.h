// The namespace of everything that is compiled more than once.
//
// cpu/kernels.cpp is compiled once per instruction set. The linker merges inline functions and template instances that
// have the same name in two object files, and keeps any one of them. If it kept the AVX-512 copy, a machine without
// AVX-512 would crash in a function of its own instruction set's kernels. So formats, rules and the driver are in
// `namespace onepass::inline ONEPASS_TARGET`, named after the instruction set. tests/cpp/no_leak.cmake checks the
// objects.
#pragma once

#ifndef ONEPASS_TARGET
#define ONEPASS_TARGET portable
#endif

// ONEPASS_INLINE: a function of the inner loop, which must be inlined for the loop around it to be vectorized.
// ONEPASS_SETUP: a function that computes the constants of a step. A GPU runs it, too, if it counts the steps itself.
#ifdef __CUDACC__
#define ONEPASS_INLINE __host__ __device__ __forceinline__
#define ONEPASS_SETUP __host__ __device__
#else
#define ONEPASS_INLINE [[gnu::always_inline]] inline
#define ONEPASS_SETUP
#endif
