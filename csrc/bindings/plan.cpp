#include "bindings/plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <unordered_map>
#include <unordered_set>

#include "bindings/cuda.h"
#include "cpu/fpmode.h"
#include "cpu/step.h"
#include "layout.h"

namespace py = pybind11;

namespace onepass {
namespace {

Stats the_stats;

const std::string kGradLabel = "its gradient";
const std::string kSlowLabel = "its slow weights (slow_param)";

// Attribute and key names, made once.
struct Names {
  py::str state{"state"}, param_groups{"param_groups"}, params{"params"}, maximize{"maximize"},
      differentiable{"differentiable"}, param_names{"param_names"}, step{"step"}, slow_param{"slow_param"};
  Names() {
    for (py::str* name :
         {&state, &param_groups, &params, &maximize, &differentiable, &param_names, &step, &slow_param}) {
      PyObject* raw = name->release().ptr();
      PyUnicode_InternInPlace(&raw);
      *name = py::reinterpret_steal<py::str>(raw);
    }
  }
};

const Names& names() {
  static const Names* const kNames = new Names;  // never destroyed: Python may be gone by then
  return *kNames;
}

bool is_sequence(PyObject* object) { return PyList_Check(object) != 0 || PyTuple_Check(object) != 0; }

}  // namespace

Stats& stats() { return the_stats; }

struct Plan::Group {
  PyObject* dict = nullptr;    // borrowed, as all PyObject* here
  PyObject* params = nullptr;  // its list of parameters
  std::size_t index = 0;
  std::vector<std::pair<py::object, py::object>> items;  // what the dict held when it was read, but for `params`
  bool reread = true;  // a value is mutable (a tensor lr): its identity proves nothing
  std::array<double, kMaxHyper> hyper{};
  // The same with those that are tensors on a GPU, whose values are unknown here: 1 stands for them in `hyper`.
  std::array<cuda::Number, kMaxHyper> device_hyper{};
  int device = -1;  // the GPU that they are on; -1: there are none
  double sign = 1.0;
  bool differentiable = false;
  unsigned states_used = 0;  // a bit for each that parameters may have
  bool takes_sparse = false;
};

struct Plan::Param {
  PyObject* object = nullptr;
  PyObject* local = nullptr;  // what lies in memory: the object or, of a DTensor, what this process holds of it
  Group* group = nullptr;
  std::size_t index = 0;             // in its group
  PyObject* state = nullptr;         // its dict in optimizer.state; null if it has none
  bool fresh = false;                // its states have been created and not been stepped yet
  bool shared = false;               // another parameter's step writes to the same memory
  bool tangled = false;              // its own tensors overlap
  bool sparse = false;               // it has had a sparse gradient
  bool blended = false;              // the last step's job moves its slow weights
  std::string reason;                // why torch's code steps it
  unsigned states_used = 0;          // a bit for each
  std::vector<std::int64_t> packed;  // the last shape and strides that were found to be packed
  // Memory that it writes: first and past last byte, of each operand, the step counter and the scalars.
  std::array<std::pair<std::byte*, std::byte*>, kMaxOperands + 1 + kMaxScalars> written{};
  // Tensors that were found to mean what lies in their memory, and where that was.
  std::array<std::pair<PyObject*, std::byte*>, kMaxOperands> literal{};
  // Of a DTensor, how it is spread, and specs of its gradient and states that were found to say the same.
  std::array<py::object, kMaxOperands> specs{};

  bool is_shard() const { return local != object; }

  // Whether torch negates or conjugates the tensor lazily. Asked again when the object or its memory is another.
  bool is_lazy_now(std::size_t operand, PyObject* tensor, const TensorView& view) {
    const std::pair seen{tensor, view.data};
    if (literal[operand] == seen && !view.complex) return false;
    if (is_lazy(tensor, view)) return true;
    literal[operand] = seen;
    return false;
  }
};

// The plan in one thread's hands. Another thread waits, without the GIL, as it would for the step itself.
struct Plan::Ticket {
  explicit Ticket(Plan& plan) : plan_(plan) {
    if (plan.owner_ == std::this_thread::get_id()) throw std::runtime_error("step() was called from within step()");
    if (!plan.mutex_.try_lock()) {
      const py::gil_scoped_release release;
      plan.mutex_.lock();
    }
    plan.owner_ = std::this_thread::get_id();
  }
  ~Ticket() {
    plan_.owner_ = {};
    plan_.mutex_.unlock();
  }
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;

 private:
  Plan& plan_;
};

// Lets go of gradients and addresses when a call ends, however it ends.
struct Plan::Cleaner {
  Plan& plan;
  ~Cleaner() { plan.clear(); }
};

namespace {

py::object interned(const std::string& text) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text.c_str()));
}

}  // namespace

Plan::Plan(const std::string& rule) : Plan(info_of(find_rule(rule))) { rule_ = find_rule(rule); }

Plan::Plan(const RuleInfo& info) : info_(info) {
  for (std::string name : info_.hyper_names) {
    const bool optional = name.ends_with('?');
    if (optional) name.pop_back();
    const auto bracket = name.find('[');
    if (bracket == std::string::npos) {
      hyper_names_.push_back({interned(name), -1, optional});
    } else {
      hyper_names_.push_back({interned(name.substr(0, bracket)), std::stoi(name.substr(bracket + 1)), optional});
    }
  }
  for (const std::string name : info_.state_names) {
    state_names_.push_back(interned(name));
    state_labels_.push_back("its state " + name);
  }
  if (info_.counts_steps) number_names_.push_back(names().step);
  for (const char* name : info_.scalar_names) number_names_.push_back(interned(name));
}

Plan::~Plan() = default;

void Plan::fail(const Param& param, const std::string& what) const {
  std::string message =
      label_ + ": parameter " + std::to_string(param.index) + " of group " + std::to_string(param.group->index);
  if (PyObject* listed = lookup(param.group->dict, names().param_names); listed != nullptr) {
    const py::list known(py::reinterpret_borrow<py::object>(listed));
    if (param.index < known.size()) message += " '" + std::string(py::str(known[param.index])) + "'";
  }
  message += " (shape " + std::string(py::str(py::list(py::handle(param.object).attr("shape")))) + ", " +
             text_of(param.object, "dtype") + "): " + what;
  throw py::value_error(message);
}

// -- groups: hyperparameters -----------------------------------------------------------------------------------------

void Plan::read_groups(const py::object& optimizer) {
  const py::object listed = attribute(optimizer.ptr(), names().param_groups);
  if (!PyList_Check(listed.ptr())) throw py::type_error(label_ + ": param_groups must be a list");
  const auto count = static_cast<std::size_t>(PyList_GET_SIZE(listed.ptr()));
  if (groups_.size() != count) {
    groups_.clear();
    groups_.resize(count);
    params_.clear();
  }
  std::size_t at = 0;
  for (std::size_t g = 0; g < count; ++g) {
    Group& group = groups_[g];
    PyObject* dict = PyList_GET_ITEM(listed.ptr(), static_cast<Py_ssize_t>(g));
    if (!PyDict_Check(dict)) throw py::type_error(label_ + ": a parameter group must be a dict");
    read_group(group, dict, g);
    const auto size = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(group.params));
    if (params_.size() < at + size) params_.resize(at + size);
    for (std::size_t i = 0; i < size; ++i, ++at) {
      PyObject* object = PySequence_Fast_GET_ITEM(group.params, static_cast<Py_ssize_t>(i));
      Param& param = params_[at];
      if (param.object == object && param.group == &group && param.index == i) continue;
      param = Param{};
      param.object = object;
      param.group = &group;
      param.index = i;
      states_moved_ = memory_moved_ = true;
    }
  }
  if (params_.size() != at) {
    params_.resize(at);
    states_moved_ = memory_moved_ = true;
  }
}

namespace {

// Whether a hyperparameter is one float on a GPU, the same one as others of its group.
bool read_device_number(PyObject* value, cuda::Number& number, int& device) {
  TensorView view;
  if (!is_plain(value) || !torch().dlpack.view(value, view) || view.cuda < 0 || view.complex ||
      (view.format != Format::float32 && view.format != Format::float64) ||
      !std::ranges::all_of(
          shape_of(view), [](std::int64_t size) { return size == 1; }) ||
      is_lazy(value, view) || (device >= 0 && device != view.cuda))
    return false;
  number = {.data = view.data, .format = *view.format};
  device = view.cuda;
  return true;
}

}  // namespace

// Numbers in a group are read only when the group holds other objects than at the last step: a schedule that sets
// group["lr"] puts a new float there, and comparing a dozen pointers is several times cheaper than reading them.
void Plan::read_group(Group& group, PyObject* dict, std::size_t index) {
  if (group.dict == dict && !group.reread) {
    Py_ssize_t position = 0;
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    auto item = group.items.begin();
    bool same = true;
    group.params = nullptr;
    while (same && PyDict_Next(dict, &position, &key, &value) != 0) {
      if (key == names().params.ptr() && is_sequence(value)) {
        group.params = value;
      } else {
        same = item != group.items.end() && item->first.ptr() == key && item->second.ptr() == value;
        if (same) ++item;
      }
    }
    if (same && item == group.items.end() && group.params != nullptr) return;
  }

  group = Group{};
  group.index = index;
  group.reread = false;
  const auto number = [&](const py::handle& key, PyObject* value, bool optional, cuda::Number& on_device) {
    if (optional && value == Py_None) return -1.0;
    py::object item;
    if (!PyFloat_CheckExact(value) && !PyLong_Check(value)) {  // a bool is a PyLong; anything else may change in place
      group.reread = true;
      if (read_device_number(value, on_device, group.device)) return 1.0;
      if (py::hasattr(value, "item")) {
        item = py::handle(value).attr("item")();
        value = item.ptr();
      }
    }
    const double read = PyFloat_AsDouble(value);
    if (read == -1.0 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      throw py::type_error(label_ + ": group " + std::to_string(index) + ": " + std::string(py::str(key)) +
                           " must be a number, but is a " + type_name(value));
    }
    return read;
  };
  for (std::size_t h = 0; h < hyper_names_.size(); ++h) {
    const auto& [key, element, optional] = hyper_names_[h];
    cuda::Number& on_device = group.device_hyper[h];
    PyObject* value = lookup(dict, key);
    if (value == nullptr && optional) {
      group.hyper[h] = on_device.value = -1.0;
      continue;
    }
    if (value == nullptr)
      throw py::key_error(label_ + ": group " + std::to_string(index) + " has no " + std::string(py::str(key)));
    if (element < 0) {
      group.hyper[h] = number(key, value, optional, on_device);
    } else {
      if (!PyTuple_CheckExact(value)) group.reread = true;
      const auto part = py::reinterpret_steal<py::object>(PySequence_GetItem(value, element));
      if (!part) throw py::error_already_set();
      group.hyper[h] = number(key, part.ptr(), optional, on_device);
    }
    on_device.value = group.hyper[h];
  }
  const auto flag = [&](const py::str& key) {
    PyObject* value = lookup(dict, key);
    const int answer = value == nullptr ? 0 : PyObject_IsTrue(value);
    if (answer < 0) throw py::error_already_set();
    return answer == 1;
  };
  group.sign = flag(names().maximize) ? -1.0 : 1.0;
  group.differentiable = flag(names().differentiable);
  group.states_used = info_.states_used(group.hyper.data());
  group.takes_sparse = info_.takes_sparse(group.hyper.data());
  group.params = lookup(dict, names().params);
  if (group.params == nullptr || !is_sequence(group.params))
    throw py::type_error(label_ + ": group " + std::to_string(index) + " has no list of params");

  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  while (PyDict_Next(dict, &position, &key, &value) != 0)
    if (value != group.params)
      group.items.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
  group.dict = dict;  // last, or a group that was refused would be recognised at the next step
}

// Reads the hyperparameters that are on a GPU, which waits for it: they are needed here.
void Plan::fetch_hyper(Group& group) const {
  for (std::size_t h = 0; h < hyper_names_.size(); ++h) {
    cuda::Number& on_device = group.device_hyper[h];
    if (on_device.data == nullptr) continue;
    const auto& [key, element, optional] = hyper_names_[h];
    py::object value = py::reinterpret_borrow<py::object>(lookup(group.dict, key));
    if (element >= 0) value = value[py::int_(element)];
    group.hyper[h] = value.attr("item")().cast<double>();
    on_device = {.value = group.hyper[h]};
  }
  group.device = -1;
}

// -- states: which dict belongs to which parameter -------------------------------------------------------------------

// Hashing a tensor runs Python code, so the dict is walked instead and compared with the last walk.
void Plan::read_states(const py::object& optimizer) {
  const py::object held = attribute(optimizer.ptr(), names().state);
  if (!PyDict_Check(held.ptr())) throw py::type_error(label_ + ": state must be a dict");
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  if (!states_moved_) {
    auto item = states_.begin();
    bool same = true;
    while (same && PyDict_Next(held.ptr(), &position, &key, &value) != 0) {
      same = item != states_.end() && item->first == key && item->second == value;
      if (same) ++item;
    }
    if (same && item == states_.end()) return;
  }
  states_moved_ = true;  // until all are read
  states_.clear();
  std::unordered_map<PyObject*, PyObject*> found;
  position = 0;
  while (PyDict_Next(held.ptr(), &position, &key, &value) != 0) {
    states_.emplace_back(key, value);
    found.emplace(key, value);
  }
  for (Param& param : params_) {
    const auto at = found.find(param.object);
    PyObject* const state = at == found.end() ? nullptr : at->second;
    if (param.state != nullptr && param.state != state) param.fresh = false;  // replaced or loaded
    param.state = state;
  }
  states_moved_ = false;
}

// -- tensors ---------------------------------------------------------------------------------------------------------

// Why the kernels cannot take a parameter, whatever its gradient and states; empty if they can.
std::string Plan::why_torch(Param& param, TensorView& view) {
  const bool plain = is_plain(param.object);
  const bool sharded = !plain && is_dtensor(param.object) && takes_shards();
  param.local = sharded ? held_.emplace_back(local_of(param.object)).ptr() : param.object;
  if (param.group->differentiable) return "differentiable=True";
  if (!plain && !sharded) return "tensor subclass " + type_name(param.object);
  if (!is_plain(param.local)) return "DTensor of a " + type_name(param.local);
  if (!torch().dlpack.view(param.local, view)) {
    if (py::handle(param.object).attr("is_meta").cast<bool>())
      fail(param, "it is on the meta device and has no memory; call to_empty() first");
    return "no strided memory";
  }
  if (!view.on_cpu && (view.cuda < 0 || !runs_on_cuda()))
    return "device " + py::str(py::handle(param.object).attr("device").attr("type")).cast<std::string>();
  if (view.cuda >= 0)
    if (const std::string why = cuda_refusal(view.cuda); !why.empty()) return "device cuda: " + why;
  if (!view.format) return "dtype " + text_of(param.object, "dtype");
  return declines(view);
}

// A parameter on its way into a job. The functions that read one say false, and why in param.reason, when torch's code
// has to take the parameter; what nobody can step, they refuse.
struct Plan::Reading {
  Param& param;
  Job& job;
  std::array<TensorView, kMaxOperands> views{};
  py::object grad;
  bool packed = false;   // the parameter's elements follow each other in memory, in some order of dimensions
  bool missing = false;  // a state has yet to be created
  std::array<Number, 1 + kMaxScalars> numbers{};  // in the order of number_names_

  TensorView& own() { return views[kParam]; }
  bool leave(std::string why) {
    param.reason = std::move(why);
    return false;
  }
  bool strides_as_own(std::size_t operand) { return same_numbers(views[operand].strides, own().strides, own().ndim); }
};

bool Plan::read_own(Reading& r) {
  Param& param = r.param;
  const TensorView& own = r.own();
  r.job = Job{};
  r.job.operands[kParam] = {own.data, *own.format};
  r.job.wide = *own.format == Format::float64;
  r.job.grad_factor = grad_factor_ * param.group->sign;
  if (param.is_shard())
    if (py::object spec = spec_of(param.object); !spec.is(param.specs[kParam])) {
      param.specs = {};
      param.specs[kParam] = std::move(spec);
    }
  r.job.length = 1;
  for (int d = 0; d < own.ndim; ++d) r.job.length *= own.shape[d];
  if (param.is_lazy_now(kParam, param.local, own)) return r.leave("negated or conjugated parameter");

  // Whether the parameter is packed is remembered with the very shape and strides that it was found for.
  const auto ndim = static_cast<std::size_t>(own.ndim);
  r.packed = param.packed.size() == 2 * ndim && same_numbers(param.packed.data(), own.shape, own.ndim) &&
             same_numbers(param.packed.data() + ndim, own.strides, own.ndim);
  if (r.packed) return true;
  param.packed.clear();
  const Overlap overlap = self_overlap(shape_of(own), strides_of(own));
  if (overlap == Overlap::certain) fail(param, "several of its elements share the same memory (it is expanded)");
  if (overlap == Overlap::possible) return r.leave("parameter with interleaved strides");
  r.packed = is_flat(make_layout(shape_of(own), {strides_of(own)}));
  if (r.packed) {
    param.packed.assign(own.shape, own.shape + own.ndim);
    param.packed.insert(param.packed.end(), own.strides, own.strides + own.ndim);
  }
  return true;
}

// Whether this process holds the same part of a gradient or state as of its parameter. One of another size is refused
// in every process alike, also where the parts happen to fit. Specs are compared once, and then recognised.
bool Plan::is_spread_as_own(Reading& r, std::size_t operand, PyObject* tensor, const std::string& what) {
  py::object spec = spec_of(tensor);
  py::object& known = r.param.specs[operand];
  if (spec.is(known) || spec.is(r.param.specs[kParam])) return true;
  const py::object shape = py::handle(tensor).attr("shape");
  if (!shape.equal(py::handle(r.param.object).attr("shape")))
    fail(r.param, what + " has shape " + std::string(py::str(py::list(shape))));
  if (!same_mesh(spec, r.param.specs[kParam])) fail(r.param, what + " is spread over another mesh");
  if (!same_placements(spec, r.param.specs[kParam])) return false;
  known = std::move(spec);
  return true;
}

bool Plan::read_gradient(Reading& r) {
  TensorView& view = r.views[kGrad];
  if (r.param.is_shard()) {
    if (!is_dtensor(r.grad.ptr())) {
      if (is_plain(r.grad.ptr()) && !passes_for_replicated(r.grad.ptr()))
        fail(r.param, kGradLabel + " is not a DTensor");
      return r.leave("gradient of a DTensor that is none itself");
    }
    if (!is_spread_as_own(r, kGrad, r.grad.ptr(), kGradLabel))
      return r.leave("DTensor whose gradient is placed otherwise");
    r.grad = local_of(r.grad.ptr());
  }
  const auto read = [&] {
    PyObject* grad = r.grad.ptr();
    if (!is_plain(grad)) return r.leave("tensor subclass " + type_name(grad));
    // An export that fails takes torch half a millisecond. So it is tried first only where it is likely to succeed.
    if ((r.param.sparse && is_sparse(grad)) || !torch().dlpack.view(grad, view)) {
      r.param.sparse = is_sparse(grad);
      return r.param.sparse ? read_sparse_gradient(r) : r.leave("gradient without strided memory");
    }
    if (!info_.takes_dense) return r.leave("dense gradient");
    if (same_device(view, r.own()) && !view.format) return r.leave("gradient of dtype " + text_of(grad, "dtype"));
    check_operand(r, kGrad, grad, kGradLabel);
    return true;
  };
  if (!read()) return false;
  if (is_lazy(r.grad.ptr(), view)) {
    r.grad = r.grad.attr("resolve_conj")().attr("resolve_neg")();
    return read();
  }
  return true;
}

// Of a sparse gradient, its values take the gradient's place in the job, which then is for some rows alone. They are
// sorted later, without the GIL; their indices are checked and copied now, and nothing depends on the tensor's claim to
// be coalesced.
bool Plan::read_sparse_gradient(Reading& r) {
  const TensorView& own = r.own();
  if (!r.param.group->takes_sparse) return r.leave("sparse gradient");
  if (!own.on_cpu) return r.leave("sparse gradient on a GPU");
  if (own.complex) return r.leave("sparse gradient of a complex parameter");
  if (!is_row_major(shape_of(own), strides_of(own)))
    return r.leave("sparse gradient of a parameter that is not contiguous");
  const py::list shape(r.grad.attr("shape"));
  if (!std::ranges::equal(shape, shape_of(own), {}, [](py::handle size) { return size.cast<std::int64_t>(); }))
    fail(r.param, kGradLabel + " has shape " + std::string(py::str(shape)));

  const py::object listed = indices_of(r.grad.ptr());
  r.grad = values_of(r.grad.ptr());
  TensorView& view = r.views[kGrad];
  const auto read = [&] { return is_plain(r.grad.ptr()) && torch().dlpack.view(r.grad.ptr(), view); };
  if (!read()) return r.leave("sparse gradient without strided memory");
  if (!view.on_cpu)
    fail(r.param, kGradLabel + " is on device " + text_of(r.grad.ptr(), "device") + ", not on the parameter's");
  if (!view.format || view.complex) return r.leave("gradient of dtype " + text_of(r.grad.ptr(), "dtype"));
  if (is_lazy(r.grad.ptr(), view) || !is_row_major(shape_of(view), strides_of(view))) {
    r.grad = r.grad.attr("resolve_neg")().attr("contiguous")();
    read();
  }
  r.job.operands[kGrad] = {view.data, *view.format};

  TensorView indices;
  if (!torch().dlpack.view(listed.ptr(), indices) || !indices.on_cpu || !indices.int64 || indices.ndim != 2)
    return r.leave("sparse gradient whose indices are not int64 on the CPU");
  if (indices.shape[0] + view.ndim - 1 != own.ndim || indices.shape[1] != view.shape[0] ||
      !same_numbers(view.shape + 1, own.shape + indices.shape[0], view.ndim - 1))
    fail(r.param, kGradLabel + " has values that do not fit its indices and shape");
  const auto sizes = shape_of(own).first(static_cast<std::size_t>(indices.shape[0]));
  std::int64_t length = 1;
  for (const std::int64_t size : shape_of(own).subspan(sizes.size())) length *= size;
  try {
    r.job.rows = &rows_.emplace_back(read_rows({.data = reinterpret_cast<const std::int64_t*>(indices.data),
                                                .entries = indices.shape[1],
                                                .strides = {indices.strides[0], indices.strides[1]}},
                                               sizes, length));
  } catch (const std::out_of_range& error) {
    fail(r.param, kGradLabel + " is not valid: " + error.what());
  }
  return true;
}

bool Plan::read_states(Reading& r) {
  const unsigned used = r.param.states_used = states_of(r.param.group->states_used, r.own());
  if (r.param.state == nullptr) {
    r.missing = info_.counts_steps || used != 0 || slow_;
    return true;
  }
  if (!PyDict_Check(r.param.state)) fail(r.param, "its state is not a dict");
  for (std::size_t s = 0; s < state_names_.size() && !r.missing; ++s)
    if ((used >> s & 1) != 0 && !read_state(r, kFirstState + s, state_names_[s], state_labels_[s])) return false;
  return !slow_ || r.missing || read_state(r, kFirstFollower, names().slow_param, kSlowLabel);
}

bool Plan::read_state(Reading& r, std::size_t operand, const py::object& name, const std::string& what) {
  PyObject* tensor = lookup(r.param.state, name);
  if (tensor == nullptr || tensor == Py_None) {
    r.missing = true;
    return true;
  }
  TensorView& view = r.views[operand];
  py::object local;
  if (r.param.is_shard()) {
    if (!is_dtensor(tensor)) {
      if (PyObject_IsInstance(tensor, torch().tensor_type.ptr()) != 1) fail(r.param, what + " is not a tensor");
      if (is_plain(tensor) && !passes_for_replicated(tensor)) fail(r.param, what + " is not a DTensor");
      return r.leave("state of a DTensor that is none itself");
    }
    if (!is_spread_as_own(r, operand, tensor, what)) return r.leave("DTensor one of whose states is placed otherwise");
    local = local_of(tensor);
    tensor = local.ptr();
  }
  if (!is_plain(tensor)) {
    if (PyObject_IsInstance(tensor, torch().tensor_type.ptr()) != 1) fail(r.param, what + " is not a tensor");
    return r.leave("tensor subclass " + type_name(tensor));
  }
  if (!torch().dlpack.view(tensor, view))
    fail(r.param, what + " has no strided memory (layout " + text_of(tensor, "layout") + ", device " +
                      text_of(tensor, "device") + ")");
  if (same_device(view, r.own()) && !view.format) fail(r.param, what + " has dtype " + text_of(tensor, "dtype"));
  check_operand(r, operand, tensor, what);
  if (r.param.is_lazy_now(operand, tensor, view)) return r.leave("negated or conjugated state");
  if (r.job.rows != nullptr && !is_row_major(shape_of(view), strides_of(view)))
    return r.leave("sparse gradient beside a state that is not contiguous");
  if (!r.strides_as_own(operand)) {
    const Overlap overlap = self_overlap(shape_of(view), strides_of(view));
    if (overlap == Overlap::certain) fail(r.param, what + " has several elements that share the same memory");
    if (overlap == Overlap::possible) return r.leave("state with interleaved strides");
  }
  return true;
}

bool Plan::read_numbers(Reading& r) {
  if (r.param.state == nullptr) return true;
  for (std::size_t n = 0; n < number_names_.size() && !r.missing; ++n)
    if (!read_number(r, number_names_[n], r.numbers[n])) return false;
  return true;
}

bool Plan::read_number(Reading& r, const py::object& name, Number& number) {
  PyObject* held = lookup(r.param.state, name);
  if (held == nullptr) {
    r.missing = true;
    return true;
  }
  if (PyLong_Check(held)) {
    number = {.value = PyLong_AsDouble(held), .dict = r.param.state};
    if (number.value == -1.0 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      fail(r.param, "its state " + std::string(py::str(name)) + " is an int that no float can hold");
    }
    return true;
  }
  TensorView view;
  if (!is_plain(held) || !torch().dlpack.view(held, view) || view.complex ||
      !(view.on_cpu || same_device(view, r.own())) ||
      (view.format != Format::float32 && view.format != Format::float64) ||
      !std::ranges::all_of(shape_of(view), [](std::int64_t size) { return size == 1; }))
    return r.leave("state " + std::string(py::str(name)) + " that is not one float on the CPU");
  number = {.data = view.data, .format = *view.format, .on_gpu = !view.on_cpu};
  if (number.on_gpu) return true;
  if (number.format == Format::float32) {
    float value = 0;
    std::memcpy(&value, view.data, sizeof value);
    number.value = static_cast<double>(value);
  } else {
    std::memcpy(&number.value, view.data, sizeof number.value);
  }
  return true;
}

// Takes an operand into the job, if it fits the parameter.
void Plan::check_operand(Reading& r, std::size_t operand, PyObject* tensor, const std::string& what) {
  const TensorView& view = r.views[operand];
  if (!same_device(view, r.own()))
    fail(r.param, what + " is on device " + text_of(tensor, "device") + ", not on the parameter's");
  if (!fits(operand, view, r.own()))
    fail(r.param, what + " has shape " + std::string(py::str(py::list(py::handle(tensor).attr("shape")))) +
                      " and dtype " + text_of(tensor, "dtype"));
  r.job.operands[operand] = {view.data, *view.format};
}

// Notes all memory that this step writes for the parameter. Where it has moved, it will be looked at for overlaps.
void Plan::note_memory(Reading& r) {
  const auto note = [&](std::size_t slot, std::byte* first, std::int64_t bytes) {
    auto& known = r.param.written[slot];
    const std::pair range{first, first + bytes};
    if (known == range) return;
    known = range;
    memory_moved_ = true;
    r.param.shared = r.param.tangled = false;  // to be found out again
  };
  for (std::size_t k = 0; k < kMaxOperands; ++k) {
    const Operand& operand = r.job.operands[k];
    if (k == kGrad) continue;
    if (operand.data == nullptr) {
      note(k, nullptr, 0);
      continue;
    }
    const std::int64_t elements = r.packed && r.strides_as_own(k) && same_shape(r.views[k], r.own())
                                      ? r.job.length
                                      : extent(shape_of(r.views[k]), strides_of(r.views[k]));
    note(k, operand.data, elements * static_cast<std::int64_t>(size_of(operand.format)));
  }
  for (std::size_t n = 0; n < r.numbers.size(); ++n) {
    const Number& number = r.numbers[n];
    note(kMaxOperands + n, number.data, number.data == nullptr ? 0 : static_cast<std::int64_t>(size_of(number.format)));
  }
}

// The same of a parameter that this step does not write. Others may have shared its memory.
void Plan::forget_memory(Param& param) {
  if (param.written == decltype(param.written){}) return;
  param.written = {};
  memory_moved_ = true;
}

// A gradient may be the parameter itself, element by element; where it lies otherwise in the parameter's memory, or in
// its states', what torch's sequence of operations would make of it is for torch to say.
bool Plan::gradient_overlaps(Reading& r) {
  const TensorView& grad = r.views[kGrad];
  std::byte* const past =
      grad.data + extent(shape_of(grad), strides_of(grad)) * static_cast<std::int64_t>(size_of(*grad.format));
  const auto overlaps = [&](const auto& range) { return grad.data < range.second && range.first < past; };
  for (std::size_t k = kFirstState; k < kMaxOperands; ++k)
    if (overlaps(r.param.written[k])) return true;
  const bool same =
      r.job.rows == nullptr && grad.data == r.own().data && grad.format == r.own().format && r.strides_as_own(kGrad);
  return !same && overlaps(r.param.written[kParam]);
}

// Where the constants of the parameter's step are made: here or, if some of the numbers that they follow from are on
// its GPU, there; then the job is told of all these numbers.
bool Plan::divide_numbers(Reading& r, cuda::DeviceJob& device_job) {
  Group& group = *r.param.group;
  const bool counts_there = !number_names_.empty() && r.numbers[0].on_gpu;
  for (std::size_t n = 0; n < number_names_.size(); ++n)
    if (r.numbers[n].on_gpu != counts_there) return r.leave("numbers of which some are on the CPU and some on a GPU");
  // Scalars that are brought forward here follow from hyperparameters.
  const bool needed_here = r.own().cuda != group.device || (!counts_there && !info_.scalar_names.empty());
  if (group.device >= 0 && needed_here) fetch_hyper(group);
  if (!counts_there && group.device < 0) return true;

  device_job.hyper = &group.device_hyper;
  device_job.numbers[0] = {.value = info_.counts_steps ? r.numbers[0].value : (r.param.fresh ? 0.0 : 1.0)};
  if (counts_there)
    for (std::size_t n = 0; n < number_names_.size(); ++n)
      device_job.numbers[n] = {.data = r.numbers[n].data, .format = r.numbers[n].format};
  return true;
}

// Whether every element lies where a GPU can read it. (torch itself makes no tensors that do not.)
bool Plan::is_aligned(Reading& r) {
  if (r.own().on_cpu) return true;
  for (const Operand& operand : r.job.operands)
    if (reinterpret_cast<std::uintptr_t>(operand.data) % size_of(operand.format) != 0)
      return r.leave("memory that is not aligned to its elements");
  return true;
}

Plan::Path Plan::read_param(Param& param, cuda::DeviceJob& device_job, int& device) {
  Job& job = device_job.job;
  device_job.hyper = nullptr;
  Reading r{.param = param, .job = job, .grad = gradient_of(param.object)};
  if (r.grad.is_none()) {
    forget_memory(param);
    return Path::none;
  }
  param.reason = why_torch(param, r.own());
  device = r.own().cuda;
  if (!param.reason.empty() || !read_own(r) || !read_gradient(r) || !read_states(r) || !read_numbers(r)) {
    forget_memory(param);
    return Path::torch;
  }
  note_memory(r);
  if (param.tangled) fail(param, "its own tensors (parameter, states, step) overlap in memory");
  if (param.shared || gradient_overlaps(r)) {
    param.reason =
        param.shared ? "memory shared with another parameter" : "gradient that overlaps its parameter or states";
    return Path::torch;
  }
  if (r.missing) return Path::missing;
  const bool here = device < 0 && param.group->device < 0;
  if (!here && (!divide_numbers(r, device_job) || !is_aligned(r))) {
    forget_memory(param);
    return Path::torch;
  }

  param.blended = blend_ && job.rows == nullptr && blends();
  if (param.blended) {
    job.followers[0] = {.weight = *blend_, .sets_param = true};
  } else {  // read for the checks alone
    job.operands[kFirstFollower] = {};
  }
  if (device_job.hyper == nullptr) {
    const std::size_t counters = info_.counts_steps ? 1 : 0;
    const double step = info_.counts_steps ? r.numbers[0].value + 1.0 : (param.fresh ? 1.0 : 2.0);
    Scalars scalars{};
    for (std::size_t n = counters; n < number_names_.size(); ++n) scalars[n - counters] = r.numbers[n].value;
    const Memo& memo = prepare_step(*param.group, step, scalars, job.wide);
    job.constants = memo.constants;
    for (std::size_t n = 0; n < number_names_.size(); ++n)
      r.numbers[n].value = n < counters ? step : memo.advanced[n - counters];
  } else {
    r.numbers[0].value += 1.0;
  }
  for (std::size_t n = 0; n < number_names_.size(); ++n)
    if (!r.numbers[n].on_gpu) numbers_.push_back(r.numbers[n]);
  if (job.rows == nullptr) {  // else the gradient's values have a shape of their own
    bool flat = r.packed;
    for (std::size_t k = 0; k < kMaxOperands; ++k)
      if (job.operands[k].data != nullptr || k < kFirstState) flat = flat && r.strides_as_own(k);
    place(job, r.views, flat);
  }
  held_.push_back(std::move(r.grad));
  return Path::kernel;
}

std::string Plan::declines(const TensorView&) const { return {}; }

bool Plan::runs_on_cuda() const { return true; }

bool Plan::takes_shards() const { return true; }

unsigned Plan::states_of(unsigned used, const TensorView&) const { return used; }

bool Plan::fits(std::size_t, const TensorView& view, const TensorView& param) const { return same_shape(view, param); }

void Plan::place(Job& job, const std::array<TensorView, kMaxOperands>& views, bool flat) {
  if (flat || job.length == 0) return;
  std::array<std::span<const std::int64_t>, kMaxOperands> strides;
  for (std::size_t k = 0; k < kMaxOperands; ++k)
    if (job.operands[k].data != nullptr || k < kFirstState) strides[k] = strides_of(views[k]);
  Layout layout = make_layout(shape_of(views[kParam]), strides);
  if (!is_flat(layout)) job.layout = &layouts_.emplace_back(std::move(layout));
}

bool Plan::blends() const { return true; }

void Plan::launch(std::span<const Job> jobs, int threads) { run_step(rule_, jobs, threads); }

// Parameters of one group, and often of many, share their constants.
const Plan::Memo& Plan::prepare_step(const Group& group, double step, const Scalars& scalars, bool wide) {
  Memo& memo = memo_[wide ? 1 : 0];
  if (memo.constants != nullptr && memo.step == step && memo.scalars == scalars && memo.hyper == group.hyper)
    return memo;
  Slot& slot = slots_.emplace_back();
  const StepMode mode;  // or a caller's rounding mode would be in the constants
  memo = {group.hyper, step, scalars, scalars, slot.bytes};
  info_.prepare(group.hyper.data(), step, scalars.data(), wide, slot.bytes);
  info_.advance(group.hyper.data(), step, memo.advanced.data());
  return memo;
}

// -- the step --------------------------------------------------------------------------------------------------------

void Plan::clear() {
  jobs_.clear();
  device_jobs_.clear();
  scaler_ = {};
  job_params_.clear();
  numbers_.clear();
  missing_.clear();
  torch_params_.clear();
  layouts_.clear();
  rows_.clear();
  slots_.clear();
  memo_ = {};
  held_.clear();
}

void Plan::gather() {
  clear();
  cuda::DeviceJob job;
  int device = -1;
  for (std::size_t k = 0; k < params_.size(); ++k) {
    params_[k].blended = false;
    switch (read_param(params_[k], job, device)) {
      case Path::none:
        break;
      case Path::kernel:
        if (device < 0) {
          jobs_.push_back(job.job);
        } else {
          device_jobs_[device].push_back(job);
        }
        job_params_.push_back(k);
        break;
      case Path::missing:
        missing_.push_back(k);
        break;
      case Path::torch:
        torch_params_.push_back(k);
        break;
    }
  }
}

// Finds parameters whose steps would write to the same memory. In one call they would race; torch's code steps them one
// after the other. Within one parameter it can only be a mistake. True if the findings changed.
bool Plan::divide_shared_memory() {
  struct Range {
    std::byte* first;
    std::byte* past;
    Param* param;
  };
  std::vector<Range> ranges;
  for (Param& param : params_)
    for (const auto& [first, past] : param.written)
      if (first != past) ranges.push_back({first, past, &param});
  std::ranges::sort(ranges, {}, &Range::first);

  std::unordered_set<const Param*> shared;
  std::unordered_set<const Param*> tangled;
  const Range* widest = nullptr;  // of those so far, the one that reaches furthest
  for (const Range& range : ranges) {
    if (widest != nullptr && range.first < widest->past) {
      if (widest->param == range.param) {
        tangled.insert(range.param);
      } else {
        shared.insert({range.param, widest->param});
      }
    }
    if (widest == nullptr || range.past > widest->past) widest = &range;
  }
  bool changed = false;
  for (Param& param : params_) {
    changed = changed || shared.contains(&param) != param.shared || tangled.contains(&param) != param.tangled;
    param.shared = shared.contains(&param);
    param.tangled = tangled.contains(&param);
  }
  return changed;
}

void Plan::create_states(const py::object& optimizer) {
  py::list numbers;
  for (const py::object& name : number_names_) numbers.append(name);
  py::list wanted;
  std::vector<Param*> fresh;  // not those that lack slow weights alone
  const auto lacks = [](const Param& param, const py::object& name) {
    PyObject* const state = param.state == nullptr ? nullptr : lookup(param.state, name);
    return state == nullptr || state == Py_None;
  };
  for (std::size_t m = 0; m < missing_.size(); ++m) {
    Param& param = params_[missing_[m]];
    py::list state_names;
    for (std::size_t s = 0; s < state_names_.size(); ++s) {
      if ((param.states_used >> s & 1) == 0) continue;
      state_names.append(state_names_[s]);
      if (lacks(param, state_names_[s])) fresh.push_back(&param);
    }
    if (slow_) state_names.append(names().slow_param);
    wanted.append(py::make_tuple(py::handle(param.group->dict), py::handle(param.object), gradient_of(param.object),
                                 state_names));
  }
  optimizer.attr("_create_states")(wanted, numbers);
  for (Param* param : fresh) param->fresh = true;
  states_moved_ = true;
}

// Reads until all is known: which memory is shared, and all states exist. States come last, when nothing else can fail.
// False, with no states created, if torch has to step some parameters and has not done so, or if none may be created.
bool Plan::prepare(const py::object& optimizer, bool torch_has_stepped, bool creates) {
  for (int round = 0; round < 8; ++round) {
    read_groups(optimizer);
    read_states(optimizer);
    gather();
    if (memory_moved_) {
      memory_moved_ = false;
      if (divide_shared_memory()) continue;
    }
    if (!torch_params_.empty() && !torch_has_stepped) return false;
    if (missing_.empty()) return true;
    if (!creates) return false;
    create_states(optimizer);
  }
  throw std::runtime_error(label_ + ": the optimizer changes while it is being read");
}

// Whether all of this step is made and counted where GradScaler's numbers are, so that nobody here has to know them.
bool Plan::takes_scaler(const TensorView& found_inf) const {
  if (!jobs_.empty() || !torch_params_.empty() || !numbers_.empty() || device_jobs_.size() > 1) return false;
  // The first step is never among them: skipped, it has to stay the first, and states must not be there.
  if (!missing_.empty()) return false;
  const bool first =
      !info_.counts_steps && std::ranges::any_of(params_, [](const Param& param) { return param.fresh; });
  return !first && (device_jobs_.empty() || device_jobs_.begin()->first == found_inf.cuda);
}

py::object Plan::step(const py::object& optimizer, double grad_factor, int threads, bool slow,
                      std::optional<double> blend, const py::object& grad_scale, const py::object& found_inf) {
  const Ticket ticket(*this);
  const Cleaner cleaner{*this};
  label_ = type_name(optimizer.ptr());
  grad_factor_ = grad_factor;
  slow_ = slow;
  blend_ = blend;
  const bool with_scaler = !grad_scale.is_none() || !found_inf.is_none();
  const bool all = prepare(optimizer, false, !with_scaler);
  if (with_scaler) {
    TensorView scale;
    TensorView found;
    const auto read = [](const py::object& tensor, TensorView& view) {
      return tensor.is_none() || (torch().dlpack.view(tensor.ptr(), view) && view.format == Format::float32);
    };
    if (!read(grad_scale, scale) || !read(found_inf, found) || !takes_scaler(found_inf.is_none() ? scale : found))
      return py::reinterpret_borrow<py::object>(Py_NotImplemented);
    scaler_ = {.grad_scale = scale.data, .found_inf = found.data};
  }
  if (all) {
    run(threads);
    return py::none();
  }
  py::list rest;
  for (const std::size_t k : torch_params_) {
    const Param& param = params_[k];
    rest.append(py::make_tuple(param.group->index, param.index, param.reason));
  }
  return rest;
}

void Plan::finish(const py::object& optimizer, double grad_factor, int threads, bool slow,
                  std::optional<double> blend) {
  const Ticket ticket(*this);
  const Cleaner cleaner{*this};
  grad_factor_ = grad_factor;
  slow_ = slow;
  blend_ = blend;
  prepare(optimizer, true, true);
  for (const std::size_t k : torch_params_) the_stats.torch[params_[k].reason] += 1;
  run(threads);
}

void Plan::run(int threads) {
  for (const auto& [device, jobs] : device_jobs_) step_on_cuda(rule_, device, jobs, scaler_);
  {
    const py::gil_scoped_release release;
    for (Rows& rows : rows_) coalesce(rows);
    for (Job& job : jobs_)
      if (job.rows != nullptr) job.length = job.rows->count() * job.rows->length;
    launch(jobs_, threads);
    for (const Number& number : numbers_) {
      if (number.data == nullptr) continue;
      if (number.format == Format::float32) {
        const auto value = static_cast<float>(number.value);
        std::memcpy(number.data, &value, sizeof value);
      } else {
        std::memcpy(number.data, &number.value, sizeof number.value);
      }
    }
  }
  for (const Number& number : numbers_)
    if (number.dict != nullptr) py::handle(number.dict)[names().step] = py::int_(static_cast<long long>(number.value));
  if (job_params_.empty()) return;
  py::list stepped(job_params_.size());
  for (std::size_t j = 0; j < job_params_.size(); ++j) {
    Param& param = params_[job_params_[j]];
    param.fresh = false;
    stepped[j] = py::reinterpret_borrow<py::object>(param.object);
  }
  torch().increment_version(stepped);
  the_stats.kernel["cpu"] += jobs_.size();
  the_stats.kernel["cuda"] += job_params_.size() - jobs_.size();
}

py::list Plan::unblended(const py::object& optimizer) {
  const Ticket ticket(*this);
  read_groups(optimizer);
  py::list params;
  for (const Param& param : params_)
    if (!param.blended) params.append(py::reinterpret_borrow<py::object>(param.object));
  return params;
}

py::list Plan::explain(const py::object& optimizer) {
  const Ticket ticket(*this);
  const Cleaner cleaner{*this};
  label_ = type_name(optimizer.ptr());
  read_groups(optimizer);
  read_states(optimizer);
  py::list rows;
  // Read twice: the first time finds out where all memory lies, and so what is shared.
  for (const bool first : {true, false}) {
    for (Param& param : params_) {
      std::string path = "kernel";
      std::string reason;
      try {
        cuda::DeviceJob job;
        int device = -1;
        const Path found = read_param(param, job, device);
        if (found == Path::none) {
          TensorView view;
          reason = why_torch(param, view);
          if (!reason.empty()) path = "torch";
          reason += reason.empty() ? "no gradient now" : "; no gradient now";
        } else if (found == Path::torch) {
          path = "torch";
          reason = param.reason;
        } else if (device >= 0) {
          reason = "cuda:" + std::to_string(device);
        }
      } catch (const py::value_error& error) {
        path = "error";
        reason = error.what();
      }
      if (!first) rows.append(py::make_tuple(param.group->index, param.index, path, reason));
    }
    if (first) divide_shared_memory();
  }
  memory_moved_ = true;
  return rows;
}

}  // namespace onepass
