# SPDX-License-Identifier: Apache-2.0
"""Training loop: stages of steps, checkpoints, a log, a progress bar.

The data of a step depends on the seed, the stage and the step only, so a resumed run gives the same weights as an
uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mustdrop_kernels.files import written_whole


@dataclass(frozen=True)
class Stage:
    """Steps with the same settings."""

    name: str
    steps: int
    pictures: int  # per step
    rate: float  # peak learning rate
    final: float = 0.05  # final rate as a share of the peak
    warm_up: int = 50

    def rate_at(self, step: int) -> float:
        """Linear warmup, then cosine decay."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.rate * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))


class Task(Protocol):
    """Model and losses of a stage."""

    name: str
    stages: list[Any]
    module: nn.Module  # everything that a checkpoint holds

    def trained(self) -> Iterable[nn.Parameter]:
        """Parameters of the optimizer."""

    def loss(self, stage: Any, first: int, done: float) -> torch.Tensor:
        """Loss of the pictures from number `first` on, after a share `done` of the stage."""

    def validate(self) -> dict[str, float]:
        """Accuracies on the validation split."""


def fit(task: Task, folder: Path, *, every_s: float = 120.0, until: int | None = None) -> bool:
    """Train to the end of the last stage, starting from the last checkpoint if there is one.

    Args:
        task: model and losses.
        folder: of checkpoints and the log.
        every_s: seconds between checkpoints.
        until: maximum number of steps of this task, over all stages.

    Returns:
        True if the last stage is done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(list(task.trained()), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    at = _Position(folder / f"{task.name}.safetensors", task.module, optimizer)
    at.load()
    saved = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        while at.stage < len(task.stages):
            stage = task.stages[at.stage]
            bar = progress.add_task(f"{task.name}: {stage.name}", total=stage.steps, completed=at.step)
            losses: list[float] = []
            begin = time.monotonic()
            while at.step < stage.steps:
                if until is not None and sum(s.steps for s in task.stages[: at.stage]) + at.step >= until:
                    at.save()
                    return False
                losses.append(_step(task, stage, at, optimizer))
                at.step += 1
                progress.advance(bar)
                if time.monotonic() - saved > every_s:
                    at.save()
                    _record(task, stage, at, losses, begin, folder)
                    losses, begin, saved = [], time.monotonic(), time.monotonic()
            at.stage, at.step = at.stage + 1, 0
            at.save()
            _record(task, stage, at, losses, begin, folder)
            saved = time.monotonic()
    return True


def _step(task: Task, stage: Stage, at: _Position, optimizer: torch.optim.Optimizer) -> float:
    for group in optimizer.param_groups:
        group["lr"] = stage.rate_at(at.step)
    before = sum(s.steps * s.pictures for s in task.stages[: at.stage])
    loss = task.loss(stage, before + at.step * stage.pictures, at.step / stage.steps)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(task.trained(), 1.0)
    optimizer.step()
    return loss.item()


def _record(task: Task, stage: Stage, at: _Position, losses: list[float], begin: float, folder: Path) -> None:
    """Append a line to the log and print it."""
    if not losses:
        return
    seconds = (time.monotonic() - begin) / len(losses)
    task.module.eval()
    with torch.inference_mode():
        found = task.validate()
    task.module.train()
    line = {"task": task.name, "stage": stage.name, "step": at.step or stage.steps, "loss": sum(losses) / len(losses)}
    line |= {"seconds_per_step": seconds, **found}
    line = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))


class _Position:
    """Saved position of a run."""

    def __init__(self, path: Path, module: nn.Module, optimizer: torch.optim.Optimizer):
        self.path, self.module, self.optimizer = path, module, optimizer
        self.stage = self.step = 0

    def load(self) -> None:
        if not self.path.exists():
            return
        with safe_open(self.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            position = json.loads(file.metadata()["position"])
        state: dict[int, dict[str, Any]] = {}
        for name in [name for name in tensors if name.startswith("optimizer.")]:
            _, number, what = name.split(".", 2)
            state.setdefault(int(number), {})[what] = tensors.pop(name)
        self.module.load_state_dict(tensors)
        self.optimizer.load_state_dict({"state": state, "param_groups": position["param_groups"]})
        self.stage, self.step = position["stage"], position["step"]

    def save(self) -> None:
        optimizer = self.optimizer.state_dict()
        tensors = {name: x.clone() for name, x in self.module.state_dict().items()}  # tied weights share memory
        for number, state in optimizer["state"].items():
            tensors |= {f"optimizer.{number}.{what}": x for what, x in state.items()}
        position = {"stage": self.stage, "step": self.step, "param_groups": optimizer["param_groups"]}
        with written_whole(self.path) as scratch:  # a stop in between leaves the last one
            save_file(tensors, scratch, {"position": json.dumps(position)})
