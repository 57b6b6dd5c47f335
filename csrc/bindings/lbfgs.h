// L-BFGS on an optimizer's tensors: from Python's objects to the passes of cpu/flat.h.
//
// Where tensors lie is read again in every call. What is kept between calls is numbers (the division into groups), the
// products of the history beside the very pairs that they were computed for, and buffers.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings/flat_tensors.h"
#include "bindings/torch.h"
#include "cpu/flat.h"
#include "cpu/two_loop.h"

namespace onepass {

class Lbfgs {
 public:
  // A list of (group, index, reason) of the parameters that the kernels cannot take; empty if they take all.
  pybind11::list refusals(const pybind11::list& groups) const;

  // Begins a step on groups of parameters (a list of lists), each with its weight D. The kernels must take them all.
  void begin(const pybind11::list& groups, std::vector<double> weights, int threads);

  std::int64_t length() const { return flat_.length(); }

  // A flat vector that nobody else holds; what is in it is not defined. It is free again when the last reference to it,
  // other than ours, is gone, and so is the last other tensor in its memory (a view).
  pybind11::object buffer();

  // out = gradients (missing ones are zeros), or parameters. Returns the largest magnitude of each group, and
  // out . direction (0 if that is None).
  std::pair<std::vector<double>, double> gather(const pybind11::list& groups, bool gradients,
                                                const pybind11::object& out, const pybind11::object& direction);

  // parameters = x + step * direction. With `keep`, x is first overwritten with the parameters.
  void move(const pybind11::list& groups, const pybind11::object& x, const pybind11::object& direction, double step,
            bool keep);

  // Measures the new pair s = step * direction, y = gradient - previous, and appends it to the lists if its curvature
  // s.y is above 1e-10; of the older pairs, those beyond `size` are dropped. Returns 1 / s.y and s.y / y.Dy, or None if
  // the pair was not taken.
  pybind11::object update(pybind11::list all_y, pybind11::list all_s, const pybind11::object& gradient,
                          const pybind11::object& previous, const pybind11::object& direction, double step,
                          std::size_t size);

  struct Direction {
    double slope, norm, largest;  // gradient . out, sum and maximum of |out|
    std::vector<double> alpha;
  };

  // out = -H gradient, for the gradient that `update` has seen last, or -D gradient if the lists are empty.
  Direction direction(const pybind11::list& all_y, const pybind11::list& all_s, const pybind11::object& gradient,
                      const pybind11::object& out);

 private:
  struct Tensors : FlatTensors {
    std::vector<pybind11::object> gradients;  // held for as long as they are read
  };

  struct HeldPair {
    pybind11::object y, s;
    std::int64_t y_version, s_version;
  };

  static std::vector<Format> formats_of(const Tensors& tensors);
  static Tensors read(const pybind11::list& groups, bool gradients);
  Tensors read_again(const pybind11::list& groups, bool gradients) const;
  Operand vector(const pybind11::handle& tensor, const std::string& what) const;
  std::vector<Pair> pairs(const pybind11::list& all_y, const pybind11::list& all_s) const;
  bool knows(const pybind11::list& all_y, const pybind11::list& all_s) const;
  void learn(const pybind11::list& all_y, const pybind11::list& all_s);
  void hold(const pybind11::handle& y, const pybind11::handle& s);

  Flat flat_;
  Format format_ = Format::float32;  // of a new buffer
  std::vector<Format> formats_;      // of the parameters
  std::vector<double> weights_;

  struct Buffer {
    pybind11::object tensor;
    pybind11::object storage;
    std::int64_t users;  // of the storage, where the tensor is the only one in it

    bool is_free() const;
  };
  std::vector<Buffer> buffers_;

  History history_;
  std::vector<HeldPair> held_;
  Found found_;            // by the last update: the products with the gradient
  std::size_t first_ = 0;  // in which the history's oldest pair has this place
};

void define_lbfgs(pybind11::module_& m);

}  // namespace onepass
