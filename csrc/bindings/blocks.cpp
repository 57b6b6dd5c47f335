#include "bindings/blocks.h"

#include <algorithm>
#include <string>

#include "bindings/apply.h"
#include "bindings/torch.h"
#include "cpu/blocks.h"
#include "cpu/fpmode.h"
#include "cpu/stochastic.h"
#include "layout.h"

namespace py = pybind11;

namespace onepass {
namespace {

Coding coding_of(const std::string& name) {
  for (const Coding coding : {Coding::signed_values, Coding::magnitudes, Coding::squares})
    if (name == name_of(coding)) return coding;
  throw py::value_error("coding must be signed_values, magnitudes or squares, got " + name);
}

// Returns a job whose only operand is a state in blocks, and sets `values` to the memory of the float32 tensor.
Job job_of(const py::handle& codes, const py::handle& scales, const std::string& coding, const py::handle& tensor,
           float*& values, std::size_t state = 0) {
  TensorView code_view;
  TensorView scale_view;
  const TensorView value_view = require_view(tensor.ptr(), "values");
  const bool fits = torch().dlpack.view(codes.ptr(), code_view) && torch().dlpack.view(scales.ptr(), scale_view) &&
                    code_view.on_cpu && scale_view.on_cpu && code_view.float8_e4m3fn && scale_view.float8_e8m0fnu &&
                    value_view.format == Format::float32 && !value_view.complex && same_shape(code_view, value_view) &&
                    code_view.ndim >= 2 &&
                    is_flat(make_layout(shape_of(code_view), {strides_of(code_view), strides_of(value_view)}));
  const std::int64_t rows = fits ? code_view.shape[0] : 0;
  Job job;
  job.length = fits ? elements_of(code_view) : 0;
  job.blocks.row_length = std::max<std::int64_t>(rows > 0 ? job.length / rows : 1, 1);
  if (!fits || elements_of(scale_view) != rows * ((job.blocks.row_length + kBlockLength - 1) / kBlockLength) ||
      !is_row_major(shape_of(scale_view), strides_of(scale_view)))
    throw py::value_error("codes (float8_e4m3fn), scales (float8_e8m0fnu) and values (float32) on the CPU do not fit");
  job.operands[kFirstState + state] = {code_view.data, Format::float8_e4m3fn};
  job.blocks.scales[state] = scale_view.data;
  job.blocks.codings[state] = coding_of(coding);
  values = reinterpret_cast<float*>(value_view.data);
  return job;
}

template <class Work>
void for_each_tile(const Job& job, Work&& work) {
  const StepMode mode;
  std::int64_t end = 0;
  for (std::int64_t at = 0; at < job.length; at = end) {
    end = end_of_blocks<float>(job, at, job.length);
    work(at, end - at);
  }
}

}  // namespace

void bind_blocks(py::module_& m) {
  m.def(
      "decode_blocks",
      [](const py::handle& codes, const py::handle& scales, const std::string& coding, const py::handle& values) {
        float* to = nullptr;
        const Job job = job_of(codes, scales, coding, values, to);
        for_each_tile(job, [&](std::int64_t at, std::int64_t n) { decode_blocks(job, kFirstState, at, n, to + at); });
      },
      py::arg("codes"), py::arg("scales"), py::arg("coding"), py::arg("values"),
      "Write the values of a state in blocks to a float32 tensor. All tensors are on the CPU, packed in the same "
      "order. Raises ValueError if they do not fit.");
  m.def(
      "encode_blocks",
      [](const py::handle& values, const std::string& coding, std::uint64_t key, std::size_t state,
         std::int64_t first_row, const py::handle& codes, const py::handle& scales) {
        float* from = nullptr;
        if (state >= kMaxStates) throw py::value_error("state must be below " + std::to_string(kMaxStates));
        Job job = job_of(codes, scales, coding, values, from, state);
        job.rounding.key = key;
        job.rounding.first = first_row * job.blocks.row_length;
        for_each_tile(
            job, [&](std::int64_t at, std::int64_t n) { encode_blocks(job, kFirstState + state, at, n, from + at); });
      },
      py::arg("values"), py::arg("coding"), py::arg("key"), py::arg("state"), py::arg("first_row"), py::arg("codes"),
      py::arg("scales"),
      "Round a float32 tensor stochastically to a state in blocks. `key` and `state`, its number, choose the random "
      "bits; `first_row` is the index in the whole tensor of its first row. All tensors are on the CPU, packed in the "
      "same order. Raises ValueError if they do not fit.");
  m.def(
      "round_stochastically",
      [](const py::handle& values, const std::string& format, std::uint64_t key, std::size_t stream,
         std::int64_t first) {
        const TensorView view = require_view(values.ptr(), "values");
        const bool is_bfloat16 = format == name_of(Format::bfloat16);
        if ((!is_bfloat16 && format != name_of(Format::float16)) || stream > kParamStream || first < 0)
          throw py::value_error("format must be bfloat16 or float16, stream at most " + std::to_string(kParamStream) +
                                " and first >= 0");
        if (!view.on_cpu || view.format != Format::float32 || view.complex ||
            !is_flat(make_layout(shape_of(view), {strides_of(view)})))
          throw py::value_error("values must be a packed float32 tensor on the CPU");
        const StepMode mode;
        auto* const own = reinterpret_cast<float*>(view.data);
        is_bfloat16 ? round_run<BFloat16>(key, stream, first, own, elements_of(view))
                    : round_run<Float16>(key, stream, first, own, elements_of(view));
      },
      py::arg("values"), py::arg("format"), py::arg("key"), py::arg("stream"), py::arg("first"),
      "Round a packed float32 tensor on the CPU stochastically, in place, to numbers that the format, \"bfloat16\" or "
      "\"float16\", has. `stream` is the number of the state, or `PARAM_STREAM`; `first` is the index of its first "
      "element in the whole tensor.");
  m.attr("PARAM_STREAM") = kParamStream;
  m.def(
      "random_key", &random_key, py::arg("seed"), py::arg("step"), py::arg("param"),
      "Return the key of the random bits with which the step rounds parameter `param` (its number among all parameters "
      "of the optimizer) and its states.");
}

}  // namespace onepass
