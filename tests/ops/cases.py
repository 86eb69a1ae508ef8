# SPDX-License-Identifier: Apache-2.0
"""Inputs of the conformance tests: seeded, on a given device, as views, with margins around every decision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from . import oracle
from .oracle import PADDING, QUERY, TEXT, VISION

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MOVABLE = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.complex64,
)
GARBAGE = 0x5A  # every byte of a sentinel in an integer tensor: 90, or True


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------- tensors


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape: Sequence[int], seed: int, dtype=torch.float32, device="cpu", gain: float = 1.0) -> Tensor:
    return (gain * torch.randn(*shape, generator=generator(seed))).to(dtype).to(device)


def random_bits(shape: Sequence[int], seed: int, dtype: torch.dtype, device="cpu") -> Tensor:
    """Random bit patterns, including NaN payloads and -0.0, which moves must preserve."""
    if dtype == torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=generator(seed)).bool().to(device)
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), generator=generator(seed), dtype=torch.uint8)
    return raw.view(dtype).squeeze(-1).to(device)


def bits_in_buffer(shape: Sequence[int], order: Sequence[int], seed: int, dtype: torch.dtype, device="cpu") -> Tensor:
    """A view inside a buffer of random bits, stored in the given axis order, one element from each end of each axis."""
    buffer = random_bits([shape[a] + 2 for a in order], seed, dtype, device)
    for axis, a in enumerate(order):
        buffer = buffer.narrow(axis, 1, shape[a])
    return buffer.permute([order.index(a) for a in range(len(order))])


def in_buffer(t: Tensor, order: Sequence[int] | None = None, margin: int = 1) -> Tensor:
    """The same values as a view inside a larger buffer, stored in the given axis order, with `margin` sentinel
    elements on each side of each axis. Float sentinels are NaN, so that reading one shows in the result."""
    order = list(range(t.dim())) if order is None else list(order)
    shape = [t.shape[a] + 2 * margin for a in order]
    buffer = torch.empty(shape, dtype=t.dtype, device=t.device)
    if t.dtype.is_floating_point or t.dtype.is_complex:
        buffer = torch.full(shape, math.nan, device=t.device).to(t.dtype)
    else:
        buffer.view(torch.uint8).fill_(GARBAGE if t.dtype != torch.bool else 1)
    view = buffer
    for axis, a in enumerate(order):
        view = view.narrow(axis, margin, t.shape[a])
    view = view.permute([order.index(a) for a in range(t.dim())])
    return view.copy_(t)


def f64(t: Tensor) -> np.ndarray:
    """The values after rounding to the tensor's dtype, as float64."""
    return t.detach().cpu().to(torch.float64).numpy()


def as_bytes(t: Tensor) -> np.ndarray:
    """(..., D) -> (..., D * itemsize) uint8, also for 0-D and empty tensors."""
    t = t.detach().cpu().clone(memory_format=torch.contiguous_format)  # an axis of one element may have any stride
    if t.dim() == 0:
        t = t.reshape(1)
    if t.numel() == 0:
        return np.zeros((*t.shape[:-1], t.shape[-1] * t.element_size()), dtype=np.uint8)
    return t.view(torch.uint8).numpy()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((as_bytes(a) == as_bytes(b)).all())


class Watch:
    """Snapshot of the storages behind some tensors, to detect writes of a call."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = [t for t in tensors if isinstance(t, Tensor)]
        self.before = [self._flat(t).clone() for t in self.tensors]

    @staticmethod
    def _flat(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        return torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage, 0, (storage.nbytes(),), (1,))

    def nothing_changed(self) -> bool:
        return all(torch.equal(self._flat(t), old) for t, old in zip(self.tensors, self.before, strict=True))

    def outside_unchanged(self, *views: Tensor) -> bool:
        """True if no byte outside the elements of `views` (default: the tensors watched) has changed."""
        for t, old in zip(self.tensors, self.before, strict=True):
            allowed = torch.zeros_like(old, dtype=torch.bool)
            for view in views or self.tensors:
                if view.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() and view.numel():
                    size = view.element_size()
                    strides = [s * size for s in view.stride()] + [1]
                    allowed.as_strided((*view.shape, size), strides, view.storage_offset() * size).fill_(True)
            if not torch.equal(self._flat(t)[~allowed], old[~allowed]):
                return False
        return True


def expected(array: np.ndarray, device="cpu") -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


# ---------------------------------------------------------------------------------------------- token types


def prompt(length: int, *, queries: int = 0, images: int = 1, pad: int = 0, side: str = "left") -> list[int]:
    """Text, `images` images with text before each, and query text after the last image and between images.

    `queries` is the number of query rows at the end; 0: about a seventh of the sequence.
    """
    body = length - pad
    if body <= 0:
        return [PADDING] * length
    tail = min(body, queries or max(1, body // 7))
    front = body - tail
    types: list[int] = []
    for image in range(images):
        chunk = front // images + (image < front % images)
        lead = min(max(0, chunk - 1), 1 + chunk // 9)
        # Any other value counts as text.
        words = [TEXT if (image + i) % 3 else 7 for i in range(lead)]
        if image and lead > 1:
            words[-1] = QUERY
        types += words + [VISION] * (chunk - lead)
    types += [QUERY] * tail
    padding = [PADDING] * pad
    return padding + types if side == "left" else types + padding


def types_tensor(rows: Sequence[Sequence[int]], device="cpu") -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8).reshape(len(rows), len(rows[0]) if rows else 0).to(device)


# ---------------------------------------------------------------------------------------------- attention


@dataclass
class Attention:
    """Dense inputs: q (B, Hq, Lq, D), k (B, Hk, Lk, D), types (B, Lk)."""

    q: Tensor
    k: Tensor
    types: Tensor
    scale: float
    _cache: dict = field(default_factory=dict)

    @property
    def arguments(self) -> tuple:
        return self.q, self.k, self.types, self.scale

    def lse(self) -> Tensor:
        """Row normalizers (B, Hq, Lq) float32, as an attention kernel returns them."""
        if "lse" not in self._cache:
            rows = [
                oracle.log_sum_exp(f64(self.q[b]), f64(self.k[b]), self.types[b].cpu().numpy(), self.scale)
                for b in range(len(self.q))
            ]
            array = np.array(rows).reshape(self.q.shape[:3])
            self._cache["lse"] = expected(array).float().to(self.q.device)
        return self._cache["lse"]

    def oracle_scores(self, lse: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
        key = "scores" if lse is None else ("scores", lse.data_ptr())
        if key not in self._cache:
            self._cache[key] = oracle.text_vision_scores(
                f64(self.q), f64(self.k), self.types.cpu().numpy(), self.scale, None if lse is None else f64(lse)
            )
        return self._cache[key]


def attention(
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    rows: int | None = None,
    length: int = 24,
    dim: int = 16,
    *,
    dtype=torch.float32,
    device="cpu",
    seed: int = 0,
    types: Sequence[Sequence[int]] | None = None,
    layout: str = "plain",
    gain: float = 1.5,
) -> Attention:
    """Layouts: "plain"; "window", a view inside a larger buffer; "blhd", stored [B, L, H, D] inside a larger buffer."""
    rows = length if rows is None else rows
    q = normal((batch, heads[0], rows, dim), 2 * seed, dtype, device, gain)
    k = normal((batch, heads[1], length, dim), 2 * seed + 1, dtype, device, gain)
    if types is None:
        sides = ("left", "right")
        pads = [(3 * b) % max(1, length // 3) for b in range(batch)]
        types = [prompt(length, images=1 + b % 2, pad=pads[b], side=sides[(b + seed) % 2]) for b in range(batch)]
    kinds = types_tensor(types, device).reshape(batch, length)
    if layout != "plain":
        order = {"window": (0, 1, 2, 3), "blhd": (0, 2, 1, 3)}[layout]
        q, k, kinds = in_buffer(q, order), in_buffer(k, order), in_buffer(kinds)
    return Attention(q, k, kinds, 1 / math.sqrt(dim))


# ---------------------------------------------------------------------------------------------- margins


def relative_gap(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def threshold_between(values: np.ndarray, quantile: float, gap: float = 1e-3) -> float:
    """A threshold near this quantile of the positive values, at least `gap` (relative) away from each of them."""
    ordered = sorted(float(v) for v in np.ravel(values) if v > 0)
    if not ordered:
        return 0.5
    wanted = quantile * len(ordered)
    choices = []
    for i in range(len(ordered) + 1):
        low = ordered[i - 1] if i else ordered[0] / 2
        high = ordered[i] if i < len(ordered) else ordered[-1] * 2
        middle = math.sqrt(low * high)
        if min(relative_gap(low, middle), relative_gap(middle, high)) > gap:
            choices.append((abs(i - wanted), middle))
    return min(choices)[1]


def dual_thresholds(
    total: np.ndarray, peak: np.ndarray, types: np.ndarray, quantiles: tuple[float, float]
) -> tuple[float, float]:
    """Thresholds with a margin around every decision of the batch."""
    vision = types == VISION
    sums = total.sum(1, keepdims=True)
    shares = np.divide(total, sums, out=np.zeros_like(total), where=sums > 0)
    return (
        threshold_between(shares[vision], quantiles[0], 4e-4),
        threshold_between(peak[vision], quantiles[1], 4e-4),
    )


def dual_margin(total, peak, types, global_threshold: float, individual_threshold: float) -> float:
    """Minimum relative distance of a vision token's value from its threshold."""
    closest = math.inf
    for b in range(len(total)):
        limit = float(np.float32(global_threshold)) * total[b].sum()
        for j in np.flatnonzero(types[b] == VISION):
            closest = min(closest, relative_gap(total[b, j], limit))
            closest = min(closest, relative_gap(peak[b, j], float(np.float32(individual_threshold))))
    return closest


# ---------------------------------------------------------------------------------------------- merging


def pictures(
    batch: int,
    grid: Sequence[int],
    window: Sequence[int],
    channels: int,
    *,
    prefix: int = 1,
    seed: int = 0,
    dtype=torch.float32,
    device="cpu",
    threshold: float | None = 0.8,
    share: float = 0.5,
) -> Tensor:
    """(B, P+N, C) whose windows have similarities spread over [0, 1), `share` of them at or above 0.8.

    Each is at least 1e-3 away from `threshold`, and two of one image are at least 1e-5 apart (2e-6 if there are many).
    """
    for attempt in range(200):
        x = _pictures(batch, grid, window, channels, prefix, 1000 * seed + attempt, share).to(dtype)
        members, _ = oracle.window_members(list(grid), list(window))
        similar = [
            [oracle.window_similarity(f64(x[b, [prefix + t for t in m]])) for m in members if len(m) > 1]
            for b in range(batch)
        ]
        apart = min((order_margin(row) for row in similar), default=math.inf)
        flat = np.ravel(similar)
        near = 1.0 if threshold is None or not flat.size else np.abs(flat - np.float32(threshold)).min()
        if near > 1e-3 and apart > (1e-5 if len(members) < 70 else 2e-6):
            return x.to(device)
    raise AssertionError("no image with these margins: choose another size or seed")


def order_margin(values: Sequence[float]) -> float:
    gaps = np.diff(np.sort(np.asarray(values)))
    return float(gaps.min()) if gaps.size else math.inf


def _pictures(batch, grid, window, channels, prefix, seed, share) -> Tensor:
    g = generator(seed)
    count = math.prod(grid)
    x = torch.randn(batch, prefix + count, channels, generator=g)
    members, _ = oracle.window_members(list(grid), list(window))
    for b in range(batch):
        for m in members:
            base = torch.randn(channels, generator=g)
            mix = torch.rand((), generator=g)
            # The mean cosine of base + s * noise is about 1 / (1 + s * s).
            wanted = 0.81 + 0.17 * mix if torch.rand((), generator=g) < share else 0.75 * mix + 0.03
            spread = torch.sqrt(1 / wanted - 1)
            noise = torch.randn(len(m), channels, generator=g)
            length = torch.empty(len(m), 1).uniform_(0.5, 2.0, generator=g)
            x[b, [prefix + t for t in m]] = length * (base + spread * noise)
    return x
