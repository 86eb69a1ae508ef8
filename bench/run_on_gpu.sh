#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in one command and less than ten minutes: build, tests, compute-sanitizer, CUDA graphs, times.
#
#   bench/run_on_gpu.sh [--dry-run] [--out FOLDER]
#
# Each part has its own time limit and its own log, and a part that fails leaves the others. Needs Python >= 3.10 with
# torch >= 2.10 for CUDA, nvcc and CMake. PYTHON names the interpreter (default: .venv/bin/python, else python3).
set -uo pipefail
cd "$(dirname "$0")/.."

dry=0
out=""
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry=1 ;;
    --out) out="${2:?--out needs a folder}"; shift ;;
    *) echo "usage: bench/run_on_gpu.sh [--dry-run] [--out FOLDER]" >&2; exit 2 ;;
  esac
  shift
done
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-')
if [ -z "$name" ] && [ "$dry" = 0 ]; then
  echo "run_on_gpu: no NVIDIA GPU was found; --dry-run shows what would be done" >&2
  exit 1
fi
out="${out:-bench/results/${name:-gpu}}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

summary=()
failed=0
part() {  # part NAME SECONDS COMMAND...
  local label=$1 limit=$2 began=$SECONDS status=0
  shift 2
  if [ "$dry" = 1 ]; then
    printf '%-22s at most %3d s: %s\n' "$label" "$limit" "$*"
    return
  fi
  echo "== $label (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$out/$label.log" 2>&1 || status=$?
  [ "$status" = 0 ] || { failed=1; tail -n 15 "$out/$label.log"; }
  summary+=("$(printf '%-22s %4d s  %s' "$label" $((SECONDS - began)) "$([ $status = 0 ] && echo ok || echo "FAILED ($status)")")")
}

[ "$dry" = 1 ] || mkdir -p "$out"
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")

part machine 10 nvidia-smi
part build 120 "$PYTHON" setup.py -q build_ext --inplace
part doctor 20 "$PYTHON" -m mustdrop_kernels doctor
for backend in cuda triton cupy; do
  limit=50; [ "$backend" = cuda ] && limit=60
  part "suite-$backend" "$limit" env MUSTDROP_TEST_BACKENDS="$backend" "$PYTHON" -m pytest -q -m "not slow" \
    -p no:cacheprovider -k cuda tests/ops
done
part graphs 20 "$PYTHON" bench/gpu_once.py --graph
if [ "$dry" = 1 ] || [ -x "$sanitizer" ]; then
  for tool in memcheck racecheck synccheck initcheck; do
    part "sanitizer-$tool" 30 "$sanitizer" --tool "$tool" --error-exitcode 9 "$PYTHON" bench/gpu_once.py
  done
else
  summary+=("sanitizer              left out: compute-sanitizer was not found")
fi
part times 90 "$PYTHON" -m mustdrop_kernels bench --device cuda --dtype bfloat16 --quick \
  --shapes llava-1.5,llava-next,video-mha,video-gqa --json "$out/ops.json"

[ "$dry" = 1 ] && exit 0
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit "$failed"
