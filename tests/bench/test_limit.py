"""The limit of the benchmarks: every loop computes the sums, and the fastest is told."""

import pytest
import torch
from cases import ROW
from onepass import LAMB, SGD, AdamW, _traffic
from onepass.cli import limit
from onepass.cli.bench import SUBJECTS

LOOPS = _traffic.loops()
LENGTHS = (0, 1, 3, 15, 16, 17, 255, 256, 257, 4099)


def test_there_are_loops_with_prefetch_and_without():
    assert "plain" in LOOPS
    assert any("prefetch" in loop for loop in LOOPS)
    assert any("tiles" in loop for loop in LOOPS)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("updated", range(1, 7))
@pytest.mark.parametrize("loop", LOOPS)
def test_the_first_is_added_to_the_others(loop, updated, threads):
    """Rows of every length, of arrays that begin at any element, with one more element on either side."""
    memory = [torch.randn(1 + updated, length + 2) for length in LENGTHS]
    rows = [list(block[:, 1:-1]) for block in memory]
    expected = [block.clone() for block in memory]
    for block in expected:
        block[1:, 1:-1] += block[0, 1:-1]
    assert _traffic.add(loop, rows, threads) == 0.0
    assert all(torch.equal(*pair) for pair in zip(memory, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("arrays", range(1, 7))
@pytest.mark.parametrize("loop", LOOPS)
def test_what_is_measured_is_summed_before_the_rest_is_added(loop, arrays, threads):
    """Whole numbers, whose sum is exact in any order. The arrays that are updated are measured, too."""
    memory = [torch.randint(-9, 9, (1 + arrays, length + 2)).float() for length in LENGTHS]
    rows = [list(block[:, 1:-1]) for block in memory]
    expected = sum(float(row.sum()) for rows_of_tensor in rows for row in rows_of_tensor[1:])
    assert expected != 0
    assert _traffic.add(loop, rows, threads, [row[1:] for row in rows]) == expected


FLAT = torch.zeros(4)


@pytest.mark.parametrize(
    ("loop", "row", "threads", "message"),
    [
        ("fast", [FLAT, FLAT], 1, "unknown loop fast; there are: plain, "),
        ("plain", [FLAT, FLAT], 0, "threads must be >= 1, got 0"),
        ("plain", [FLAT], 1, "a row must have a tensor to read and 1 to 6 tensors to update, got 1 tensors"),
        ("plain", [FLAT] * 8, 1, "got 8 tensors"),
        ("plain", [FLAT, torch.zeros(5)], 1, "of one length"),
        ("plain", [FLAT, torch.zeros(2, 2)], 1, "flat"),
        ("plain", [FLAT, torch.zeros(8)[::2]], 1, "contiguous"),
        ("plain", [FLAT, torch.zeros(4, dtype=torch.float64)], 1, "float32"),
        ("plain", [FLAT, torch.zeros(4, device="meta")], 1, "on the CPU"),
    ],
)
def test_what_a_loop_cannot_take_is_an_error(loop, row, threads, message):
    with pytest.raises(ValueError, match=message):
        _traffic.add(loop, [[FLAT.clone(), FLAT.clone()], row], threads)
    assert not FLAT.any()


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ([[FLAT], [FLAT]], "measured must have a list for each row, got 2"),
        ([[FLAT] * 7], "a list of measured must have 0 to 6 tensors, got 7"),
        ([[torch.zeros(5)]], "of one length"),
    ],
)
def test_what_a_loop_cannot_measure_is_an_error(measured, message):
    row = [torch.ones(4), torch.zeros(4)]
    with pytest.raises(ValueError, match=message):
        _traffic.add("plain", [row], 1, measured)
    assert not row[1].any()


def test_the_arrays_of_a_step_and_their_bytes():
    p = torch.nn.Parameter(torch.zeros(3, 4))
    p.grad = torch.ones(3, 4)
    step = AdamW([p]).step
    step()
    (row,) = limit.arrays_of(step, [p])
    assert [array.shape for array in row] == [(12,)] * 4
    assert row[0].data_ptr() == p.grad.data_ptr()
    assert row[1].data_ptr() == p.data_ptr()
    assert limit.moved_by([row]) == 12 * 4 * 7
    step = SGD([p], lr=0.1).step
    step()
    assert limit.moved_by(limit.arrays_of(step, [p])) == 12 * 4 * 3


def test_what_a_rule_measures_is_moved_once_more():
    p = torch.nn.Parameter(torch.zeros(3, 4))
    p.grad = torch.ones(3, 4)
    step = LAMB([p]).step
    step()
    (measured,) = limit.measured_of(step, [p], ("param", "grad", "exp_avg_sq"))
    assert [array.shape for array in measured] == [(12,)] * 3
    assert [array.data_ptr() for array in measured[:2]] == [p.data_ptr(), p.grad.data_ptr()]
    rows = limit.arrays_of(step, [p])
    assert measured[2].data_ptr() == rows[0][3].data_ptr()
    assert limit.moved_by(rows, [measured]) == 12 * 4 * (7 + 3)


def test_a_rule_whose_update_needs_sums_has_what_it_sums_in_the_limit():
    """The sums of Prodigy are for its next step, so its update is in the same pass."""
    with_sums = {subject.name for subject in SUBJECTS if ROW[subject.name].sums}
    assert {subject.name for subject in SUBJECTS if subject.measured} == with_sums - {"Prodigy"}


def test_every_loop_is_run_and_the_fastest_is_the_limit():
    rows = [[torch.ones(4), torch.zeros(4)]]
    runs = limit.runs(rows)
    assert list(runs) == [f"limit: {loop}" for loop in LOOPS]
    for run in runs.values():
        run()
    assert torch.equal(rows[0][1], torch.full((4,), float(len(LOOPS))))
    samples = {"onepass": [3.0, 3.0, 3.0], "limit: a": [2.0, 9.0, 2.1], "limit: b": [1.0, 2.5, 2.6], "fused": [4.0] * 3}
    assert limit.fastest(samples) == {
        "onepass": [3.0, 3.0, 3.0],
        "fused": [4.0] * 3,
        "limit": [2.0, 9.0, 2.1],  # by its median, not its best
    }
    assert limit.fastest({"onepass": [1.0]}) == {"onepass": [1.0]}
