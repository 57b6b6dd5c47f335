// One optimizer's step, from its Python objects to the jobs of the core.
//
// The rule of this file: nothing about a tensor's memory is remembered. Where a tensor lies, its shape and its format
// are read again at every step, so whatever a user does to tensors between steps, a step works on what is there now.
// What is kept is what can be checked by comparing: which dict holds whose state, what the numbers in a parameter group
// were, and findings about memory (packed, shared, negated) beside the very addresses and strides they were found for.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "bindings/torch.h"
#include "cpu/rows.h"
#include "cuda/step.h"
#include "job.h"
#include "rules/table.h"

namespace onepass {

// How many tensors have been stepped since import: by the kernels, and by torch's own code for each reason.
struct Stats {
  std::map<std::string, std::uint64_t> kernel{{"cpu", 0}, {"cuda", 0}};
  std::map<std::string, std::uint64_t> torch;
};
Stats& stats();

class Plan {
 public:
  // Throws std::invalid_argument if there is no such rule.
  explicit Plan(const std::string& rule);
  virtual ~Plan();

  // Reads the optimizer, checks everything, creates missing states, and steps all parameters. Returns None, or, with
  // nothing done, a list of (group, index, reason) of parameters that need torch's own code. When that has stepped
  // them, `finish` steps the rest. On an exception nothing has been written.
  //
  // Under Lookahead each parameter has slow weights as one more state. `blend` is given in the last step of a cycle:
  // how far they then go towards the parameter.
  //
  // Where GradScaler's two numbers lie in a GPU's memory, they may be given as they are (each a tensor or None) to
  // steps that are made and counted on that GPU alone; for any other step the answer is NotImplemented, with nothing
  // done.
  pybind11::object step(const pybind11::object& optimizer, double grad_factor, int threads, bool slow,
                        std::optional<double> blend, const pybind11::object& grad_scale,
                        const pybind11::object& found_inf);
  void finish(const pybind11::object& optimizer, double grad_factor, int threads, bool slow,
              std::optional<double> blend);

  // The parameters whose slow weights the last step has not moved: those without gradients and those of torch's code.
  pybind11::list unblended(const pybind11::object& optimizer);

  // What `step` would do, as (group, index, path, reason) for each parameter; path is "kernel", "torch" or "error".
  pybind11::list explain(const pybind11::object& optimizer);

 protected:
  // What an optimizer that is not element-wise does otherwise. A state that is not of the parameter's shape has as many
  // dimensions.
  explicit Plan(const RuleInfo& info);
  virtual std::string declines(const TensorView& param) const;  // why torch has to step it; empty if it need not
  virtual bool runs_on_cuda() const;
  virtual bool takes_shards() const;  // whether what a process holds of a DTensor can be stepped without the rest
  virtual unsigned states_of(unsigned used, const TensorView& param) const;
  virtual bool fits(std::size_t operand, const TensorView& view, const TensorView& param) const;
  virtual bool blends() const;  // whether the driver moves slow weights
  // Tells the job, complete but for this, where the elements of its operands lie.
  virtual void place(Job& job, const std::array<TensorView, kMaxOperands>& views, bool flat);
  virtual void launch(std::span<const Job> jobs, int threads);
  virtual void clear();

  std::deque<Layout> layouts_;

 private:
  struct Group;
  struct Param;
  struct Reading;
  enum class Path { none, kernel, torch, missing };

  // A number that is kept for each parameter, and what it will be after the step.
  struct Number {
    std::byte* data = nullptr;
    Format format = Format::float32;
    double value = 0.0;
    PyObject* dict = nullptr;  // not a tensor but an int of Python's, under `step` in this dict (SparseAdam's)
    bool on_gpu = false;       // where only a kernel reads it
  };
  using Scalars = std::array<double, kMaxScalars>;

  void read_groups(const pybind11::object& optimizer);
  void read_group(Group& group, PyObject* dict, std::size_t index);
  void fetch_hyper(Group& group) const;
  void read_states(const pybind11::object& optimizer);
  void gather();
  std::string why_torch(Param& param, TensorView& view);
  Path read_param(Param& param, cuda::DeviceJob& device_job, int& device);
  bool divide_numbers(Reading& r, cuda::DeviceJob& device_job);
  static bool is_aligned(Reading& r);
  bool read_own(Reading& r);
  bool is_spread_as_own(Reading& r, std::size_t operand, PyObject* tensor, const std::string& what);
  bool read_gradient(Reading& r);
  bool read_sparse_gradient(Reading& r);
  bool read_states(Reading& r);
  bool read_state(Reading& r, std::size_t operand, const pybind11::object& name, const std::string& what);
  bool read_numbers(Reading& r);
  bool read_number(Reading& r, const pybind11::object& name, Number& number);
  void check_operand(Reading& r, std::size_t operand, PyObject* tensor, const std::string& what);
  void note_memory(Reading& r);
  void forget_memory(Param& param);
  static bool gradient_overlaps(Reading& r);
  bool divide_shared_memory();
  struct Memo;
  const Memo& prepare_step(const Group& group, double step, const Scalars& scalars, bool wide);
  void create_states(const pybind11::object& optimizer);
  void run(int threads);
  bool prepare(const pybind11::object& optimizer, bool torch_has_stepped, bool creates);
  bool takes_scaler(const TensorView& found_inf) const;
  [[noreturn]] void fail(const Param& param, const std::string& what) const;

  struct Ticket;  // holds the plan for one call of one thread
  struct Cleaner;

  RuleId rule_{};
  const RuleInfo& info_;
  std::string label_;  // the optimizer's class name, for messages

  struct HyperName {
    pybind11::object key;
    int index;      // of the element, where the value is a sequence; else -1
    bool optional;  // may be None or missing, which is read as -1
  };
  std::vector<HyperName> hyper_names_;
  std::vector<pybind11::object> state_names_;
  std::vector<std::string> state_labels_;       // for messages
  std::vector<pybind11::object> number_names_;  // `step`, if it counts, and the rule's scalars

  std::deque<Group> groups_;
  std::vector<Param> params_;
  std::vector<std::pair<PyObject*, PyObject*>> states_;  // optimizer.state as it was last walked
  bool states_moved_ = true;
  bool memory_moved_ = true;

  // This step's work, on the CPU and on each GPU.
  std::vector<Job> jobs_;
  std::map<int, std::vector<cuda::DeviceJob>> device_jobs_;
  cuda::Scaler scaler_;
  std::vector<std::size_t> job_params_;
  std::vector<Number> numbers_;
  std::vector<std::size_t> missing_;
  std::vector<std::size_t> torch_params_;
  std::vector<pybind11::object> held_;
  std::deque<Rows> rows_;
  struct Slot {
    alignas(64) std::byte bytes[kMaxConstantBytes];
  };
  std::deque<Slot> slots_;
  // What parameters of equal hyperparameters, steps and scalars share.
  struct Memo {
    std::array<double, kMaxHyper> hyper;
    double step;
    Scalars scalars;
    Scalars advanced;  // after the step
    const void* constants;
  };
  std::array<Memo, 2> memo_{};
  double grad_factor_ = 1.0;
  bool slow_ = false;
  std::optional<double> blend_;

  std::mutex mutex_;
  std::thread::id owner_;
};

}  // namespace onepass
