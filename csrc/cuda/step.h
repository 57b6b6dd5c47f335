// A whole step on one GPU: its jobs, packed into as few tables as they fit, and launched.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/backend.h"
#include "cuda/table.h"
#include "job.h"

namespace onepass::cuda {

// A number of a step: a value or, with data, where it lies in the GPU's memory (as float32 or float64).
struct Number {
  double value = 0.0;
  const std::byte* data = nullptr;
  Format format = Format::float32;
};

// A job on a GPU. Its constants are the job's own or, where some of its numbers lie in the GPU's memory, made there.
struct DeviceJob {
  Job job;
  const std::array<Number, kMaxHyper>* hyper = nullptr;  // null: the job has its constants
  std::array<Number, 1 + kMaxScalars> numbers{};         // the steps made, and the rule's scalars
};

// What GradScaler leaves in the GPU's memory: a float each, or null.
struct Scaler {
  const std::byte* grad_scale = nullptr;
  const std::byte* found_inf = nullptr;
};

// Bytes that the constants take which are made on the GPU.
std::size_t workspace_size(RuleId rule, std::span<const DeviceJob> jobs);

// How many elements a block takes: as many as leave every multiprocessor enough blocks.
std::uint32_t chunk_length(std::int64_t elements, int multiprocessors);

// Steps all jobs, on the calling thread's current device, whose number is `device`. `workspace` is memory of
// workspace_size bytes, aligned to 8, which nobody else uses before the work on the stream has been done. Throws
// std::runtime_error if a launch fails.
void run_step(const Backend& backend, RuleId rule, std::span<const DeviceJob> jobs, const Scaler& scaler,
              std::byte* workspace, int device, void* stream);

}  // namespace onepass::cuda
