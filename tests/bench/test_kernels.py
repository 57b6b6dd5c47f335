"""bench/kernels.py: how it reads Google Benchmark's JSON, and what it says when something is missing or wrong.

That the program itself builds, and that its results are right, is a test of ctest (tests/run).
"""

import copy
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "kernels.py"

# Of the shape of docs/user_guide.md of Google Benchmark, in the random order of interleaved repetitions.
REPORT = json.loads("""
{
  "context": {"date": "2026-01-01T00:00:00+00:00", "num_cpus": 2, "library_build_type": "release"},
  "benchmarks": [
    {
      "name": "adam/float32/avx512_bf16/33554432/threads:2/real_time", "family_index": 2,
      "per_family_instance_index": 0, "run_name": "adam/float32/avx512_bf16/33554432/threads:2/real_time",
      "run_type": "iteration", "repetitions": 2, "repetition_index": 1, "threads": 1, "iterations": 4,
      "real_time": 2.5e7, "cpu_time": 2.4e7, "time_unit": "ns",
      "bytes_per_second": 3.0e10, "time_per_element": 7.5e-10, "updated": 3.0
    },
    {
      "name": "adam/float32/avx512_bf16/33554432/threads:2/real_time", "family_index": 2,
      "per_family_instance_index": 0, "run_name": "adam/float32/avx512_bf16/33554432/threads:2/real_time",
      "run_type": "iteration", "repetitions": 2, "repetition_index": 0, "threads": 1, "iterations": 4,
      "real_time": 1.7e7, "cpu_time": 1.6e7, "time_unit": "ns",
      "bytes_per_second": 5.0e10, "time_per_element": 5.0e-10, "updated": 3.0
    },
    {
      "name": "adam/float32/avx512_bf16/33554432/threads:2/real_time_median", "family_index": 2,
      "per_family_instance_index": 0, "run_name": "adam/float32/avx512_bf16/33554432/threads:2/real_time",
      "run_type": "aggregate", "repetitions": 2, "threads": 1, "aggregate_name": "median", "aggregate_unit": "time",
      "iterations": 2, "real_time": 2.1e7, "cpu_time": 2.0e7, "time_unit": "ns",
      "bytes_per_second": 4.0e10, "time_per_element": 6.25e-10, "updated": 3.0
    },
    {
      "name": "traffic/float32/baseline/33554432/updated:3/threads:2/real_time", "family_index": 0,
      "per_family_instance_index": 0, "run_name": "traffic/float32/baseline/33554432/updated:3/threads:2/real_time",
      "run_type": "iteration", "repetitions": 2, "repetition_index": 0, "threads": 1, "iterations": 4,
      "real_time": 1.7e7, "cpu_time": 1.6e7, "time_unit": "ns",
      "bytes_per_second": 5.0e10, "time_per_element": 5.0e-10, "updated": 3.0
    },
    {
      "name": "sparse_adam/bfloat16_float32_states/avx2/4096/real_time", "family_index": 1,
      "per_family_instance_index": 0, "run_name": "sparse_adam/bfloat16_float32_states/avx2/4096/real_time",
      "run_type": "iteration", "repetitions": 2, "repetition_index": 0, "threads": 1, "iterations": 400,
      "real_time": 4.096e3, "cpu_time": 4.0e3, "time_unit": "ns",
      "bytes_per_second": 2.2e10, "time_per_element": 1.0e-9, "updated": 3.0
    }
  ]
}
""")


@pytest.fixture(scope="module")
def kernels():
    spec = importlib.util.spec_from_file_location("bench_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def process(stdout="", stderr="", returncode=0):
    return subprocess.CompletedProcess([], returncode, stdout, stderr)


def test_a_row_for_each_benchmark_in_the_programs_order_with_its_repetitions_in_theirs(kernels):
    of_traffic, sparse_adam, adam = kernels.rows_of(REPORT)
    assert adam == {
        "rule": "adam",
        "format": "float32",
        "isa": "avx512_bf16",
        "elements": 33554432,
        "threads": 2,
        "updated": 3,
        "ns_per_element": [pytest.approx(0.5), pytest.approx(0.75)],
        "bytes_per_second": [5e10, 3e10],
    }
    assert (sparse_adam["rule"], sparse_adam["format"], sparse_adam["isa"]) == (
        "sparse_adam",
        "bfloat16_float32_states",
        "avx2",
    )
    assert (sparse_adam["elements"], sparse_adam["threads"], sparse_adam["ns_per_element"]) == (
        4096,
        1,
        [pytest.approx(1)],
    )
    assert (of_traffic["rule"], of_traffic["elements"], of_traffic["threads"]) == ("traffic", 33554432, 2)


def test_the_table_tells_medians_and_fractions_of_the_traffic_alone(kernels):
    of_traffic, sparse_adam, adam = (line.split() for line in kernels.table(kernels.rows_of(REPORT)).splitlines()[1:])
    assert of_traffic[-1] == "100%"
    assert adam[-3:] == ["0.625", "40.0", "80%"]
    assert sparse_adam[-2:] == ["1.000", "22.0"]  # with as few elements no traffic was measured


def test_the_limit_is_the_fastest_loop(kernels, monkeypatch):
    more = copy.deepcopy(REPORT)
    for index, (loop, factor) in enumerate((("prefetch_512", 2.0), ("tiles_1024", 0.5)), 10):
        (run,) = [copy.deepcopy(run) for run in REPORT["benchmarks"] if run["run_name"].startswith("traffic/")]
        run["name"] = run["run_name"] = run["run_name"].replace("baseline", loop)
        run["family_index"] = index
        run["bytes_per_second"] *= factor
        run["time_per_element"] /= factor
        more["benchmarks"].append(run)
    rows = kernels.rows_of(more)
    assert kernels.limits(rows) == {(33554432, 2, 3): 1e11}
    adam = kernels.table(rows).splitlines()[3].split()
    assert (adam[0], adam[-1]) == ("adam", "40%")
    monkeypatch.setattr(kernels, "rows_measured", lambda quick, rounds, only: rows)
    _, adam = kernels.measure(True, 2)
    assert adam.samples["limit"] == [pytest.approx(33554432 * 2.5e-10)]


def test_a_wrong_result_is_no_figure(kernels, monkeypatch, capsys, tmp_path):
    wrong = copy.deepcopy(REPORT)
    run = wrong["benchmarks"][0]
    run |= {"error_occurred": True, "error_message": "not the bits of the reference: operand 2", "iterations": 0}
    for figure in ("bytes_per_second", "time_per_element", "updated"):
        del run[figure]
    monkeypatch.setattr(kernels, "build", lambda: "kernels_bench")
    monkeypatch.setattr(kernels, "call", lambda command: process(json.dumps(wrong), returncode=1))
    assert kernels.main(["--quick", "--json", str(tmp_path / "rows.json")]) == 1
    told = capsys.readouterr()
    assert "adam/float32/avx512_bf16/33554432/threads:2/real_time: not the bits of the reference: operand 2" in told.err
    assert not told.out
    assert not (tmp_path / "rows.json").exists()


def test_the_program_is_run_as_asked_and_its_rows_are_written(kernels, monkeypatch, capsys, tmp_path):
    asked = []

    def call(command):
        asked.extend(command)
        return process(json.dumps(REPORT))

    monkeypatch.setattr(kernels, "build", lambda: "kernels_bench")
    monkeypatch.setattr(kernels, "call", call)
    assert kernels.main(["--rounds", "7", "--filter", "^adam/", "--json", str(tmp_path / "rows.json")]) == 0
    assert {
        "--benchmark_filter=^adam/",
        "--benchmark_repetitions=7",
        "--benchmark_enable_random_interleaving=true",
    } <= set(asked)
    rows = kernels.rows_of(REPORT)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert capsys.readouterr().out.strip() == kernels.table(rows)


def test_a_program_that_ends_early_tells_why(kernels, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "build", lambda: "kernels_bench")
    monkeypatch.setattr(kernels, "call", lambda command: process("", "Failed to match any benchmarks", 1))
    assert kernels.main([]) == 1
    assert capsys.readouterr().err == "bench/kernels.py: kernels_bench ended with 1: Failed to match any benchmarks\n"


def test_without_cmake_it_says_what_to_install(kernels, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert kernels.main([]) == 1
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "Debian's package cmake" in told


def test_without_google_benchmark_it_says_what_to_install(kernels, monkeypatch, capsys, tmp_path):
    """As CMake finds it: the project is configured for real, where the library is switched off."""
    monkeypatch.setattr(kernels, "BUILD", tmp_path)
    real = kernels.call
    without = "-DCMAKE_DISABLE_FIND_PACKAGE_benchmark=ON"
    monkeypatch.setattr(kernels, "call", lambda command: real([*command, without]))
    assert kernels.main([]) == 1
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "libbenchmark-dev" in told


def test_the_results_of_the_whole_benchmark(kernels, monkeypatch):
    """A result for each rule and format, a contender for each instruction set, and the limit where there is one."""
    monkeypatch.setattr(kernels, "rows_measured", lambda quick, rounds, only: kernels.rows_of(REPORT))
    sparse, adam = kernels.measure(True, 2)
    assert (sparse.workload, sparse.optimizer) == (
        "kernel: bfloat16_float32_states, 4096 elements, 1 thread",
        "sparse_adam",
    )
    assert sparse.samples == {"avx2": [pytest.approx(4.096e-6)]}
    assert sparse.moved == round(2.2e10 * 4.096e-6)
    assert (adam.workload, adam.elements) == ("kernel: float32, 33554432 elements, 2 threads", 33554432)
    assert adam.samples == {
        "avx512_bf16": [pytest.approx(33554432 * 5.0e-10), pytest.approx(33554432 * 7.5e-10)],
        "limit": [pytest.approx(33554432 * 5.0e-10)],
    }

    def missing(*_):
        raise kernels.BenchError("Google Benchmark is needed")

    monkeypatch.setattr(kernels, "rows_measured", missing)
    assert list(kernels.measure(True, 2)) == ["Google Benchmark is needed"]
