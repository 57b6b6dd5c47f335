// L-BFGS on an optimizer's tensors: turns Python's objects into the passes of cpu/flat.h.
//
// Addresses are read again in every call. Kept between calls are the division into groups, the products of the history
// with the pairs that they were computed for, and buffers.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings/flat_tensors.h"
#include "bindings/step_lock.h"
#include "bindings/torch.h"
#include "cpu/flat.h"
#include "cpu/two_loop.h"

namespace onepass {

class Lbfgs {
 public:
  // Locked during a whole step, which is several calls.
  StepMutex& mutex() { return mutex_; }

  // Returns a list of (group, index, reason) of the parameters that the kernels cannot step.
  pybind11::list refusals(const pybind11::list& groups) const;

  // Begins a step on groups of parameters (a list of lists), each with its weight D. `refusals` must be empty for them.
  void begin(const pybind11::list& groups, std::vector<double> weights, int threads);

  std::int64_t length() const { return flat_.length(); }

  // Returns a flat vector to which there is no other reference. Its values are not defined. It is free again when all
  // other references to it and all other tensors in its memory (views) are gone.
  pybind11::object buffer();

  // Sets out = gradients (zeros where one is missing), or parameters. Returns the largest magnitude of each group, and
  // out . direction (0 if the direction is None).
  std::pair<std::vector<double>, double> gather(const pybind11::list& groups, bool gradients,
                                                const pybind11::object& out, const pybind11::object& direction);

  // Sets parameters = x + step * direction. With `keep`, x is first overwritten with the parameters.
  void move(const pybind11::list& groups, const pybind11::object& x, const pybind11::object& direction, double step,
            bool keep);

  // Computes the new pair s = step * direction, y = gradient - previous, and appends it to the lists if its curvature
  // s.y is above 1e-10. The oldest pairs beyond `size` are dropped. Returns 1 / s.y and s.y / y.Dy, or None if the pair
  // was not added.
  pybind11::object update(pybind11::list list_y, pybind11::list list_s, const pybind11::object& gradient,
                          const pybind11::object& previous, const pybind11::object& direction, double step,
                          std::size_t size);

  struct Direction {
    double slope, norm, largest;  // gradient . out, sum and maximum of |out|
    std::vector<double> alpha;
  };

  // Sets out = -H gradient, for the gradient of the last `update`, or -D gradient if the lists are empty.
  Direction direction(const pybind11::list& list_y, const pybind11::list& list_s, const pybind11::object& gradient,
                      const pybind11::object& out);

 private:
  // Parameters or their gradients as kernels read them, before their addresses are read.
  struct Readable {
    std::vector<pybind11::object> params;                     // of all groups
    std::vector<pybind11::object> tensors;                    // the same, or their gradients; None: no gradient
    std::vector<std::pair<std::size_t, std::size_t>> places;  // group and index of each
    std::size_t groups = 0;
  };

  struct HeldPair {
    pybind11::object y, s;
    std::int64_t y_version, s_version;
  };

  using Objects = std::vector<pybind11::object>;

  // These may run Python code.
  static Readable prepare(const pybind11::list& groups, bool gradients);
  static void check_vectors(const Objects& vectors, const std::string& what);

  // From these on, no Python code runs until the pass has been run.
  static FlatTensors locate(const Readable& readable);
  FlatTensors locate_again(const Readable& readable, bool gradients) const;
  Operand vector(const pybind11::handle& tensor, const std::string& what) const;
  std::vector<Pair> pairs(const Objects& all_y, const Objects& all_s) const;
  template <class Pass>
  Found run_pass(const Pass& pass, std::vector<PyObject*> used) const;

  static std::vector<Format> formats_of(const FlatTensors& tensors);
  bool knows(const Objects& all_y, const Objects& all_s) const;
  void learn(const Objects& all_y, const Objects& all_s);
  void hold(const pybind11::object& y, const pybind11::object& s);

  Flat flat_;
  Format format_ = Format::float32;  // of a new buffer
  std::vector<Format> formats_;      // of the parameters
  std::vector<double> weights_;

  struct Buffer {
    pybind11::object tensor;
    pybind11::object storage;
    std::int64_t users;  // reference count of the storage while only this tensor uses it

    bool is_free() const;
  };
  std::vector<Buffer> buffers_;

  History history_;
  std::vector<HeldPair> held_;
  Found found_;            // result of the last update: the products with the gradient
  std::size_t first_ = 0;  // index in found_ of the history's oldest pair

  StepMutex mutex_;
};

void define_lbfgs(pybind11::module_& m);

}  // namespace onepass
