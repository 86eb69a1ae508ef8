# SPDX-License-Identifier: Apache-2.0
"""Number and order of timed calls, their inputs, and statistics of times. No time is asserted."""

from __future__ import annotations

import collections

import pytest
import torch
from example import SIMPLE

from mustdrop_kernels.bench import machine, memory, run, timing
from mustdrop_kernels.bench.cases import Case, Inputs
from mustdrop_kernels.bench.shapes import SHAPES, SWEEP, parse_shape, parse_shapes
from mustdrop_kernels.bench.timing import Effort, Rotation, Timing, interleaved, quartiles

CPU = torch.device("cpu")


def test_quartiles():
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)


def test_ratio_is_taken_within_rounds():
    # The machine became ten times slower after the first round, for both.
    base = Timing({0: 1.0, 1: 10.0, 2: 10.0}, 1, "cpu")
    other = Timing({0: 3.0, 2: 30.0}, 1, "cpu")
    assert other.ratio_to(base) == (3.0, 3.0, 3.0)


def test_slow_candidates_take_part_less_often():
    effort = Effort(seconds=2.0, least=7, most=200)
    assert effort.rounds(1e-3) == 200
    assert effort.rounds(0.5) == 7
    assert effort.rounds(3.0) == 3
    assert effort.rounds(30.0) == 1


def test_every_candidate_gets_every_copy_in_turn():
    copies = [Inputs((i,), {}) for i in range(3)]
    seen: dict[str, collections.Counter] = {"a": collections.Counter(), "b": collections.Counter()}
    calls = {name: lambda inputs, name=name: seen[name].update(inputs.args) for name in seen}
    found = interleaved(calls, copies, CPU, Effort(seconds=0.02, least=3, most=5))
    for name, result in found.items():
        assert 3 <= len(result.samples) <= 5
        assert all(seconds >= 0 for seconds in result.samples.values())
        assert set(seen[name]) == {0, 1, 2}


def test_rotation_goes_round():
    copies = [Inputs((i,), {}) for i in range(2)]
    rotation = Rotation(copies)
    assert [rotation.take().args[0] for _ in range(5)] == [0, 1, 0, 1, 0]


def test_shapes_read_back():
    for name, shape in SHAPES.items():
        assert parse_shape(name) == shape
        assert parse_shape(parse_shape(f"{name}:3").label) == parse_shape(f"{name}:3")
    assert [shape.name for shape in parse_shapes("tiny,sweep,tiny")] == ["tiny", *SWEEP]
    assert parse_shape("llava-1.5").length == 671
    assert parse_shape("llava-next").length == 3000
    assert parse_shape("video-gqa").length == 20000


@pytest.mark.parametrize("text", ["llava", "tiny:0", "tiny:x", "images-", "images-0", "images-x"])
def test_unknown_shapes_are_refused(text):
    with pytest.raises(ValueError, match=r"llava-1\.5|positive"):
        parse_shape(text)


def test_peak_memory_counts_what_is_allocated_and_freed():
    size = 64 << 20
    extra = memory.peak_extra(lambda: [torch.ones(size // 4).sum() for _ in range(3)], CPU)
    if extra is None:
        pytest.skip("this system does not tell")
    assert 0.9 * size < extra < 2 * size
    assert memory.peak_extra(lambda: None, CPU) < size / 16


def test_copies_are_as_many_as_fill_the_cache_with_what_is_read(monkeypatch):
    """An operator that reads a fraction of its input: that fraction, in all copies, is three times the cache."""
    case = Case(SIMPLE, parse_shape("llava-1.5"), torch.float32, CPU)
    kept = case.shape.kept * case.shape.hidden * 4
    assert case.work.read == case.work.written == kept < case.input_bytes / 4
    monkeypatch.setattr(machine, "last_level_cache", lambda device: 8 << 20)
    monkeypatch.setattr(memory, "available", lambda device: 64 << 30)

    def copies(**how: bool) -> int:
        return len(run.copies_of(case, Inputs((), {}), **how))

    assert copies() * kept >= 3 * (8 << 20) > (copies() - 1) * kept
    assert copies(hot=True) == 1
    monkeypatch.setattr(machine, "last_level_cache", lambda device: 480 << 20)
    assert copies() == run.MOST_COPIES > copies(quick=True) == run.QUICK_COPIES
    monkeypatch.setattr(memory, "available", lambda device: 2 * case.input_bytes)
    assert copies() == 1


@pytest.mark.parametrize("quick", [True, False])
def test_rates_of_a_gpu_are_measured_in_full(monkeypatch, quick):
    """A small matrix product measures the launch, a small copy the cache: `quick` makes no difference there."""
    sizes = []
    monkeypatch.setattr(torch, "randn", lambda *shape, generator, device: sizes.append(shape[0]) or torch.empty(1))
    monkeypatch.setattr(torch, "Generator", lambda device: FakeGenerator())
    monkeypatch.setattr(torch, "ones", lambda count, device: sizes.append(4 * count) or torch.empty(1))
    monkeypatch.setattr(machine, "last_level_cache", lambda device: 60 << 20)
    monkeypatch.setattr(machine, "_seconds", lambda call, device, repeats: sizes.append(repeats) or 1.0)
    machine.measure(torch.device("cuda"), [torch.bfloat16], quick)
    assert sizes == [8192, 9, 256 << 20, 15]


class FakeGenerator:
    def manual_seed(self, seed):
        return self


def test_the_commit_of_a_tree_without_its_history(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "mustdrop_kernels" / "bench" / "machine.py"))
    monkeypatch.setenv("MUSTDROP_COMMIT", "0123456789ab")
    assert machine.commit() == "0123456789ab"
    monkeypatch.delenv("MUSTDROP_COMMIT")
    assert machine.commit() is None


def test_machine_describes_itself():
    about = machine.describe(CPU, 2)
    assert about["threads"] == 2
    assert about["torch"] == torch.__version__
    rates = machine.measure(CPU, [torch.float32], quick=True)
    assert rates["copy_bandwidth"] > 1e6
    assert rates["matrix_rate"]["float32"] > 1e6


def test_times_have_units():
    from mustdrop_kernels.bench.report import duration, factor, size

    assert [duration(us) for us in (0.5, 85.06, 1240, 99_000_000)] == ["0.5 us", "85.1 us", "1.24 ms", "99 s"]
    assert [size(n) for n in (None, 0, 999, 24_600, 5e6, 3.1e9)] == ["", "0 B", "999 B", "24.6 kB", "5 MB", "3.1 GB"]
    assert [factor(x) for x in (0.5, 9.99, 123.4)] == ["0.50x", "9.99x", "123x"]
    assert timing.FULL.least > timing.QUICK.least
