# SPDX-License-Identifier: Apache-2.0
"""Random requests through the transformers integration for as long as is asked for, and the memory that they leave.

Every request draws its own prompts (pictures, text between them, padding, texts without a picture), setting, way of
generating and length; some raise in the middle, some go on with an earlier cache. The resident memory is written down
after each round; it must not grow.

    python bench/soak.py --minutes 60 --json bench/results/soak/transformers.json
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny_llava

from mustdrop_kernels.bench.machine import describe
from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.files import write_text
from mustdrop_kernels.integrations.transformers import drop_tokens

ROUND = 20  # requests between two looks at the memory
CONFIGS = (
    MustDropConfig(pruning_layers=(1, 3), merge_threshold=0.7),
    MustDropConfig(pruning_layers=(1, 3), budgets=(60, 30)),
    MustDropConfig(pruning_layers=(0, 2, 5), budgets=(90, 50, 20), merge_budget=8),
    MustDropConfig.preset("keep-all", pruning_layers=(1,)),
    MustDropConfig(merge=False, key_rate=0.0, pruning_layers=(2,)),
)
WAYS = ({}, {}, {}, {"do_sample": True}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True})
WORDS = ("USER:", "What", "is", "in", "the", "image?", "car?", "and", "then", "street?", "ASSISTANT:")


class Broken(Exception):
    """What some requests run into."""


def resident_kb() -> int:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/status says nothing of VmRSS")


def draw_prompt(rng: random.Random) -> str:
    """Text with 0 to 3 pictures, and text behind them."""
    parts = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        parts += [*rng.choices(WORDS, k=rng.randrange(4)), "<image>"]
    return " ".join([*parts, *rng.choices(WORDS, k=rng.randrange(2, 12))])


class Soak:
    """A model, its processor, and what the requests came to."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.model = tiny_llava.model()
        self.processor = tiny_llava.processor()
        self.kinds: Counter[str] = Counter()

    def request(self) -> None:
        """One context with one or more generations in it."""
        rng, model = self.rng, self.model
        texts = [draw_prompt(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
        pictures = [
            tiny_llava.picture(rng.randrange(50), flat=rng.choice((0.25, 0.5, 0.75)))
            for _ in range(sum(text.count("<image>") for text in texts))
        ]
        inputs = self.processor(images=pictures or None, text=texts, return_tensors="pt", padding=True)
        settings = {"max_new_tokens": rng.randrange(1, 12), **rng.choice(WAYS)}
        self.kinds[f"pictures: {len(pictures)}"] += 1
        self.kinds[", ".join(settings.keys() - {"max_new_tokens"}) or "greedy"] += 1
        with drop_tokens(model, rng.choice(CONFIGS)):
            if rng.random() < 0.1:
                self._broken(inputs, settings)
            found = model.generate(**inputs, **settings, return_dict_in_generate=True)
            plain = found.sequences.shape[0] == inputs["input_ids"].shape[0] and "num_beams" not in settings
            if plain and pictures and rng.random() < 0.3:
                self._second_turn(found, inputs)

    def _broken(self, inputs: Any, settings: dict[str, Any]) -> None:
        layer = self.rng.choice(list(self.model.model.language_model.layers))

        def fail(*args: Any) -> None:
            raise Broken

        handle = layer.mlp.register_forward_pre_hook(fail)
        try:
            self.model.generate(**inputs, **settings)
        except Broken:
            self.kinds["raised in the middle"] += 1
        finally:
            handle.remove()

    def _second_turn(self, found: Any, inputs: Any) -> None:
        rows = found.sequences.shape[0]
        more = self.processor.tokenizer([" car What?"] * rows, return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([found.sequences, more], 1)
        mask = inputs["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(rows, ids.shape[1] - mask.shape[1])], 1)
        self.model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=found.past_key_values, max_new_tokens=3, do_sample=False
        )
        self.kinds["second turn"] += 1


def growth_kb_per_hour(samples: list[tuple[float, int]]) -> float:
    """Slope of a line through the second half of the memory, when everything that is kept has been made."""
    late = samples[len(samples) // 2 :]
    if len(late) < 2:
        return 0.0
    times, sizes = np.array(late, dtype=np.float64).T
    return float(np.polyfit(times, sizes, 1)[0] * 3600)


def soak(minutes: float, seed: int) -> dict[str, Any]:
    """Requests until the time is over; plain JSON types."""
    torch.set_num_threads(1)
    run, begin = Soak(seed), time.monotonic()
    requests, samples = 0, []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("requests", total=60 * minutes)
        while (passed := time.monotonic() - begin) < 60 * minutes:
            run.request()
            requests += 1
            if requests % ROUND == 0:
                gc.collect()
                samples.append((round(passed, 1), resident_kb()))
                progress.update(task, completed=passed, description=f"{requests} requests, {samples[-1][1]} kB")
    late = [size for _, size in samples[len(samples) // 2 :]] or [resident_kb()]
    return {
        "command": " ".join(["python bench/soak.py", *sys.argv[1:]]),
        "machine": describe(torch.device("cpu"), 1),
        "seed": seed,
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "requests": requests,
        "kinds": dict(run.kinds.most_common()),
        "resident_kb": {"after_first_round": samples[0][1] if samples else None, "last": late[-1],
                        "second_half": {"least": min(late), "most": max(late)}},
        "growth_kb_per_hour": round(growth_kb_per_hour(samples), 1),
        "samples": samples,
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="how long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args()
    found = soak(options.minutes, options.seed)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.json, json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "samples"}, indent=1))


if __name__ == "__main__":
    main()
