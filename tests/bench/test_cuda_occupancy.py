# SPDX-License-Identifier: Apache-2.0
"""Blocks of a multiprocessor and waves, against numbers worked out by hand; and the launches that they are of."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import building
from cuda_static import launches, occupancy, untouched
from cuda_static.kernel import Kernel
from cuda_static.launches import Launch

from mustdrop_kernels.ops.contract import CONTRACTS

emulated = pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not()))


@pytest.mark.parametrize(
    ("capability", "registers", "shared_bytes", "threads", "blocks"),
    [
        ("90", 243, 126880, 256, 1),  # 7,936 registers a warp: two in each quarter, eight in all
        ("90", 128, 93536, 256, 2),  # 4,096 a warp: four in each quarter
        ("90", 129, 0, 256, 1),  # 4,352 a warp: three in each quarter, twelve in all
        ("90", 64, 5000, 512, 2),  # 2,048 a warp: 32 warps
        ("90", 73, 16384, 256, 3),  # 2,560 a warp: six in each quarter
        ("90", 60, 150944, 256, 1),  # shared memory: 151,968 of 233,472 bytes
        ("90", 32, 115712, 128, 2),  # 116,736 bytes a block, half of it all
        ("90", 32, 115713, 128, 1),
        ("90", 16, 0, 32, 32),  # as many blocks as there may be
        ("90", 16, 0, 1024, 2),  # 64 warps
        ("80", 32, 83 << 10, 128, 1),  # 84 of 164 KB
        ("80", 32, 81 << 10, 128, 2),
        ("120", 16, 0, 32, 24),
        ("120", 16, 0, 1024, 1),  # 48 warps
        ("120", 32, 101376, 128, 1),  # 99 KB, the most of a block
        ("100", 32, 232448, 128, 1),  # 227 KB, the most of a block
        ("90", 255, 0, 1024, 0),  # does not fit
    ],
)
def test_blocks_of_a_multiprocessor(capability, registers, shared_bytes, threads, blocks):
    assert occupancy.blocks_per_multiprocessor(capability, registers, shared_bytes, threads) == blocks


def test_blocks_of_the_device():
    gpu = launches.GPUS["H200"]
    assert gpu.slots(1, 1) == gpu.multiprocessors == 132
    assert gpu.slots(2, 1) == 264
    assert gpu.slots(1, 8) == 128  # two clusters in each GPC
    assert gpu.slots(2, 8) == 256  # four
    assert gpu.slots(1, 2) == 132
    assert gpu.slots(1, 4) == 128
    assert gpu.slots(0, 8) == 0
    assert [other.multiprocessors for other in launches.GPUS.values()] == [108, 132, 148]


def kernel(name: str, target: str, registers: int) -> Kernel:
    return Kernel(name, target, "attention_scores", registers, 0, 0, 0)


def test_waves():
    """157 tiles of keys with a multiprocessor each; the registers are those of the device's own architecture."""
    kernels = [kernel("score_kernel<bfloat16_t, 2>", "80", 128), kernel("score_kernel<bfloat16_t, 2>", "90a", 243)]
    launch = Launch("video-mha", "text_vision_scores", "score_kernel<bfloat16_t, 2>", 157, 256, 126880, 1)
    fused = Launch("video-mha", "dual_attention_select", *list(vars(launch).values())[2:])
    other = Launch("video-mha", "select_dual", "select_kernel<float>", 1, 1024, 0, 1)
    (row,) = occupancy.occupancies([launch, fused, other], kernels)
    assert (row.registers, row.resident, row.text) == (243, 1, "1.19 (2)")
    head, line = occupancy.occupancy_table([row]).splitlines()
    assert head.endswith("waves on 132 SMs")
    assert line.split()[-4:] == ["157", "1", "1.19", "(2)"]


def test_waves_of_clusters():
    launch = Launch("llava-1.5:64", "spatial_merge", "merge_cluster_kernel<bfloat16_t, 8>", 512, 256, 150944, 8)
    (row,) = occupancy.occupancies([launch], [kernel(launch.kernel, "90", 60)])
    assert row.text == "4.00 (4)"


def test_a_launch_that_does_not_fit():
    launch = Launch("", "", "score_kernel<float, 1>", 8, 1024, 0, 1)
    (row,) = occupancy.occupancies([launch], [kernel(launch.kernel, "90", 128)])
    assert (row.resident, row.text) == (0, "does not fit")


@emulated
def test_recorded_launches():
    """Every operator launches something; an image of 576 tokens is merged by one cluster."""
    recorded = launches.record(["llava-1.5"])
    assert {launch.shape for launch in recorded} == {"llava-1.5"}
    by_op = {launch.op: launch for launch in recorded}
    assert by_op["spatial_merge"] == Launch(
        "llava-1.5", "spatial_merge", "merge_cluster_kernel<bfloat16_t, 8>", 8, 256, 150944, 8
    )
    scores = [launch for launch in recorded if launch.op == "text_vision_scores"]
    given = [launch for launch in recorded if launch.op == "text_vision_scores (lse given)"]
    assert len(scores) == len(given) + 1  # the normalisers are not computed
    assert {op for op, contract in CONTRACTS.items() if not contract.composite} <= set(by_op)


def test_untouched_memory():
    with untouched.Untouched():
        large = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        large[:, 1:] += torch.ones(2047)
        sums = large.float().sum()
        chosen = (torch.arange(8) > 5).nonzero()
    assert (large.shape, large.dtype, large.device.type) == ((2048, 2048), torch.bfloat16, "cpu")
    assert large.data_ptr() % 16 == 0
    assert sums.shape == ()
    assert chosen.tolist() == [[6], [7]]  # small tensors are computed
