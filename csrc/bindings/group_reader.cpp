#include "bindings/group_reader.h"

#include <algorithm>

#include "bindings/names.h"
#include "bindings/torch.h"

namespace py = pybind11;

namespace onepass {
namespace {

bool is_sequence(PyObject* object) { return PyList_Check(object) != 0 || PyTuple_Check(object) != 0; }

// Returns the list of parameters if the dict holds the same objects that the group was read from; else null.
PyObject* params_if_unchanged(const Group& group, PyObject* dict) {
  if (group.dict != dict || group.has_mutable_values) return nullptr;
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  PyObject* params = nullptr;
  auto item = group.items.begin();
  while (PyDict_Next(dict, &position, &key, &value) != 0) {
    if (key == names().params.ptr() && is_sequence(value)) {
      params = value;
    } else {
      if (item == group.items.end() || item->first.ptr() != key || item->second.ptr() != value) return nullptr;
      ++item;
    }
  }
  return item == group.items.end() ? params : nullptr;
}

// Reads a hyperparameter that is one float on a GPU, the same GPU as others of its group. Returns false if it is not.
bool read_device_number(PyObject* value, cuda::Number& number, int& device) {
  TensorView view;
  if (!is_plain(value) || !torch().dlpack.view(value, view) || view.cuda < 0 || !is_one_float(view) ||
      is_lazy(value, false) || (device >= 0 && device != view.cuda))
    return false;
  number = {.data = view.data, .format = *view.format};
  device = view.cuda;
  return true;
}

// Whether an object is immutable, so that the same object has the same value.
bool is_constant(PyObject* value) { return PyFloat_CheckExact(value) || PyLong_Check(value) || value == Py_None; }

// Reads a flag; false if it is missing. A flag that is not a bool, such as a tensor, may change in place.
bool read_flag(const py::dict& dict, const py::str& key, bool& mutable_value) {
  const auto value = py::reinterpret_borrow<py::object>(lookup(dict.ptr(), key));
  if (value && !is_constant(value.ptr())) mutable_value = true;
  const int answer = value ? PyObject_IsTrue(value.ptr()) : 0;
  if (answer < 0) throw py::error_already_set();
  return answer == 1;
}

// Returns type and value, for a message.
std::string described(const py::object& value) {
  return "the " + type_name(value.ptr()) + " " + std::string(py::repr(value));
}

std::string group_label(const std::string& label, const Group& group) {
  return label + ": group " + std::to_string(group.index);
}

// Returns the kind of master that a group asks for.
Master read_master(const py::dict& dict, const std::string& label) {
  PyObject* const value = lookup(dict.ptr(), names().master);
  if (value == nullptr || value == Py_None) return Master::none;
  if (PyUnicode_Check(value) != 0 && PyUnicode_CompareWithASCIIString(value, "float32") == 0) return Master::whole;
  if (PyUnicode_Check(value) != 0 && PyUnicode_CompareWithASCIIString(value, "split") == 0) return Master::low_bits;
  throw py::value_error(label + ": master must be \"split\", \"float32\" or None, got " +
                        described(py::reinterpret_borrow<py::object>(value)));
}

// Returns the seed of the random bits, an int >= 0; 0 if the group does not have it.
std::uint64_t read_seed(const py::dict& dict, const std::string& label) {
  PyObject* const value = lookup(dict.ptr(), names().rounding_seed);
  if (value == nullptr || value == Py_None) return 0;
  const std::uint64_t seed = PyLong_Check(value) != 0 ? PyLong_AsUnsignedLongLong(value) : ~std::uint64_t{0};
  if (PyLong_Check(value) == 0 || PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::value_error(label + ": rounding_seed must be an int >= 0 and below 2^64, got " +
                          described(py::reinterpret_borrow<py::object>(value)));
  }
  return seed;
}

}  // namespace

GroupReader::GroupReader(const RuleInfo& info) : info_(info) {
  for (std::string name : info.hyper_names) {
    const bool optional = name.ends_with('?');
    const bool flag = name.ends_with('!');
    if (optional || flag) name.pop_back();
    const auto bracket = name.find('[');
    const int index = bracket == std::string::npos ? -1 : std::stoi(name.substr(bracket + 1));
    hyper_names_.push_back(
        {.key = interned(name.substr(0, bracket)), .index = index, .optional = optional, .flag = flag});
  }
  for (HyperName& name : hyper_names_)
    name.count = static_cast<int>(
        std::ranges::count_if(hyper_names_, [&](const HyperName& other) { return other.key.is(name.key); }));
}

std::string GroupReader::HyperName::text() const {
  return std::string(key) + (index < 0 ? "" : "[" + std::to_string(index) + "]");
}

bool GroupReader::resize(std::size_t count) {
  if (groups_.size() == count) return false;
  groups_.clear();
  groups_.resize(count);
  return true;
}

py::object GroupReader::read(std::size_t index, const py::dict& dict, const std::string& label) {
  Group& group = groups_[index];
  if (PyObject* params = params_if_unchanged(group, dict.ptr()); params != nullptr)
    return py::reinterpret_borrow<py::object>(params);

  group = Group{};  // if reading throws, the group is read again at the next step
  group.index = index;
  read_values(group, dict, label);
  auto params = py::reinterpret_borrow<py::object>(lookup(dict.ptr(), names().params));
  if (!params || PySequence_Check(params.ptr()) == 0)
    throw py::type_error(group_label(label, group) + " has no list of params");
  if (!is_sequence(params.ptr())) {  // a ParameterList, a deque
    group.has_mutable_values = true;
    params = py::reinterpret_steal<py::object>(PySequence_List(params.ptr()));
    if (!params) throw py::error_already_set();
  }
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  while (PyDict_Next(dict.ptr(), &position, &key, &value) != 0)
    if (key != names().params.ptr())
      group.items.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
  group.dict = dict.ptr();
  return params;
}

void GroupReader::read_values(Group& group, const py::dict& dict, const std::string& label) const {
  group.has_mutable_values = false;
  for (std::size_t h = 0; h < hyper_names_.size(); ++h) {
    const HyperName& name = hyper_names_[h];
    cuda::Number& on_device = group.device_hyper[h];
    auto value = py::reinterpret_borrow<py::object>(lookup(dict.ptr(), name.key));
    if (!value && name.optional) {
      group.hyper[h] = on_device.value = -1.0;
      continue;
    }
    if (!value) throw py::key_error(group_label(label, group) + " has no " + std::string(name.key));
    if (name.index >= 0) value = element(group, value, name, label);
    group.hyper[h] = read_value(group, value, name, on_device, label);
    on_device.value = group.hyper[h];
  }
  group.sign = read_flag(dict, names().maximize, group.has_mutable_values) ? -1.0 : 1.0;
  group.master = read_master(dict, group_label(label, group));
  group.stochastic_rounding = read_flag(dict, names().stochastic_rounding, group.has_mutable_values);
  group.rounding_seed = read_seed(dict, group_label(label, group));
  group.differentiable = read_flag(dict, names().differentiable, group.has_mutable_values);
  group.states_used = info_.states_used(group.hyper.data());
  group.takes_sparse = info_.takes_sparse(group.hyper.data());
  group.takes_sums = info_.takes_sums(group.hyper.data());
}

py::object GroupReader::element(Group& group, const py::object& sequence, const HyperName& name,
                                const std::string& label) const {
  if (!PyTuple_CheckExact(sequence.ptr())) group.has_mutable_values = true;
  const bool is_text = PyUnicode_Check(sequence.ptr()) != 0;
  const Py_ssize_t size = is_text || PySequence_Check(sequence.ptr()) == 0 ? -1 : PySequence_Size(sequence.ptr());
  if (size < 0) PyErr_Clear();  // it has no length
  if (size != name.count) {
    const std::string message = group_label(label, group) + ": " + std::string(name.key) + " must be " +
                                std::to_string(name.count) + " numbers, got " + described(sequence);
    if (size < 0) throw py::type_error(message);
    throw py::value_error(message);
  }
  auto found = py::reinterpret_steal<py::object>(PySequence_GetItem(sequence.ptr(), name.index));
  if (!found) throw py::error_already_set();
  return found;
}

double GroupReader::read_value(Group& group, const py::object& value, const HyperName& name, cuda::Number& on_device,
                               const std::string& label) const {
  if (value.is_none() && (name.optional || name.flag)) return name.flag ? 0.0 : -1.0;
  const auto what = [&] { return group_label(label, group) + ": " + name.text(); };
  py::object item = value;
  if (!is_constant(value.ptr())) {
    group.has_mutable_values = true;
    if (read_device_number(value.ptr(), on_device, group.device)) return 1.0;
    if (is_tensor(value.ptr()) && value.attr("numel")().cast<std::int64_t>() != 1)
      throw py::value_error(what() + " must be one number, got a tensor of shape " + shape_text(value));
    if (py::hasattr(value, "item")) item = value.attr("item")();
  }
  const double read = PyFloat_AsDouble(item.ptr());
  if (read == -1.0 && PyErr_Occurred() != nullptr) {
    const bool too_large = PyErr_ExceptionMatches(PyExc_OverflowError) != 0;
    PyErr_Clear();
    if (too_large)
      throw py::value_error(what() + " must fit a float, got an int of " +
                            std::string(py::str(item.attr("bit_length")())) + " bits");
    throw py::type_error(what() + " must be a number, got " + described(item));
  }
  return read;
}

void GroupReader::fetch_from_device(Group& group, const py::dict& dict) const {
  for (std::size_t h = 0; h < hyper_names_.size(); ++h) {
    cuda::Number& on_device = group.device_hyper[h];
    if (on_device.data == nullptr) continue;
    const HyperName& name = hyper_names_[h];
    py::object value = dict[name.key];
    if (name.index >= 0) value = value[py::int_(name.index)];
    group.hyper[h] = value.attr("item")().cast<double>();
    on_device = {.value = group.hyper[h]};
  }
  group.device = -1;
}

int GroupReader::traverse(visitproc visit, void* arg) const {
  for (const Group& group : groups_)
    for (const auto& [key, value] : group.items) {
      Py_VISIT(key.ptr());
      Py_VISIT(value.ptr());
    }
  return 0;
}

void GroupReader::clear() {
  for (Group& group : groups_) group = Group{};
}

}  // namespace onepass
