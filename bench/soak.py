# SPDX-License-Identifier: Apache-2.0
"""Soak test: random requests through an engine for a given time, and the memory that they leave.

    python bench/soak.py --minutes 60 --json bench/results/soak/transformers.json
    .venv-vllm/bin/python bench/soak.py --engine vllm --minutes 60 --json bench/results/soak/vllm.json
    .venv-vllm/bin/python bench/soak.py --engine vllm-plain --minutes 60 --json bench/results/soak/vllm-plain.json
    python bench/soak.py --load bench/results/soak/*.json --plot docs/bench/soak.png

Each request draws its prompts (pictures, texts between them, texts without a picture), generation settings and length
at random; some raise an error or are aborted. The memory of a request must be free after it ends. The resident memory
is recorded after each round, once free memory has returned to the system. A line fitted to the second half of the
samples gives the growth: memory is flat if the growth is below 1% an hour with confidence. `vllm-plain` is vLLM without
the plug-in.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Before torch is imported: oneDNN caches up to 1,024 kernels, one per shape, and a soak has new shapes for an hour. A
# small cache is full within minutes and does not look like a leak.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import numpy as np
import torch
from scipy import stats

from mustdrop_kernels.bench.machine import describe
from mustdrop_kernels.bench.memory import resident
from mustdrop_kernels.cli.progress import bar
from mustdrop_kernels.files import read_document, write_text
from mustdrop_kernels.report.plots import panels, save

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {  # module and settings of its class Soak
    "transformers": ("soak_transformers", {}),
    "vllm": ("soak_vllm", {}),
    "vllm-plain": ("soak_vllm", {"plain": True}),
}
FORMAT = "mustdrop-soak/1"
ROUND = 20  # requests between two samples of the memory
BLOCKS = 24  # means of the second half for the fit, since neighboring samples are correlated
LIMIT = 0.01  # growth an hour, as a share of the memory, below which it is flat


# ------------------------------------------------------------------------------------------------------------ to run


def soak(engine: str, minutes: float, seed: int) -> dict[str, Any]:
    """Run requests until the time is over; returns the document."""
    torch.set_num_threads(1)
    module, settings = ENGINES[engine]
    run = importlib.import_module(module).Soak(seed, **settings)
    begin, samples = time.monotonic(), []
    with bar() as tell:
        for number in itertools.count(1):
            run.round(ROUND)
            gc.collect()
            samples.append((round(time.monotonic() - begin, 1), resident() // 1024))
            now = f"{number * ROUND} requests, {samples[-1][1] / 1024:.0f} MiB"
            tell(now, samples[-1][0] / (60 * minutes))
            if samples[-1][0] >= 60 * minutes:
                break
    return {
        "format": FORMAT,
        "command": [*sys.argv],
        "engine": run.name,
        "machine": describe(torch.device("cpu"), 1),
        "seed": seed,
        "minutes": round(samples[-1][0] / 60, 1),
        "requests": ROUND * len(samples),
        "kinds": dict(run.kinds.most_common()),
        "growth": growth(samples),
        "samples": samples,
    }


# --------------------------------------------------------------------------------------------------------- conditions


def late(samples: list[tuple[float, int]]) -> np.ndarray:
    """(2, blocks) times and sizes of the second half, after warm-up; means of blocks."""
    half = np.array(samples[len(samples) // 2 :], dtype=np.float64)
    blocks = [part.mean(0) for part in np.array_split(half, min(BLOCKS, len(half)))]
    return np.stack(blocks, axis=1)


def growth(samples: list[tuple[float, int]]) -> dict[str, Any]:
    """Slope of the line through the late memory with its 95% interval, and whether that is flat."""
    times, sizes = late(samples)
    limit = round(LIMIT * sizes.mean(), 1)
    found = {"kb_per_hour": None, "interval": None, "flat_below_kb_per_hour": limit, "verdict": "unknown: run longer"}
    if len(times) < 4:
        return found
    line = stats.linregress(times / 3600, sizes)
    half = stats.t.ppf(0.975, len(times) - 2) * line.stderr
    low, high = line.slope - half, line.slope + half
    if high < limit:
        found["verdict"] = "flat"
    elif low > limit:
        found["verdict"] = "grows"
    return {**found, "kb_per_hour": round(line.slope, 1), "interval": [round(low, 1), round(high, 1)]}


# ----------------------------------------------------------------------------------------------------------- to show


def markdown(documents: list[dict[str, Any]]) -> str:
    """A row per engine."""
    lines = ["| engine | minutes | requests | memory | growth an hour (95%) | |", "|---|---|---|---|---|---|"]
    for document in documents:
        found, last = document["growth"], document["samples"][-1][1] / 1024
        slope = "" if found["kb_per_hour"] is None else _slope(found)
        cells = [document["engine"], f"{document['minutes']:g}", f"{document['requests']:,}", f"{last:.0f} MiB"]
        lines.append("| " + " | ".join([*cells, slope, found["verdict"]]) + " |")
    about = documents[0]["machine"]
    commands = "; ".join(f"`python {' '.join(document['command'])}`" for document in documents)
    return "\n".join([*lines, "", f"*{about['name']}, one thread, torch {about['torch']}; {commands}*"])


def _slope(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['kb_per_hour'] / 1024:+.2f} MiB ({low / 1024:+.2f} to {high / 1024:+.2f})"


def draw(documents: list[dict[str, Any]], path: Path) -> None:
    """Memory over time, a panel per engine, with the line through the second half."""
    figure, (axes,) = panels(len(documents), 6.4 * len(documents), 3.6)
    for axis, document in zip(axes, documents, strict=True):
        times, sizes = np.array(document["samples"], dtype=np.float64).T
        axis.plot(times / 60, sizes / 1024, color="C0", lw=0.8, label="after each round")
        blocks, found = late(document["samples"]), document["growth"]
        axis.plot(blocks[0] / 60, blocks[1] / 1024, "o", color="black", ms=3, label="means of the second half")
        if found["kb_per_hour"] is not None:
            line = blocks[1].mean() + found["kb_per_hour"] / 3600 * (blocks[0] - blocks[0].mean())
            axis.plot(blocks[0] / 60, line / 1024, color="C3", lw=1.5, label=f"{_slope(found)} an hour")
        axis.set_ylim(0, 1.25 * sizes.max() / 1024)
        axis.set_xlabel("minutes")
        axis.set_title(f"{document['engine']}: {document['requests']:,} requests, {found['verdict']}", fontsize=10)
        axis.legend(fontsize=8, loc="lower right")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("resident memory, MiB")
    save(figure, path, dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=tuple(ENGINES), default="transformers")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--load", type=Path, nargs="+", help="show these records instead of running anything")
    parser.add_argument("--plot", type=Path, help="draw into this file; needs matplotlib")
    options = parser.parse_args()
    if options.load:
        documents = [read_document(path, FORMAT, "bench/soak.py") for path in options.load]
    else:
        documents = [soak(options.engine, options.minutes, options.seed)]
    if options.json is not None:
        write_text(options.json, json.dumps(documents[0], indent=1) + "\n")
    print(markdown(documents))
    if options.plot is not None:
        draw(documents, options.plot)


if __name__ == "__main__":
    main()
