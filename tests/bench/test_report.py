"""bench/report.py, charts.py and compare.py on made-up figures; README.md and docs/benchmarks.md show their file."""

import json
import re

import compare
import figures
import gpu_report
import pytest
import report
from onepass.cli import bench
from onepass.cli.timing import Result

ROUNDS = (0.98, 1.0, 1.01, 0.99, 1.02)  # of the median: what a calm machine does
CLASSES = [subject.name for subject in bench.SUBJECTS]


def made(workload, optimizer, seconds, ratios, elements=1000, tensors=1, moved=0, question="", rounds=ROUNDS):
    """A result with these medians."""
    first, *_ = ratios
    samples = {name: [seconds * ratio * r for r in rounds] for name, ratio in ratios.items()}
    assert first == "onepass" or ratios[first] == 1
    return Result(workload, optimizer, elements, tensors, samples, moved, question)


LARGE = {"elements": 1 << 26, "tensors": 16, "question": "large", "moved": 7 << 28}
SMALL = {"elements": 100_000, "tensors": 1000, "question": "small"}


@pytest.fixture
def results():
    """Something of everything."""
    ours = {"onepass": 1.0}
    of_torch = {"default": 14.26, "foreach": 5.0, "fused": 0.934}
    found = [
        made(
            "large: 16 x 4M",
            "AdamW",
            1 / 16,
            {**ours, **of_torch, "limit": 0.9, "optimi": 4.0, "DeepSpeed": 1.2},
            **LARGE,
        ),
        made("large: 16 x 4M", "Lion", 1 / 32, {**ours, "default": 7.0, "limit": 1.02}, **LARGE),
        made("1M x 64, 4096 rows", "SparseAdam", 6e-4, {**ours, "default": 7.6}, 1 << 26, question="large"),
        made("4 x 1024 x 1024", "Muon", 0.344, {**ours, "default": 0.997}, 4 << 20, question="large"),
        made("small: 1000 x 100", "AdamW", 8e-4, {**ours, **of_torch, "compiled": 2.5}, **SMALL),
        made("small: 1000 x 100", "Lion", 5e-4, {**ours, "default": 30.0}, **SMALL),
        made("small, fresh gradients", "AdamW", 2e-3, {**ours, **of_torch, "compiled": 0.8}, **SMALL),
        made("500 groups", "AdamW", 5e-4, {"one group": 1, "a group each": 0.9}, 50_000, 500, question="small"),
        made(
            "training: digits, whole step", "AdamW", 0.01, {**ours, "default": 1.3, "fused": 1.05}, question="training"
        ),
        made(
            "training: digits, optimizer's part", "AdamW", 5e-4, {**ours, "default": 7, "fused": 2}, question="training"
        ),
        made("tail: 99th percentile", "SGD", 1e-5, {**ours, "default": 3}, question="tail"),
        made("something new", "SGD", 1e-5, ours, question="novelty"),
    ]
    for n in (10, 100, 10_000):
        found.append(made(f"small: {n} x 100", "AdamW", n * 1e-6, {**ours, "fused": 4.0}, n * 100, n, question="small"))
    for n in (1000, 10**6, 10**9):
        times = {**ours, "fused": 1.5, "limit": 0.8}
        found.append(made(f"elements: 1e{len(str(n)) - 1}", "AdamW", n * 1e-9, times, n, question="scaling"))
    for what, seconds, default, fused in (("whole step", 0.02, 1.1, 0.999), ("optimizer's part", 1e-3, 4.0, 1.5)):
        times = {**ours, "default": default, "fused": fused}
        found.append(made(f"frameworks: Lightning, {what}", "AdamW", seconds, times, question="frameworks"))
    return found


def written(path, results, **more):
    told = {"missing": {"apex": "needs CUDA"}, "peers": {"optimi": "0.3"}, **more}
    text = json.loads(bench.as_json(results, len(ROUNDS), **told))
    text["machine"]["processor"] = "A Processor"  # whose tables are those of README.md
    path.write_text(json.dumps(text))
    return path


@pytest.fixture
def file(tmp_path, results):
    return written(tmp_path / "figures.json", results)


def row(text, start, nth=0):
    """The cells of a table's line that starts so."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in lines[nth].strip("|").split("|")]


# Choosing.


def test_the_strongest_peer_is_the_fastest_and_never_the_limit(results):
    adamw, lion, *_ = results
    assert figures.strongest(adamw) == ("fused", pytest.approx(0.934))
    assert figures.strongest(adamw, beyond=figures.TORCH) == ("DeepSpeed", pytest.approx(1.2))
    assert figures.strongest(lion) == ("default", pytest.approx(7))
    assert figures.strongest(lion, beyond=figures.TORCH) is None
    assert "limit" in adamw.ratios()
    assert not {"limit", "onepass"} & figures.peers(adamw).keys()


def test_a_result_that_does_not_say_its_question_says_it_in_its_workload():
    results = [made(workload, "SGD", 1, {"onepass": 1}) for workload in (*bench.SIZES, bench.FRESH)]
    assert [figures.question(r) for r in results] == ["large", "small", "small", "small"]


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (0.5, "0.50x"),
        (0.996, "0.996x"),
        (1, "1.00x"),
        (1.239, "1.24x"),
        (5.04, "5.0x"),
        (14.26, "14.3x"),
        (30.4, "30x"),
    ],
)
def test_ratios_have_sensible_digits(ratio, text):
    assert figures.times(ratio) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21e-9, "3.21 ns"), (1.2e-5, "12.0 us"), (0.344, "344 ms"), (2, "2.00 s"), (1234, "1234 s"), (0, "0 ns")],
)
def test_times_have_the_unit_that_suits_them(seconds, text):
    assert figures.duration(seconds) == text


@pytest.mark.parametrize(
    ("n", "text"), [(6, "6"), (1000, "1,000"), (65536, "65.5k"), (1 << 26, "67.1M"), (10**9, "1G")]
)
def test_counts_are_short(n, text):
    assert figures.count(n) == text


# Tables.


def test_the_table_of_large_tensors(file):
    block = report.benchmarks_block(file)
    assert "**Large tensors**, 67.1M elements in 16 tensors:" in block
    head = ["", "ns/parameter", "of the limit", "GB/s", "default", "foreach", "fused", "strongest other"]
    assert row(block, "") == head
    assert row(block, "AdamW") == ["AdamW", "0.931", "90%", "30.1", "14.3x", "5.0x", "**0.93x**", "1.20x DeepSpeed"]
    assert row(block, "Lion") == ["Lion", "0.466", "102%", "60.1", "7.0x", "", "", ""]


def test_the_table_of_small_tensors_has_both_kinds_of_gradients_in_a_cell(file):
    block = report.benchmarks_block(file)
    ratios = ["14.3x / 14.3x", "5.0x / 5.0x", "**0.93x** / **0.93x**", "2.5x compiled / **0.80x** compiled"]
    assert row(block, "AdamW", 1) == ["AdamW", "0.800 / 2.00", *ratios]
    assert row(block, "Lion", 1) == ["Lion", "0.500 / -", "30x / -", "", "", ""]


def test_the_other_tables_of_the_benchmarks_page(file):
    block = report.benchmarks_block(file)
    assert row(block, "SparseAdam, 1M x 64, 4096 rows") == [
        "SparseAdam, 1M x 64, 4096 rows",
        "",
        "600 us",
        "default 7.6x",
    ]
    assert row(block, "Muon, 4 x 1024 x 1024")[-1] == "default **0.997x**"
    assert row(block, "AdamW, 500 groups")[1:] == [
        "one group",
        "500 us",
        "a group each 0.90x",
    ]  # neither is ahead of us
    shares = ["26.9%", "9.5%", "5.0%"]
    assert row(block, "digits") == ["digits", "AdamW", "10.0 ms", "1.30x", "1.05x fused", *shares]
    assert block.count("small: ") == 0  # what has a table of its own


def test_the_table_of_frameworks(tmp_path, file, results):
    wanted = ["Lightning", "AdamW", "1.00 ms", "4.0x", "1.50x", "18.2%", "7.5%", "5.0%"]
    for text in (report.benchmarks_block(file), report.report(file)):
        assert row(text, "Lightning") == wanted
    note = "frameworks: timm is not measured: ModuleNotFoundError: No module named 'timm'"
    notes = ["small: something else", note]
    block = report.benchmarks_block(written(tmp_path / "notes.json", results, notes=notes))
    assert block.count("timm is not measured: ModuleNotFoundError: No module named 'timm'.") == 1
    assert "something else" not in block
    whole, part = results[-2:]
    assert "In other frameworks" not in report.benchmarks_block(written(tmp_path / "whole.json", [whole]))
    assert row(report.benchmarks_block(written(tmp_path / "part.json", [part])), "Lightning") == wanted[:5]
    slower = made(part.workload, "AdamW", 1e-3, {"onepass": 1, "default": 4.0, "fused": 0.9})
    assert row(report.benchmarks_block(written(tmp_path / "slower.json", [slower])), "Lightning")[4] == "**0.90x**"


def test_the_block_tells_what_the_figures_hold_for(file):
    told, _ = figures.load(file)
    first, *_, last = report.benchmarks_block(file).splitlines()
    for text in (
        told["machine"]["processor"],
        told["machine"]["date"],
        told["machine"]["torch"],
        "5 rounds",
        "optimi 0.3",
    ):
        assert text in first
    assert last == "Not measured: apex (needs CUDA)."


def test_the_report_has_every_result_and_every_contender(file, results):
    text = report.report(file)
    titles = re.findall(r"^## (.*)", text, re.M)
    told = ("large", "small", "scaling", "tail", "training", "frameworks")
    assert titles == [*(report.QUESTIONS[q] for q in told), "Novelty"]
    for r in results:
        own = f"### {r.workload}\n" in text  # a table of its own, or a row among others
        start = f"### {r.workload}\n" if own else f"| {r.workload} | {r.optimizer} |"
        found = text[text.index(start) :].split("\n\n| workload" if own else "\n")[0]
        assert r.optimizer in found
        assert all(name in found for name in r.samples)
    assert row(text, "AdamW")[5:] == ["14.3x", "5.0x", "**0.93x**", "0.90x", "4.0x", "1.20x"]  # the limit is never bold
    assert row(text, "10") == ["10", "1.00, 4.0x fused"]  # the grid of AdamW


def test_what_else_a_file_tells_is_shown(tmp_path):
    rows = [{"rule": "adam", "threads": 2, "ns": [0.3, 0.1, 0.21]}, {"rule": "sgd", "threads": 1}]
    file = written(tmp_path / "more.json", [], kernels=rows, installation={"wheel": "1.6 MB"}, note="calm")
    text = report.report(file)
    assert row(text, "adam") == ["adam", "2", "0.210"]
    assert row(text, "sgd") == ["sgd", "1", ""]
    assert row(text, "wheel") == ["wheel", "1.6 MB"]
    assert re.findall(r"^## (.*)", text, re.M) == ["Kernels alone", "Installation", "Note"]


@pytest.mark.parametrize("kept", [[0], [2], [6], [7], [8], [9], [10], [11], [12, 13], [18], [19], []])
def test_whatever_is_absent_breaks_nothing(tmp_path, results, kept):
    file = written(tmp_path / "few.json", [results[i] for i in kept], missing={}, peers={})
    text = report.report(file)
    assert all(results[i].workload in text for i in kept)
    assert report.benchmarks_block(file)
    assert "Not measured" not in text


def test_a_quick_look_can_be_reported(tmp_path, capsys):
    results = [
        made(w, s, 1e-3, {"onepass": 1, "default": 2}, 1 << 20, 16)
        for w in (*bench.SIZES, bench.FRESH)
        for s in CLASSES
    ]
    file = tmp_path / "quick.json"
    file.write_text(bench.as_json(results, 3))
    assert report.main([str(file)]) == 0
    assert capsys.readouterr().out.count("| Rprop |") == 4
    assert "1.05M elements in 16 tensors" in report.benchmarks_block(file)


# README.md and docs/benchmarks.md.


@pytest.mark.parametrize(
    ("page", "mark"),
    [(page, mark) for page in (report.README, report.BENCHMARKS) for mark in (report.CPU_MARK, report.GPU_MARK)]
    + [(report.BENCHMARKS, report.AMD_MARK)]
    + [(page, report.STATES_MARK) for page in (report.README, report.STATES)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_page_shows_what_its_file_says(page, mark):
    ((name, text),) = report.blocks(page, mark)
    if name == "none":
        assert mark == report.GPU_MARK
        assert not text
        return
    assert dict(report.pages(name))[page] == text
    assert report.mark_of(figures.load(name)[0]) == mark


def test_the_others_are_all_optimizers_of_workloads_without_adamw():
    ours = {"onepass": 1.0, "default": 2.0}
    names = [("matrix", "Adafactor"), ("matrix", "CAME"), ("groups", "AdamW"), ("groups", "SGD")]
    found = [made(workload, name, 0.01, ours, question="large") for workload, name in names]
    lines = report.rest_table(found, []).splitlines()[2:]
    assert [line.split(" |")[0] for line in lines] == ["| Adafactor, matrix", "| CAME, matrix", "| AdamW, groups"]


def test_the_short_table(file, tmp_path, results):
    block = report.readme_block(file)
    assert "67.1M elements in 16 tensors" in block
    assert row(block, "AdamW") == ["AdamW", "0.931", "14.3x", "**0.93x**", "2.00", "14.3x", "**0.93x**"]
    assert row(block, "Lion") == ["Lion", "0.466", "7.0x", "", "", "", ""]
    with pytest.raises(ValueError, match="neither large tensors nor small ones"):
        report.readme_block(written(tmp_path / "none.json", [r for r in results if r.question == "training"]))


PAGE = (
    "before\n<!-- bench/report.py: old.json -->\nold\n<!-- end -->\n"
    "between\n<!-- bench/report.py, GPU: none -->\n<!-- end -->\nafter\n"
)


def test_a_block_is_replaced(tmp_path, monkeypatch, file, gpu_file):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    report.write_block(file, page, "new")
    cpu = "before\n<!-- bench/report.py: figures.json -->\nnew\n<!-- end -->\n"
    assert page.read_text() == cpu + "between\n<!-- bench/report.py, GPU: none -->\n<!-- end -->\nafter\n"
    for text in ("newer", "newest"):
        report.write_block(gpu_file, page, text)
        gpu = f"between\n<!-- bench/report.py, GPU: gpu.json -->\n{text}\n<!-- end -->\nafter\n"
        assert page.read_text() == cpu + gpu
    page.write_text("no marks\n")
    for path in (file, gpu_file):
        with pytest.raises(ValueError, match="0 blocks"):
            report.write_block(path, page, "new")


@pytest.mark.parametrize("of_gpu", [False, True])
def test_both_pages_are_written(of_gpu, tmp_path, monkeypatch, file, gpu_file, capsys):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    path = gpu_file if of_gpu else file
    for name in ("README", "BENCHMARKS"):
        page = tmp_path / f"{name}.md"
        page.write_text(PAGE)
        monkeypatch.setattr(report, name, page)
    assert report.main([str(path), "--docs"]) == 0
    assert report.readme_block(path) in (tmp_path / "README.md").read_text()
    assert report.benchmarks_block(path) in (tmp_path / "BENCHMARKS.md").read_text()
    assert ("old.json" in (tmp_path / "README.md").read_text()) is of_gpu


# The states.


@pytest.fixture
def states_file(tmp_path):
    row = {"bytes of states": 8.0, "bytes with parameter": 12.0, "ns/parameter": 0.5, "losses": [2.0, 2.5]}
    rows = [
        {"optimizer": "AdamW", "contender": "onepass, float32", **row, "loss apart": 0.0, "largest update": 2.25},
        {"optimizer": "Lion", "contender": "onepass, 8 bits", **row, "loss apart": -0.0031, "largest update": None},
    ]
    path = tmp_path / "states.json"
    path.write_text(bench.as_json([], 5, missing={"Lion, torchao": "no such class"}, states=rows))
    return path


def test_the_table_of_states(tmp_path, monkeypatch, states_file, capsys):
    text = report.report(states_file)
    assert row(text, "AdamW") == ["AdamW", "onepass, float32", "8.00", "12.00", "0.500", "2.2500", "+0.00%", "2.2"]
    assert row(text, "Lion")[-2:] == ["-0.31%", ""]
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for name in ("README", "STATES"):
        page = tmp_path / f"{name}.md"
        page.write_text(PAGE + "<!-- bench/report.py, states: old.json -->\nold\n<!-- end -->\n")
        monkeypatch.setattr(report, name, page)
    assert report.main([str(states_file), "--docs"]) == 0
    readme, states = ((tmp_path / f"{name}.md").read_text() for name in ("README", "STATES"))
    assert readme.startswith(PAGE)
    assert row(readme, "onepass, float32")[1:3] == ["8.00", "12.00"]
    assert "onepass, 8 bits" not in readme
    assert "| Lion | onepass, 8 bits |" in states
    assert "Not measured: Lion, torchao (no such class)." in states


# A GPU.


def both(workload, optimizer, device, wall, foreach, fused=None, limit=None, **more):
    """The results of a comparison by both clocks; the wall clock's ratios are half the device's."""
    found = []
    for question, seconds, part in (("device time", device, 1.0), ("wall time", wall, 0.5)):
        times = {"onepass": 1.0, "foreach": part * foreach, **({"fused": part * fused} if fused else {})}
        if limit and question == "device time":
            times["limit"] = limit
        found.append(made(workload, optimizer, seconds, times, question=question, **more))
    return found


@pytest.fixture
def gpu_results():
    big = {"elements": 200 << 20, "tensors": 200, "moved": 28 * 200 << 20}
    small = {"elements": 1_000_000, "tensors": 1000}
    found = [
        *both("large: 200 x 1M", "AdamW", 2e-3, 2.1e-3, 3.1, 1.1, limit=0.96, **big),
        *both("large: 200 x 1M", "Lion", 1.4e-3, 1.5e-3, 2.8, limit=0.97, **big),
        *both("small: 1000 x 1,000", "AdamW", 2e-5, 1.5e-3, 90.0, 7.0, **small),
        *both("small: 1000 x 1,000", "Lion", 2e-5, 1.4e-3, 12.0, **small),
        *both("tail: 200 x 1M", "AdamW", 3e-3, 3.1e-3, 6.0, 1.8, limit=0.95, **big),
        *both("tail: 1000 x 1,000", "AdamW", 4e-5, 2e-3, 99.0, 9.0, **small),
        *both("graph: 1000 x 1,000", "AdamW", 3e-5, 4e-5, 15.0, 3.3, **small),
        *both("bfloat16 states: 200 x 1M", "SGD", 1e-3, 1e-3, 2.2, 0.96, limit=0.9, **big),
        *both("capturable: 1000 x 1,000", "Adam", 3e-5, 3e-3, 9.0, 4.4, **small),
        *both("tail, one graph: 1000 x 1,000", "AdamW", 5e-5, 6e-5, 12.0, 2.6, **small),
    ]
    for what, seconds, foreach, fused in (("whole step", 0.02, 1.1, 1.01), ("optimizer's part", 1e-3, 4.0, 1.5)):
        times = {"onepass": 1.0, "foreach": foreach, "fused": fused}
        size = {"elements": 124_000_000, "tensors": 148, "question": "device time"}
        found.append(made(f"training: GPT-2, {what}", "AdamW", seconds, times, **size))
    wall = made("groups: 500 x 1,000", "AdamW", 1e-3, {"onepass": 1, "fused": 9.0, "onepass, one group": 0.7})
    found += [Result(**{**vars(wall), "question": clock}) for clock in gpu_report.CLOCKS]
    return found


@pytest.fixture
def gpu_file(tmp_path, gpu_results):
    waiting = [
        {"workload": "large: 200 x 1M", "optimizer": "Lion", "contenders": "foreach"},
        {"workload": "small: 1000 x 1,000", "optimizer": "Lion", "contenders": "foreach"},
    ]
    more = {"launch-bound": waiting, "losses": {"onepass": [3.0, 2.0]}, "not measured": {}}
    about = {"copy rate, GB/s": 2987.9, "GPU": "Some GPU", "CUDA of torch": "13.0", "driver": "580.1"}
    return written(tmp_path / "gpu.json", gpu_results, peers={}, missing={}, device=about, **more)


def test_the_tables_of_a_gpu(gpu_file):
    block = report.benchmarks_block(gpu_file)
    assert block.startswith("## On a GPU\n\nSome GPU, CUDA 13.0, driver 580.1, a copy of 1 GiB at 2,988 GB/s; host: ")
    assert "**Large tensors**, 210M elements in 200 tensors" in block
    assert row(block, "AdamW") == ["AdamW", "2.00 ms", "96%", "2936", "3.1x", "1.10x"]
    assert row(block, "Lion") == ["Lion", "1.40 ms", "97%", "4194", "2.8x", ""]
    states = ["SGD, bfloat16 states", "1.00 ms", "90%", "5872", "2.2x", "**0.96x**"]
    assert row(block, "SGD, bfloat16 states") == states
    assert row(block, "AdamW", 1) == ["AdamW", "1.50 ms", "45x", "3.5x", "30.0 us", "15.0x", "3.3x"]
    assert row(block, "Lion", 1) == ["Lion", "1.40 ms", "6.0x", "", "", "", ""]
    assert row(block, "200 x 1M") == ["200 x 1M", "3.10 ms", "95%", "3.0x", "**0.90x**"]
    assert row(block, "1000 x 1,000, a replayed graph")[1:] == ["50.0 us", "", "12.0x", "2.6x"]
    assert row(block, "whole step") == ["whole step", "20.0 ms", "1.10x", "1.01x"]
    assert row(block, "optimizer's share") == ["optimizer's share", "5.0%", "18.2%", "7.4%"]
    assert row(block, "Adam, capturable: 1000 x 1,000")[1:] == ["3.00 ms", "foreach 4.5x, fused 2.2x"]
    assert row(block, "AdamW, groups: 500 x 1,000")[1:] == ["1.00 ms", "fused 9.0x, onepass, one group 0.70x"]
    last = "Times on the device that include waiting for the host: Lion, large: 200 x 1M (foreach)."
    assert block.splitlines()[-1] == last
    assert "training: GPT-2" in report.report(gpu_file)


def test_the_short_table_of_a_gpu(gpu_file, gpu_results, tmp_path):
    block = report.readme_block(gpu_file)
    assert row(block, "AdamW, 200 x 1M") == ["AdamW, 200 x 1M", "2.00 ms", "3.1x", "1.10x", "96%"]
    tail = f"{gpu_report.TAIL}, 200 x 1M, with the host's time"
    assert row(block, tail)[1:] == ["3.10 ms", "3.0x", "**0.90x**", "95%"]
    assert row(block, "AdamW, 1000 x 1,000, with the host's time")[1:] == ["1.50 ms", "45x", "3.5x", ""]
    assert row(block, "AdamW, 1000 x 1,000, replayed CUDA graph")[1:] == ["30.0 us", "15.0x", "3.3x", ""]
    assert row(block, "GPT, 124M parameters, AdamW: optimizer's part")[1:] == ["1.00 ms", "4.0x", "1.50x", ""]
    assert len([line for line in block.splitlines() if line.startswith("| ")]) == 2 + 7
    few = written(tmp_path / "few.json", gpu_results[14:16], device={"copy rate, GB/s": 1.0})
    with pytest.raises(ValueError, match="no results of a GPU"):
        report.readme_block(few)


@pytest.mark.parametrize("kept", range(0, 23, 2))
def test_any_part_of_a_gpus_results_can_be_shown(kept, gpu_results, tmp_path):
    some = written(tmp_path / "some.json", gpu_results[kept : kept + 2], device={"copy rate, GB/s": 1.0})
    assert report.benchmarks_block(some).startswith("## On a GPU\n\na dry run without a GPU")
    assert report.report(some)


# Pictures.


def test_pictures_are_drawn_and_their_axes_labelled(file, tmp_path, monkeypatch):
    import charts

    seen = {}
    save = charts.save

    def look(picture, path):
        seen[path.name] = picture
        for axes in picture.axes:
            assert axes.get_xlabel()
            assert axes.get_title(loc="left")
        first = picture.axes[0]
        assert first.get_ylabel() or {label.get_text() for label in first.get_yticklabels()} <= set(CLASSES)
        texts = [text.get_text() for text in picture.texts]
        assert any(figures.machine(figures.load(file)[0]) in text for text in texts)
        return save(picture, path)

    monkeypatch.setattr(charts, "save", look)
    assert report.main([str(file), "--pictures", str(tmp_path / "new")]) == 0
    assert sorted(seen) == ["roofline", "scaling", "speedup", "tensors"]
    for name in seen:
        assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert "<svg" in (tmp_path / "new" / f"{name}.svg").read_text()
    assert {axis.get_xscale() for axis in seen["speedup"].axes} == {"log"}
    units = [seen[name].axes[0].get_ylabel() for name in ("tensors", "scaling")]
    assert units == ["us/tensor", "ns/element"]
    assert "GB/s" in seen["roofline"].axes[0].get_xlabel()
    names = {text.get_text().strip() for text in seen["scaling"].axes[0].texts}
    assert names == {"onepass", "fused", "limit"}


def test_the_bars_are_of_the_strongest_peer_and_of_the_default(results):
    import charts

    picture = charts.speedup(results)
    labels = [text.get_text() for text in picture.axes[0].texts]
    assert labels == ["0.93x fused", "14.3x", "7.0x default"]
    behind, _, ahead = picture.axes[0].patches
    assert behind.get_width() < 0 < ahead.get_width()
    assert behind.get_facecolor() != ahead.get_facecolor()


def test_an_svg_comes_out_the_same_every_time(file, tmp_path):
    import charts

    told, results = figures.load(file)
    first, second = (charts.draw(told, results, tmp_path / folder) for folder in ("a", "b"))
    svgs = {a.stem: (a, b) for a, b in zip(first, second, strict=True) if a.suffix == ".svg"}
    assert sorted(svgs) == sorted(charts.PICTURES)
    assert all(a.read_bytes() == b.read_bytes() for a, b in svgs.values())


def test_what_cannot_be_drawn_is_left_out(results, tmp_path):
    import charts

    assert charts.draw({}, results[10:12], tmp_path) == []
    assert {path.stem for path in charts.draw({}, results[4:6], tmp_path)} == {"speedup"}


# Comparing two files.


def verdict(ours=1.0, mood=1.0, rounds=ROUNDS, ratios=("onepass", "default", "fused")):
    """What is said of a run whose first contender, and machine, have become so much slower."""
    old = made("w", "SGD", 1e-3, dict.fromkeys(ratios, 1.0))
    new = made("w", "SGD", 1e-3 * mood, {name: ours if name == ratios[0] else 1.0 for name in ratios}, rounds=rounds)
    (found,) = compare.compare([old], [new])
    return found


@pytest.mark.parametrize(
    ("ours", "mood", "told"),
    [
        (1, 1, "same"),
        (1.02, 1, "same"),  # 3 % are noise
        (1.1, 1, "slower"),
        (0.9, 1, "faster"),
        (1, 1.2, "machine"),
        (1.1, 0.9, "slower"),  # a machine in a better mood hides nothing
        (0.9, 1.2, "faster"),
        (1.1, 2, "machine"),  # so different a mood tells nothing
        (2, 0.5, "machine"),
    ],
)
def test_verdicts(ours, mood, told):
    found = verdict(ours, mood)
    assert found.verdict == told
    assert found.raw == pytest.approx(ours * mood - 1)
    assert found.beside == pytest.approx(ours - 1)


def test_rounds_that_differ_among_themselves_are_noise():
    steady = dict.fromkeys(("default", "fused"), [1.0] * 5)
    old = Result("w", "SGD", 1, 1, {"onepass": [1.0, 1.1, 0.9, 1.2, 0.8], **steady})
    new = Result("w", "SGD", 1, 1, {"onepass": [1.06, 1.16, 0.96, 1.26, 0.86], **steady})
    assert compare.change(old, new).verdict == "same"


def test_nothing_beside_it_leaves_the_machine():
    assert verdict(1.5, ratios=("onepass",)).verdict == "machine"
    assert verdict(1.0, ratios=("onepass",)).verdict == "same"
    assert verdict(1.5, ratios=("onepass",)).beside is None


def test_few_rounds_are_not_judged():
    assert verdict(1.5, rounds=(1, 1)).verdict == "too few rounds"


def test_only_contenders_of_both_runs_count():
    old = made("w", "SGD", 1, {"onepass": 1, "default": 2, "gone": 3})
    new = made("w", "SGD", 1, {"onepass": 1, "default": 2, "new": 0.1})
    assert compare.change(old, new).beside == pytest.approx(0)


@pytest.fixture
def compared(tmp_path, capsys):
    """Runs the command on two lists of results."""

    def run(old, new, *options, **machine):
        paths = [written(tmp_path / "a.json", old), written(tmp_path / "b.json", new)]
        told = json.loads(paths[1].read_text())
        told["machine"].update(machine)
        paths[1].write_text(json.dumps(told))
        status = compare.main([*map(str, paths), *options])
        return status, capsys.readouterr().out

    return run


def test_the_exit_status_says_that_something_got_slower(compared):
    fast, slow = (made("w", "SGD", 1, {"onepass": t, "default": 2, "fused": 3}) for t in (1, 1.5))
    assert compared([fast], [slow])[0] == 0
    status, text = compared([fast], [slow], "--fail-on-slower")
    assert status == 1
    assert text.splitlines()[-1] == "1 compared: 1 slower"
    assert compared([slow], [fast], "--fail-on-slower")[0] == 0
    assert compared([fast], [fast], "--fail-on-slower")[0] == 0


def test_the_table_starts_with_what_got_slowest(compared):
    slower = [
        made("w", name, 1, {"onepass": t, "default": 2}) for name, t in (("A", 1), ("B", 1.2), ("C", 1.5), ("D", 0.5))
    ]
    same = [made("w", name, 1, {"onepass": 1, "default": 2}) for name in "ABCD"]
    _, text = compared(same, slower)
    assert re.findall(r"^w +(\w)", text, re.M) == ["C", "B", "A", "D"]
    assert re.search(r"^w +C +\+50.0% +\+50.0%  slower$", text, re.M)
    assert text.splitlines()[-1] == "4 compared: 2 slower, 1 faster, 1 same"


def test_what_is_in_one_file_alone_is_told(compared, results):
    status, text = compared(results[:2], results[1:3], "--fail-on-slower")
    assert status == 0
    assert "only in a.json: large: 16 x 4M, 67.1M elements: AdamW" in text
    assert "only in b.json: 1M x 64, 4096 rows, 67.1M elements: SparseAdam" in text
    assert compared(results[:1], results[2:3])[1].splitlines()[-1] == "nothing to compare"


def test_other_sizes_are_not_compared(compared):
    full, quick = (made("large: 16 x 4M", "SGD", 1, {"onepass": 1, "default": 2}, n) for n in (1 << 26, 1 << 20))
    assert "nothing to compare" in compared([full], [quick])[1]


@pytest.mark.parametrize("name", ["processor", "torch", "threads"])
def test_another_machine_is_warned_of(compared, results, name):
    assert "warning" not in compared(results, results)[1]
    assert f"warning: {name} differs" in compared(results, results, **{name: "another"})[1]
