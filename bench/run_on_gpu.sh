#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU:
#
#   bench/run_on_gpu.sh [--dry-run] [RUN...]
#
# `first` and `second` take at most 330 s each, for a machine that is at hand for minutes: `first` (the default) shows
# whether every kernel runs, is right and is clean; `second` runs again what failed, then times. The others are long:
# `suite`, `sanitize`, `bench`, `e2e`, `decode`, `serve` (where vLLM is installed). `--help` describes each, `--dry-run`
# lists each part with its limit. `make gpu-bundle` prepares what needs no GPU.
#
# A part that fails leaves the others; what a part does not use of its time is added to those after it. Results go to
# $OUT (default: bench/results/gpu): summary.txt and summary.json, written after each part; log.txt; failed.txt with the
# failed tests; and the JSON of times, which `mustdrop bench COMMAND --load` shows.
#
# Needs Python >= 3.10 with torch >= 2.10 for CUDA and pytest with hypothesis; nvcc and CMake where no library was
# carried. Installs nothing and needs no network. PYTHON names the interpreter (default: .venv/bin/python, else python3).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHON
exec "$PYTHON" tools/gpu_run.py "$@"
