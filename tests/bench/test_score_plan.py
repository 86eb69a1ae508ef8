# SPDX-License-Identifier: Apache-2.0
"""The plan of the CUDA scores (csrc/attention_scores/plan.h): recorded launches against a search of all plans."""

from __future__ import annotations

import math

import pytest
from cuda_emulation import building
from cuda_static import launches

from mustdrop_kernels.bench.shapes import SHAPES, Shape, parse_shape

pytestmark = pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not()))

OP = "text_vision_scores"
WORKSPACE = 64 << 20  # bytes: kMostPartials
NAMES = (*SHAPES, "llava-1.5:8", "llava-1.5:64", "llava-next:4", "images-2", "images-16")


def keys_of(kernel: str) -> int:
    """Keys of a tile, from the template arguments of a kernel."""
    return 64 * int(kernel.split(", ")[1])


def groups(gpu: launches.Gpu, splits: int) -> int:
    """Groups of blocks that the device runs together."""
    return gpu.slots(1, splits) // splits if gpu.capability >= 90 else gpu.multiprocessors // splits


def elapsed(gpu: launches.Gpu, shape: Shape, keys: int, splits: int) -> int:
    """Heads that a block processes one after the other."""
    tiles = shape.batch * math.ceil(shape.length / keys)
    return math.ceil(tiles / groups(gpu, splits)) * math.ceil(shape.heads / splits)


@pytest.fixture(scope="module", params=launches.GPUS)
def recorded(request) -> tuple[launches.Gpu, list[launches.Launch]]:
    return launches.GPUS[request.param], launches.record(NAMES, request.param, [OP])


def test_no_other_split_of_the_heads_is_faster(recorded):
    gpu, found = recorded
    scores = [launch for launch in found if launch.op == OP and launch.kernel.startswith("score_kernel")]
    assert [launch.shape for launch in scores] == list(NAMES)
    for launch in scores:
        shape, keys = parse_shape(launch.shape), keys_of(launch.kernel)
        tiles = shape.batch * math.ceil(shape.length / keys)
        allowed = [splits for splits in (1, 2, 4, 8) if splits <= shape.heads]
        if gpu.capability < 90:  # without clusters the sums of all rows pass through a workspace
            allowed = [n for n in allowed if n == 1 or n * tiles * shape.length * keys * 4 <= WORKSPACE]
        best = min(allowed, key=lambda splits: (elapsed(gpu, shape, keys, splits), splits))
        assert launch.grid == min(tiles, groups(gpu, best)) * best, launch.shape
        assert launch.grid <= gpu.multiprocessors  # all blocks run together
        if gpu.capability >= 90:
            assert launch.cluster == best, launch.shape


def test_all_multiprocessors_have_keys_to_normalize(recorded):
    gpu, found = recorded
    parts = [launch for launch in found if launch.kernel.startswith("normalizer_kernel")]
    assert [launch.shape for launch in parts] == list(NAMES)
    for launch in parts:
        shape = parse_shape(launch.shape)
        heads, tiles = shape.batch * shape.heads, math.ceil(shape.length / keys_of(launch.kernel))
        cost = {
            splits: math.ceil(heads * splits / gpu.multiprocessors) * math.ceil(tiles / splits)
            for splits in (1, 2, 4, 8)
            if splits <= tiles
        }
        assert cost[launch.grid // heads] == min(cost.values()), launch.shape


@pytest.mark.parametrize(
    ("shape", "blocks", "cluster", "heads"),
    [
        ("llava-1.5", 11 * 8, 8, 4),  # 11 tiles of 64 keys
        ("llava-next", 24 * 4, 4, 8),  # 24 of 128
        ("video-mha", 32 * 4, 4, 5 * 8),  # 157 tiles, 32 clusters; without splits 2 * 32
        ("video-gqa", 32 * 4, 4, 5 * 7),  # without splits 2 * 28
    ],
)
def test_plans_of_an_h200(shape, blocks, cluster, heads):
    gpu = launches.GPUS["H200"]
    (launch,) = (
        launch
        for launch in launches.record(NAMES, "H200", [OP])
        if (launch.shape, launch.op) == (shape, OP) and launch.kernel.startswith("score_kernel")
    )
    assert (launch.grid, launch.cluster) == (blocks, cluster)
    assert elapsed(gpu, parse_shape(shape), keys_of(launch.kernel), cluster) == heads
