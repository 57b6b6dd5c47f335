// The namespace that everything compiled more than once lives in.
//
// cpu/kernels.cpp is compiled once per instruction set. Inline functions and template instances with the same name
// in two object files are merged by the linker, which keeps any one of them: were the AVX-512 copy kept, a machine
// without AVX-512 would crash in code that looks like its own. So formats, rules and the driver stand in `namespace
// onepass::inline ONEPASS_TARGET`, which is named after the instruction set. tests/cpp/no_leak.cmake holds the objects
// to it.
#pragma once

#ifndef ONEPASS_TARGET
#define ONEPASS_TARGET portable
#endif

// A function of the inner loop: it must be inlined for the loop around it to be vectorised. And one that prepares a
// step, which a GPU does, too, where it counts the steps itself.
#ifdef __CUDACC__
#define ONEPASS_INLINE __host__ __device__ __forceinline__
#define ONEPASS_SETUP __host__ __device__
#else
#define ONEPASS_INLINE [[gnu::always_inline]] inline
#define ONEPASS_SETUP
#endif
