"""bench/frameworks.py, in the frameworks themselves."""

import frameworks


def test_every_framework_is_measured():
    results = list(frameworks.measure(quick=True, rounds=1))
    wanted = [
        f"frameworks: {name}, {what}"
        for name in ("transformers.Trainer", "accelerate", "Lightning", "timm")
        for what in ("whole step", "optimizer's part")
    ]
    assert [r if isinstance(r, str) else r.workload for r in results] == wanted
    for whole, part in zip(results[::2], results[1::2], strict=True):
        assert list(whole.samples) == list(part.samples) == ["onepass", "default", "fused"]
        for contender in whole.samples:
            assert 0 < part.samples[contender][0] < whole.samples[contender][0]
        assert part.tensors > 50
    assert frameworks.versions().keys() == {"accelerate", "lightning", "timm", "transformers"}
