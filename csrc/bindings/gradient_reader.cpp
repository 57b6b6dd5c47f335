// The part of ParamReader that reads gradients, dense and sparse.
#include <algorithm>
#include <stdexcept>

#include "bindings/param_reader.h"
#include "bindings/reading.h"
#include "bindings/torch.h"
#include "layout.h"

namespace py = pybind11;

namespace onepass {
namespace {

const std::string kGradLabel = "its gradient";

}  // namespace

void ParamReader::resolve_gradient(Param& param, std::size_t number) {
  PyObject* const object = work_.params[number].ptr();
  Gradient& gradient = work_.gradients[number];
  gradient.original = gradient_of(object);
  gradient.indices = {};
  gradient.is_copy = false;
  if (gradient.original.is_none()) return;
  PyObject* const original = gradient.original.ptr();
  gradient.readable = is_plain(original) || !is_dtensor(original) ? gradient.original : local_of(original);
  PyObject* const readable = gradient.readable.ptr();
  if (!is_plain(readable) || param.group->differentiable) return;
  if (param.sparse && is_sparse(readable)) {
    gradient.indices = indices_of(readable);
    gradient.readable = values_of(readable);
    TensorView view;
    if (is_plain(gradient.readable.ptr()) && torch().dlpack.view(gradient.readable.ptr(), view) && !view.complex &&
        (is_lazy(gradient.readable.ptr(), false) || !is_row_major(shape_of(view), strides_of(view))))
      gradient.readable = gradient.readable.attr("resolve_neg")().attr("contiguous")();
    gradient.is_copy = true;  // as far as zeroing is concerned
  } else if (is_lazy(readable, param.complex)) {
    gradient.readable = resolved(gradient.readable);
    gradient.is_copy = true;
  }
}

bool ParamReader::read_gradient(Reading& r) {
  PyObject* const grad = r.gradient.readable.ptr();
  TensorView& view = r.views[kGrad];
  if (r.is_shard()) {
    PyObject* const original = r.gradient.original.ptr();
    if (!is_dtensor(original)) {
      if (is_plain(original) && !passes_for_replicated(original)) fail(r.param, kGradLabel + " is not a DTensor");
      return r.fall_back("gradient of a DTensor that is none itself");
    }
    if (!is_spread_as_param(r, kGrad, original, kGradLabel))
      return r.fall_back("DTensor whose gradient is placed otherwise");
  }
  if (!is_plain(grad)) return r.fall_back("tensor subclass " + type_name(grad));
  if (r.gradient.indices) return read_sparse_gradient(r);
  if (!torch().dlpack.view(grad, view)) {
    if (!is_sparse(grad)) return r.fall_back("gradient without strided memory");
    if (!r.param.sparse) {  // remembered, because an export that fails takes torch half a millisecond
      r.param.sparse = work_.ran_python = true;
      resolve_gradient(r.param, r.number);
      return read_gradient(r);
    }
    return r.fall_back("sparse gradient");
  }
  if (!info_.takes_dense) return r.fall_back("dense gradient");
  if (same_device(view, r.own()) && !view.format) return r.fall_back("gradient of dtype " + text_of(grad, "dtype"));
  set_operand(r, kGrad, grad, kGradLabel);
  return true;
}

// The values of a sparse gradient are the gradient of a job for some rows. The indices are checked and copied here, and
// sorted later. Whether the tensor claims to be coalesced does not matter.
bool ParamReader::read_sparse_gradient(Reading& r) {
  const TensorView& own = r.own();
  if (!r.param.group->takes_sparse) return r.fall_back("sparse gradient");
  if (!own.on_cpu) return r.fall_back("sparse gradient on a GPU");
  if (own.complex) return r.fall_back("sparse gradient of a complex parameter");
  if (!is_row_major(shape_of(own), strides_of(own)))
    return r.fall_back("sparse gradient of a parameter that is not contiguous");
  const py::list shape(r.gradient.original.attr("shape"));
  if (!std::ranges::equal(shape, shape_of(own), {}, [](py::handle size) { return size.cast<std::int64_t>(); }))
    fail(r.param, kGradLabel + " has shape " + std::string(py::str(shape)));

  PyObject* const values = r.gradient.readable.ptr();
  TensorView& view = r.views[kGrad];
  if (!is_plain(values) || !torch().dlpack.view(values, view))
    return r.fall_back("sparse gradient without strided memory");
  if (!view.on_cpu)
    fail(r.param, kGradLabel + " is on device " + text_of(values, "device") + ", not on the parameter's");
  if (!view.format || view.complex) return r.fall_back("gradient of dtype " + text_of(values, "dtype"));
  r.job().operands[kGrad] = {view.data, *view.format};

  TensorView indices;
  if (!torch().dlpack.view(r.gradient.indices.ptr(), indices) || !indices.on_cpu || !indices.int64 || indices.ndim != 2)
    return r.fall_back("sparse gradient whose indices are not int64 on the CPU");
  if (indices.shape[0] + view.ndim - 1 != own.ndim || indices.shape[1] != view.shape[0] ||
      !same_numbers(view.shape + 1, own.shape + indices.shape[0], view.ndim - 1))
    fail(r.param, kGradLabel + " has values that do not fit its indices and shape");
  const auto sizes = shape_of(own).first(static_cast<std::size_t>(indices.shape[0]));
  std::int64_t length = 1;
  for (const std::int64_t size : shape_of(own).subspan(sizes.size())) length *= size;
  try {
    r.job().rows = &work_.rows.emplace_back(read_rows({.data = reinterpret_cast<const std::int64_t*>(indices.data),
                                                       .entries = indices.shape[1],
                                                       .strides = {indices.strides[0], indices.strides[1]}},
                                                      sizes, length));
  } catch (const std::out_of_range& error) {
    fail(r.param, kGradLabel + " is not valid: " + error.what());
  }
  return true;
}

}  // namespace onepass
