#include "bindings/flat_tensors.h"

#include <array>

namespace onepass {

void FlatTensors::add(PyObject* tensor, const TensorView& view) {
  if (view.data != nullptr) used.push_back(tensor);
  Part part;
  part.begin = ends.back();
  part.length = elements_of(view);
  part.tensor = {view.data, *view.format};
  const std::span<const std::int64_t> shape = shape_of(view);
  std::vector<std::int64_t> in_order(shape.size());
  std::int64_t stride = 1;
  bool flat = true;
  for (std::size_t d = shape.size(); d-- > 0;) {
    in_order[d] = stride;
    flat = flat && (shape[d] == 1 || view.strides[d] == stride);
    stride *= shape[d];
  }
  if (!flat && part.length > 0) {
    std::array<std::span<const std::int64_t>, kMaxOperands> strides;
    strides[Part::kFlat] = in_order;
    strides[Part::kTensor] = strides_of(view);
    part.layout = &layouts.emplace_back(make_layout(shape, strides));
  }
  ends.back() += part.length;
  parts.push_back(part);
}

}  // namespace onepass
