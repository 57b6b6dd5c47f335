// 8-bit states outside of a step: conversion between float32 tensors and blocks.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace onepass {

// Returns the key of the random bits of a parameter in a step (formats/microscaling.h).
std::uint64_t random_key(std::uint64_t seed, std::uint64_t step, std::uint64_t param);

// Adds `decode_blocks` and `encode_blocks` to the module.
void bind_blocks(pybind11::module_& m);

}  // namespace onepass
