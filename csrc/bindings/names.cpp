#include "bindings/names.h"

namespace py = pybind11;

namespace onepass {

py::str interned(const std::string& text) {
  return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text.c_str()));
}

const Names& names() {
  static const Names* const kNames = new Names{
      .state = interned("state"),
      .param_groups = interned("param_groups"),
      .params = interned("params"),
      .maximize = interned("maximize"),
      .differentiable = interned("differentiable"),
      .param_names = interned("param_names"),
      .step = interned("step"),
      .master = interned("master"),
      .master_low = interned("master_low"),
      .version = interned("_version"),
      .rounding_seed = interned("rounding_seed"),
      .stochastic_rounding = interned("stochastic_rounding"),
  };  // never destroyed, because Python may be finalized before
  return *kNames;
}

}  // namespace onepass
