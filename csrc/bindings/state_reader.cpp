// The part of ParamReader that reads states, followers and scalars.
#include <algorithm>
#include <cstring>

#include "bindings/names.h"
#include "bindings/param_reader.h"
#include "bindings/reading.h"
#include "bindings/torch.h"
#include "layout.h"

namespace py = pybind11;

namespace onepass {

bool ParamReader::read_states(Reading& r) {
  const unsigned used = r.param.states_used = driver_.states_of(r.param.group->states_used, r.own());
  if (r.param.state == nullptr) {
    r.missing = info_.counts_steps || used != 0 || r.param.master != Master::none ||
                std::ranges::any_of(request_.followers, &FollowerRequest::is_state);
  } else if (!PyDict_Check(r.param.state)) {
    fail(r.param, "its state is not a dict");
  }
  for (std::size_t s = 0; s < names_.states.size() && r.param.state != nullptr && !r.missing; ++s)
    if ((used >> s & 1) != 0 && !read_state(r, operand_of_state(s), names_.states[s], names_.state_labels[s]))
      return false;
  if (r.param.master != Master::none && !r.missing && !read_master(r)) return false;
  for (std::size_t f = 0; f < request_.followers.size() && !r.missing; ++f) {
    const FollowerRequest& follower = request_.followers[f];
    if (follower.is_state() && !read_state(r, kFirstFollower + f, follower.state_name, follower.label)) return false;
    if (follower.is_state() || read_user_follower(r, f)) r.follows |= 1U << f;
  }
  return true;
}

std::int64_t version_of(PyObject* tensor) {
  const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names().version.ptr()));
  if (version) return version.cast<std::int64_t>();
  PyErr_Clear();  // an inference tensor
  return -1;
}

py::dict& master_versions() {
  static auto* const kVersions = new py::dict();  // never destroyed, because Python may be finalized before
  return *kVersions;
}

void remember_version(PyObject* param, std::int64_t version) {
  master_versions()[py::int_(reinterpret_cast<std::uintptr_t>(param))] = py::int_(version);
}

void forget_version_with(PyObject* param) {
  static auto* const kWatched = new py::dict();  // by id(parameter), a weak reference whose callback forgets it
  const py::int_ key(reinterpret_cast<std::uintptr_t>(param));
  if (kWatched->contains(key)) return;
  const auto forget = [key](const py::handle& /*reference*/) {
    for (py::dict* const known : {&master_versions(), kWatched}) known->attr("pop")(key, py::none());
  };
  (*kWatched)[key] = py::weakref(param, py::cpp_function(forget));
}

std::optional<std::int64_t> known_version(PyObject* param) {
  const py::int_ key(reinterpret_cast<std::uintptr_t>(param));
  PyObject* const known = PyDict_GetItem(master_versions().ptr(), key.ptr());
  if (known == nullptr) return std::nullopt;
  return py::handle(known).cast<std::int64_t>();
}

const py::str& master_name(Master master) { return master == Master::low_bits ? names().master_low : names().master; }

// Reads the master. Notes whether the parameter has been changed since the low bits were valid.
bool ParamReader::read_master(Reading& r) {
  static const std::string kLowLabel = "its state master_low", kWholeLabel = "its state master";
  const bool split = r.param.master == Master::low_bits;
  if (!read_state(r, kMaster, master_name(r.param.master), split ? kLowLabel : kWholeLabel)) return false;
  if (!split || r.missing || request_.only_reads) return true;
  const std::int64_t version = work_.versions[r.number];
  if (version < 0) return true;
  if (known_version(r.object).value_or(version) != version) work_.changed.push_back(r.number);
  return true;
}

// Reads the user's tensor that follows the parameter. Returns whether there is one that kernels can write.
bool ParamReader::read_user_follower(Reading& r, std::size_t follower) {
  const std::size_t operand = kFirstFollower + follower;
  const py::int_ key(reinterpret_cast<std::uintptr_t>(r.object));
  PyObject* const tensor = PyDict_GetItem(request_.followers[follower].tensors.ptr(), key.ptr());
  return tensor != nullptr && can_follow(r, operand, tensor);
}

bool ParamReader::can_follow(Reading& r, std::size_t operand, PyObject* tensor) {
  if (!driver_.takes_followers() || r.job().rows != nullptr) return false;
  if (r.is_shard()) {
    if (!is_dtensor(tensor) ||
        r.param.spread.compare(operand, tensor, r.object, work_.ran_python) != Spread::Match::same)
      return false;
    tensor = work_.locals.emplace_back(local_of(tensor)).ptr();
  }
  TensorView& view = r.views[operand];
  if (!is_plain(tensor) || !torch().dlpack.view(tensor, view) || !view.format || !same_device(view, r.own()) ||
      !same_shape(view, r.own()) || is_lazy_now(r, operand, tensor))
    return false;
  // In float32 arithmetic, a follower in float64 would lose digits.
  if (size_of(*view.format) > (r.job().wide ? sizeof(double) : sizeof(float))) return false;
  if (!r.has_strides_of_param(operand) && self_overlap(shape_of(view), strides_of(view)) != Overlap::none) return false;
  r.job().operands[operand] = {view.data, *view.format};
  work_.used.push_back(tensor);
  return true;
}

bool ParamReader::read_state(Reading& r, std::size_t operand, const py::str& name, const std::string& what) {
  const auto held = py::reinterpret_borrow<py::object>(lookup(r.param.state, name));
  if (!held || held.is_none()) {
    r.missing = true;
    return true;
  }
  PyObject* tensor = held.ptr();
  if (r.is_shard() && is_dtensor(tensor)) {
    if (!is_spread_as_param(r, operand, tensor, what))
      return r.fall_back("DTensor one of whose states is placed otherwise");
    tensor = work_.locals.emplace_back(local_of(tensor)).ptr();
  } else if (r.is_shard() || !is_plain(tensor)) {
    if (!is_tensor(tensor)) fail(r.param, what + " is not a tensor");
    if (!r.is_shard()) return r.fall_back("tensor subclass " + type_name(tensor));
    if (is_plain(tensor) && !passes_for_replicated(tensor)) fail(r.param, what + " is not a DTensor");
    return r.fall_back("state of a DTensor that is none itself");
  }
  if (!is_plain(tensor)) return r.fall_back("tensor subclass " + type_name(tensor));
  TensorView& view = r.views[operand];
  if (!torch().dlpack.view(tensor, view))
    fail(r.param, what + " has no strided memory (layout " + text_of(tensor, "layout") + ", device " +
                      text_of(tensor, "device") + ")");
  if (operand == kMaster) {
    const bool split = r.param.master == Master::low_bits;
    if (split ? !view.int16 : view.format != Format::float32 || view.complex)
      fail(r.param, what + " has dtype " + text_of(tensor, "dtype") + ", not " + (split ? "int16" : "float32"));
    if (split) view.format = Format::bfloat16;  // for its size
  }
  const bool in_blocks = view.float8_e4m3fn && operand < kFirstFollower && !info_.state_codings.empty();
  if (in_blocks) view.format = Format::float8_e4m3fn;
  if (same_device(view, r.own()) && !view.format) fail(r.param, what + " has dtype " + text_of(tensor, "dtype"));
  set_operand(r, operand, tensor, what);
  if (is_lazy_now(r, operand, tensor)) return r.fall_back("negated or conjugated state");
  if (r.job().rows != nullptr && !is_row_major(shape_of(view), strides_of(view)))
    return r.fall_back("sparse gradient beside a state that is not contiguous");
  if (!r.has_strides_of_param(operand)) {
    const Overlap overlap = self_overlap(shape_of(view), strides_of(view));
    if (overlap == Overlap::certain) fail(r.param, what + " has several elements that share the same memory");
    if (overlap == Overlap::possible) return r.fall_back("state with interleaved strides");
  }
  work_.used.push_back(tensor);
  return !in_blocks || read_scales(r, operand, what);
}

// Reads the scales of a state in blocks, whose codes have been read.
bool ParamReader::read_scales(Reading& r, std::size_t operand, const std::string& what) {
  const std::size_t state = operand - kFirstState;
  const TensorView& codes = r.views[operand];
  const auto scales_text = [&] { return what + "_scale"; };  // for messages
  const std::int64_t rows = codes.ndim > 0 ? codes.shape[0] : 0;
  std::int64_t length = 1;
  for (int d = 1; d < codes.ndim; ++d) length *= codes.shape[d];
  if (codes.ndim < 2 || codes.complex) fail(r.param, what + " has 8 bits, which needs 2 dimensions and real numbers");

  PyObject* scales = lookup(r.param.state, names_.scales[state]);
  if (scales == nullptr)
    fail(r.param, what + " has 8 bits, but its state " + std::string(names_.scales[state]) + " is missing");
  if (r.is_shard()) {
    if (!is_dtensor(scales)) fail(r.param, scales_text() + " is not a DTensor");
    scales = work_.locals.emplace_back(local_of(scales)).ptr();
  }
  if (!is_plain(scales)) fail(r.param, scales_text() + " is a " + type_name(scales));
  TensorView view;
  const std::int64_t in_row = (length + kBlockLength - 1) / kBlockLength;
  if (!torch().dlpack.view(scales, view) || !view.float8_e8m0fnu || !same_device(view, codes) || view.ndim != 2 ||
      view.shape[0] != rows || view.shape[1] != in_row || !is_row_major(shape_of(view), strides_of(view)))
    fail(r.param, scales_text() + " must be a contiguous tensor of torch.float8_e8m0fnu with shape (" +
                      std::to_string(rows) + ", " + std::to_string(in_row) +
                      "), on the parameter's device; it has shape " + shape_text(scales) + " and dtype " +
                      text_of(scales, "dtype"));

  Blocks& blocks = r.job().blocks;
  const bool is_first = blocks.row_length == 0;
  if (!is_flat(make_layout(shape_of(codes), {strides_of(codes)})) ||
      (rows > 1 && length > 0 && codes.strides[0] != length))
    fail(r.param, what + " is not packed with its first dimension outermost, as 8-bit states must be");
  for (std::size_t k = kFirstState; k < operand && !is_first; ++k)
    if (blocks.scales[k - kFirstState] != nullptr && !same_numbers(r.views[k].strides, codes.strides, codes.ndim))
      fail(r.param, what + " has other strides than its other 8-bit states");
  if (r.job().rows != nullptr && r.job().rows->length != length)
    fail(r.param, "a sparse gradient with several sparse dimensions cannot step 8-bit states");
  blocks.row_length = std::max<std::int64_t>(length, 1);
  blocks.scales[state] = view.data;
  blocks.codings[state] = info_.state_codings[state];
  r.scale_bytes[state] = rows * in_row;
  if (r.is_shard() && r.param.spread.first_row(r.object, work_.ran_python) < 0)
    fail(r.param, "8-bit states need a DTensor that is sharded along dimension 0 only");
  work_.used.push_back(scales);
  return true;
}

// Returns the number of a parameter's scalars: those of the rule, or one if the rule has none, but the random bits need
// a count of the steps.
std::size_t ParamReader::scalars_of(const Param& param) const {
  return info_.counts_steps ? names_.scalars.size() : param.rounds ? 1 : 0;
}

bool ParamReader::read_scalars(Reading& r) {
  const std::size_t count = scalars_of(r.param);
  if (r.param.state == nullptr) {
    r.missing = r.missing || count > 0;
    return true;
  }
  for (std::size_t n = 0; n < count; ++n)  // also if a state is missing: what kernels cannot read is known before
    if (!read_scalar(r, info_.counts_steps ? names_.scalars[n] : names().step, r.scalars[n])) return false;
  if (!info_.counts_steps && r.scalars[0].on_gpu) return r.fall_back("state step that is on a GPU");
  return true;
}

bool ParamReader::read_scalar(Reading& r, const py::str& name, Scalar& scalar) {
  PyObject* held = lookup(r.param.state, name);
  if (held == nullptr) {
    r.missing = true;
    return true;
  }
  if (PyLong_Check(held)) {
    scalar = {.value = PyLong_AsDouble(held), .dict = r.param.state};
    if (scalar.value == -1.0 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      fail(r.param, "its state " + std::string(name) + " is an int that no float can hold");
    }
    work_.used.push_back(scalar.dict);
    return true;
  }
  TensorView view;
  if (!is_plain(held) || !torch().dlpack.view(held, view) || !is_one_float(view) ||
      !(view.on_cpu || same_device(view, r.own())))
    return r.fall_back("state " + std::string(name) + " that is not one float on the CPU");
  scalar = {.data = view.data, .format = *view.format, .on_gpu = !view.on_cpu};
  work_.used.push_back(held);
  if (scalar.on_gpu) return true;
  if (scalar.format == Format::float32) {
    float value = 0;
    std::memcpy(&value, view.data, sizeof value);
    scalar.value = static_cast<double>(value);
  } else {
    std::memcpy(&scalar.value, view.data, sizeof scalar.value);
  }
  return true;
}

}  // namespace onepass
