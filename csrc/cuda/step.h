// A whole step on one GPU: packs its jobs into as few tables as possible, and launches them.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "cuda/backend.h"
#include "cuda/table.h"
#include "job.h"
#include "norm.h"

namespace onepass::cuda {

// A number of a step: a value or, if `data` is not null, its address in the GPU's memory (as float32 or float64).
struct Number {
  double value = 0.0;
  const std::byte* data = nullptr;
  Format format = Format::float32;
};

// A job on a GPU. Its constants are in the job or, if some of its numbers are in the GPU's memory or if it takes sums,
// made on the GPU.
struct DeviceJob {
  Job job;
  const std::array<Number, kMaxHyper>* hyper = nullptr;  // null: the constants are in the job
  std::array<Number, 1 + kMaxScalars> numbers{};         // the step count, and the rule's scalars
};

// What a step depends on in the GPU's memory: GradScaler's two floats, and a DeviceClipping. Each may be null.
struct Inputs {
  const std::byte* grad_scale = nullptr;
  const std::byte* found_inf = nullptr;
  const std::byte* clipping = nullptr;
};

// Returns how many elements a block takes: as many as possible while every multiprocessor has enough blocks.
std::uint32_t chunk_length(std::int64_t elements, int multiprocessors);

// Returns the size in bytes of the constants that are made on the GPU, and of sums over tensors. The first totals_size
// bytes are the sums over shards (Job::whole): in the order of their jobs, as many doubles as the rule has sums.
std::size_t workspace_size(RuleId rule, std::span<const DeviceJob> jobs);
std::size_t totals_size(RuleId rule, std::span<const DeviceJob> jobs);

// Steps all jobs on the calling thread's current device, whose index is `device`. `workspace` has workspace_size bytes,
// aligned to 8, and is not used otherwise before the work on the stream is done. If there are sums over shards,
// `add_up_totals` is called when the work that computes them is on the stream. It replaces them by the sums over the
// whole tensors; if it throws, nothing has been written. Throws std::runtime_error if a launch fails.
void run_step(const Backend& backend, RuleId rule, std::span<const DeviceJob> jobs, const Inputs& inputs,
              std::byte* workspace, int device, void* stream, const std::function<void()>& add_up_totals = {});

// Returns the size in bytes of what `run_measures` writes: a double for each block.
std::size_t measures_size(const Backend& backend, std::span<const Job> gradients, int device);

// Measures gradients, which are jobs without other operands, and finds the DeviceClipping at `inputs.clipping`. The
// gradients' factor is `grad_factor`, over the scale of GradScaler. `measures` has measures_size bytes, aligned to 8.
// For the rest see run_step.
void run_measures(const Backend& backend, Measure what, std::span<const Job> gradients, const NormLimits& limits,
                  double grad_factor, const Inputs& inputs, std::byte* measures, int device, void* stream);

}  // namespace onepass::cuda
