// 8-bit states outside of a step: conversion between float32 tensors and blocks.
#pragma once

#include <pybind11/pybind11.h>

namespace onepass {

// Adds `decode_blocks` and `encode_blocks` to the module.
void bind_blocks(pybind11::module_& m);

}  // namespace onepass
