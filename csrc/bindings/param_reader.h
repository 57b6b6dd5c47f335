// Reads parameters: turns Python's tensors into jobs.
//
// Nothing about a tensor's memory is remembered. Its address, shape and format are read again at every step, so a step
// uses the current memory, whatever a user does to tensors between steps. Findings about memory (packed, shared, not
// lazy) are kept with the addresses and strides that they were found for, and compared.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/dtensor.h"
#include "bindings/group_reader.h"
#include "bindings/rule_driver.h"
#include "bindings/step_work.h"
#include "overlap.h"

namespace onepass {

// What is remembered of a parameter between steps.
struct Param {
  PyObject* object = nullptr;  // borrowed, only compared
  PyObject* state = nullptr;   // its dict in optimizer.state; null if it has none
  Group* group = nullptr;
  std::size_t index = 0;  // in its group
  bool fresh = false;     // its states have been created, but not stepped yet
  bool shared = false;    // another parameter's step writes to the same memory
  bool overlaps_itself = false;
  bool sparse = false;  // it has had a sparse gradient
  bool complex = false;
  unsigned followed = 0;     // the followers that the last step's job updates, a bit for each
  bool zeroed = false;       // the last step's job zeroes its gradient
  bool rounds = false;       // its job rounds with random bits
  unsigned states_used = 0;  // a bit for each
  Master master = Master::none;
  std::string reason;                // why torch's implementation steps it
  std::vector<std::int64_t> packed;  // the last shape and strides that were found to be packed
  // Memory that its step writes: begin and end of each operand, of `step`, of the rule's scalars, and of scales.
  std::array<std::pair<std::byte*, std::byte*>, kAllOperands + 1 + kMaxScalars + kMaxStates> written{};
  std::vector<std::pair<std::size_t, Spacing>> spacings;  // of those with gaps, which are few: index in `written`
  // Whether a tensor was found to be lazily negated or conjugated, and its address at that time.
  struct Laziness {
    PyObject* tensor = nullptr;
    std::byte* data = nullptr;
    bool lazy = false;
  };
  std::array<Laziness, kAllOperands> laziness{};
  Spread spread;  // of a DTensor

  // Returns a range of `written`.
  MemoryRange range(std::size_t slot, std::size_t owner) const;
};

// The keys of the states and scalars of a rule.
struct RuleNames {
  explicit RuleNames(const RuleInfo& info);

  std::vector<pybind11::str> states;
  std::vector<pybind11::str> scales;      // of states in blocks
  std::vector<std::string> state_labels;  // for messages
  std::vector<pybind11::str> scalars;     // `step`, if the rule counts, and its own
};

// Returns how often a tensor was changed in place; -1 if torch does not count it.
std::int64_t version_of(PyObject* tensor);

// The version at which the low bits of a parameter's master were valid, by id(parameter), for all optimizers. A
// parameter without an entry has valid low bits.
pybind11::dict& master_versions();
void remember_version(PyObject* param, std::int64_t version);
// Ends the entry of a parameter with the parameter. Called before the step, because memory may run out.
void forget_version_with(PyObject* param);
std::optional<std::int64_t> known_version(PyObject* param);

// Returns the key of the state that holds a parameter's master.
const pybind11::str& master_name(Master master);

struct Reading;

class ParamReader {
 public:
  ParamReader(const RuleNames& names, const RuleDriver& driver, GroupReader& groups, const StepRequest& request,
              const std::string& label, std::size_t first_param, StepWork& work);

  // Adds the gradient of parameter `number` to the work, in the form that kernels read. May run Python code.
  void resolve_gradient(Param& param, std::size_t number);

  enum class Outcome { no_gradient, job, missing_state, fallback };

  // Adds the parameter's job to the work. For a fallback, param.reason is the reason. Sets work.ran_python if Python
  // code had to run, which happens for tensors that are seen for the first time. Throws py::value_error if neither
  // kernels nor torch can step the parameter, and ZeroDivision. Sets `memory_moved` if the parameter's memory has
  // changed.
  Outcome read(Param& param, std::size_t number, bool& memory_moved);

  // Returns the GPU of the parameter that was read last; -1 if it is on none.
  int last_device() const { return last_device_; }

  // Returns why kernels cannot step a parameter, whatever its gradient and states; empty if they can.
  std::string unsupported_reason(Param& param, std::size_t number);

 private:
  std::string unsupported_reason(Reading& r) const;
  bool read_own(Reading& r);
  bool read_gradient(Reading& r);
  bool read_sparse_gradient(Reading& r);
  bool read_states(Reading& r);
  bool read_state(Reading& r, std::size_t operand, const pybind11::str& name, const std::string& what);
  bool read_scales(Reading& r, std::size_t operand, const std::string& what);
  bool read_master(Reading& r);
  bool read_user_follower(Reading& r, std::size_t follower);
  bool can_follow(Reading& r, std::size_t operand, PyObject* tensor);
  std::size_t scalars_of(const Param& param) const;
  bool read_scalars(Reading& r);
  bool read_scalar(Reading& r, const pybind11::str& name, Scalar& scalar);
  bool is_spread_as_param(Reading& r, std::size_t operand, PyObject* tensor, const std::string& what);
  bool is_lazy_now(Reading& r, std::size_t operand, PyObject* tensor);
  void set_operand(Reading& r, std::size_t operand, PyObject* tensor, const std::string& what);
  static void note_memory(Reading& r, bool& memory_moved);
  static void forget_memory(Param& param, bool& memory_moved);
  static bool gradient_overlaps(const Reading& r);
  bool choose_constants_device(Reading& r);
  static bool is_aligned(Reading& r);
  void set_clip_and_zeros(Reading& r) const;
  void measure_gradient(const Reading& r);
  void set_followers(Reading& r) const;
  bool set_rounding(Reading& r);
  void make_constants(Reading& r);
  void make_constants_here(Reading& r);
  std::size_t own_scalars() const;
  RuleScalars scalars_of_rule(const Reading& r) const;
  double step_of(const Reading& r) const;
  void check_divisors(const Param& param, double step, const RuleScalars& scalars) const;
  void add_job(Reading& r);
  std::string label_of(const Param& param) const;
  [[noreturn]] void fail(const Param& param, const std::string& what) const;

  const RuleNames& names_;
  const RuleDriver& driver_;
  const RuleInfo& info_;
  GroupReader& groups_;
  const StepRequest& request_;
  const std::string& label_;
  std::size_t first_param_;
  StepWork& work_;
  int last_device_ = -1;

  // The last constants, which parameters with equal hyperparameters, step and scalars share.
  struct MadeConstants {
    std::array<double, kMaxHyper> hyper;
    double step;
    RuleScalars scalars;
    RuleScalars advanced;  // after the step
    const void* constants;
  };
  std::array<MadeConstants, 2> made_{};  // in float32 and in float64
};

}  // namespace onepass
