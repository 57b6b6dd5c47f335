// onepass._traffic: the loops of traffic.h, for the benchmarks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "traffic/traffic.h"

namespace py = pybind11;
using namespace onepass;

namespace {

float* floats_of(const py::handle& tensor, std::int64_t length, const py::handle& float32) {
  if (!py::object(tensor.attr("dtype")).is(float32) || !tensor.attr("is_cpu").cast<bool>() ||
      tensor.attr("dim")().cast<int>() != 1 || tensor.attr("numel")().cast<std::int64_t>() != length ||
      !tensor.attr("is_contiguous")().cast<bool>())
    throw py::value_error("add: every tensor of a row must be flat, contiguous, float32, on the CPU and of one length");
  return reinterpret_cast<float*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
}

float add(const std::string& name, const std::vector<py::list>& rows, int threads,
          const std::vector<py::list>& measured) {
  const Loop& loop = find_loop(name);
  const py::object float32 = py::module_::import("torch").attr("float32");
  if (threads < 1) throw py::value_error("add: threads must be >= 1, got " + std::to_string(threads));
  if (!measured.empty() && measured.size() != rows.size())
    throw py::value_error("add: measured must have a list for each row, got " + std::to_string(measured.size()));
  std::vector<Traffic> all;
  for (std::size_t number = 0; number < rows.size(); ++number) {
    const py::list& row = rows[number];
    if (row.size() < 2 || row.size() > 1 + kMaxUpdated)
      throw py::value_error("add: a row must have a tensor to read and 1 to " + std::to_string(kMaxUpdated) +
                            " tensors to update, got " + std::to_string(row.size()) + " tensors");
    Traffic one;
    one.length = row[0].attr("numel")().cast<std::int64_t>();
    one.read = floats_of(row[0], one.length, float32);
    for (std::size_t k = 1; k < row.size(); ++k) one.updated.push_back(floats_of(row[k], one.length, float32));
    if (!measured.empty()) {
      if (measured[number].size() > kMaxUpdated)
        throw py::value_error("add: a list of measured must have 0 to " + std::to_string(kMaxUpdated) +
                              " tensors, got " + std::to_string(measured[number].size()));
      for (const py::handle& tensor : measured[number]) one.measured.push_back(floats_of(tensor, one.length, float32));
    }
    all.push_back(std::move(one));
  }
  const py::gil_scoped_release release;
  return move_traffic(loop, all, threads);
}

}  // namespace

PYBIND11_MODULE(_traffic, m) {
  m.doc() = "Plain loops over the arrays of a step, the fastest of which is the limit in benchmarks.";
  m.def(
      "loops",
      [] {
        std::vector<std::string> names;
        for (const Loop& loop : loops()) names.emplace_back(loop.name);
        return names;
      },
      "Return the names of all loops.");
  m.def(
      "add", &add, py::arg("loop"), py::arg("tensors"), py::arg("threads"), py::arg("measured") = py::list(),
      "Add the first tensor of each row to the others, by this loop. The 2 to 7 tensors of a row are flat, contiguous, "
      "float32, on the CPU and of one length. `measured`: for each row, 0 to 6 such tensors that the loop sums before "
      "it "
      "adds. Return their sum; 0 without them.");
}
