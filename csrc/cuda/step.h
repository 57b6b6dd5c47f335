// A whole step on one GPU: packs its jobs into as few tables as possible, and launches them.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/backend.h"
#include "cuda/table.h"
#include "job.h"

namespace onepass::cuda {

// A number of a step: a value or, if `data` is not null, its address in the GPU's memory (as float32 or float64).
struct Number {
  double value = 0.0;
  const std::byte* data = nullptr;
  Format format = Format::float32;
};

// A job on a GPU. Its constants are in the job or, if some of its numbers are in the GPU's memory, made on the GPU.
struct DeviceJob {
  Job job;
  const std::array<Number, kMaxHyper>* hyper = nullptr;  // null: the constants are in the job
  std::array<Number, 1 + kMaxScalars> numbers{};         // the step count, and the rule's scalars
};

// GradScaler's two values in the GPU's memory: a float each, or null.
struct Scaler {
  const std::byte* grad_scale = nullptr;
  const std::byte* found_inf = nullptr;
};

// Returns the size in bytes of the constants that are made on the GPU.
std::size_t workspace_size(RuleId rule, std::span<const DeviceJob> jobs);

// Returns how many elements a block takes: as many as possible while every multiprocessor has enough blocks.
std::uint32_t chunk_length(std::int64_t elements, int multiprocessors);

// Steps all jobs on the calling thread's current device, whose index is `device`. `workspace` has workspace_size bytes,
// aligned to 8, and is not used otherwise before the work on the stream is done. Throws std::runtime_error if a launch
// fails.
void run_step(const Backend& backend, RuleId rule, std::span<const DeviceJob> jobs, const Scaler& scaler,
              std::byte* workspace, int device, void* stream);

}  // namespace onepass::cuda
