#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in one command and less than ten minutes: build, times, CUDA graphs, tests, compute-sanitizer.
#
#   bench/run_on_gpu.sh [--dry-run]
#
# Each part has its own time limit and its own log, and a part that fails leaves the others. Results go to $OUT (default:
# bench/results/gpu): summary.txt and summary.json, ops.json and ops.txt with the times, facts.json, a log per part.
#
# Needs Python >= 3.10 with torch >= 2.10 for CUDA and pytest with hypothesis; nvcc and CMake for the CUDA kernels (without
# them the Triton kernels are what is measured). Installs nothing and needs no network. PYTHON names the interpreter
# (default: .venv/bin/python, else python3).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

dry=0
case "${1:-}" in
  "") ;;
  --dry-run) dry=1 ;;
  *) echo "usage: bench/run_on_gpu.sh [--dry-run]" >&2; exit 2 ;;
esac
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
out="${OUT:-bench/results/gpu}"
total=590 # seconds for all parts together
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export MUSTDROP_EMULATION_SAMPLE=0 # the device itself is here

if [ "$dry" = 0 ]; then
  if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "run_on_gpu: no NVIDIA GPU was found; --dry-run shows what would be done" >&2
    exit 1
  fi
  mkdir -p "$out"
  rm -f "$out/parts.tsv"
fi

failed=0
note() { # note NAME SECONDS RESULT
  printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$out/parts.tsv"
  printf '%-22s %4s s  %s\n' "$1" "$2" "$3"
}
skip() { # skip NAME REASON
  if [ "$dry" = 1 ]; then printf '%-22s left out: %s\n' "$1" "$2"; else note "$1" 0 "left out: $2"; fi
}
part() { # part NAME SECONDS COMMAND...
  local label=$1 limit=$2 began=$SECONDS status=0 left=$((total - SECONDS))
  shift 2
  if [ "$dry" = 1 ]; then
    printf '%-22s at most %3d s: %s\n' "$label" "$limit" "$*"
    return
  fi
  if [ "$left" -lt 5 ]; then
    skip "$label" "no time is left"
    failed=1
    return
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  timeout --kill-after=5 "$limit" "$@" >"$out/$label.log" 2>&1 || status=$?
  case $status in
    0) note "$label" $((SECONDS - began)) ok ;;
    124 | 137) note "$label" $((SECONDS - began)) "FAILED: it took longer than $limit s" ;;
    *) note "$label" $((SECONDS - began)) "FAILED ($status), see $label.log" ;;
  esac
  if [ "$status" != 0 ]; then
    failed=1
    tail -n 12 "$out/$label.log" | sed 's/^/    /'
  fi
}
has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$1'))" 2>/dev/null; }

# --- what is here, and the build -----------------------------------------------------------------------------------
if [ "$dry" = 0 ]; then part machine 15 nvidia-smi; else part machine 15 nvidia-smi "(driver, clocks)"; fi
cmake=$(PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" command -v cmake)
missing=""
has setuptools || missing="$missing setuptools"
[ -n "$cmake" ] || missing="$missing cmake"
if [ -n "$missing" ] && [ "$dry" = 0 ]; then
  skip build "needs$missing (nothing is installed from here)"
else
  part build 150 "$PYTHON" setup.py -q build_ext --inplace
fi
part facts 30 "$PYTHON" bench/gpu_once.py --facts "$out/facts.json"
part doctor 30 "$PYTHON" -m mustdrop_kernels doctor

# --- times, graphs -------------------------------------------------------------------------------------------------
part times 130 "$PYTHON" -m mustdrop_kernels bench --device cuda --dtype bfloat16 --quick \
  --shapes llava-1.5,llava-next,video-mha,video-gqa,llava-1.5:8,llava-1.5:64 --json "$out/ops.json"
[ -f "$out/times.log" ] && cp "$out/times.log" "$out/ops.txt"
part graph 40 "$PYTHON" bench/gpu_once.py --graph

# --- the suite, on every backend that serves the device --------------------------------------------------------------
if [ "$dry" = 1 ]; then
  names="cuda triton cupy"
else
  names=$("$PYTHON" -c "import json; print(*json.load(open('$out/facts.json'))['backends'])" 2>/dev/null)
  [ -n "$names" ] || { skip suite "no backend serves the GPU"; failed=1; }
fi
workers=()
has xdist && workers=(-n 6)
for backend in $names; do
  limit=60
  [ "$backend" = cuda ] && limit=80
  part "suite-$backend" "$limit" env MUSTDROP_TEST_BACKENDS="$backend" "$PYTHON" -m pytest -q -m "not slow" \
    -p no:cacheprovider "${workers[@]}" -k cuda tests/ops
done

# --- compute-sanitizer over every kernel ---------------------------------------------------------------------------
part coverage 40 "$PYTHON" bench/gpu_once.py --coverage
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ "$dry" = 1 ] || [ -x "$sanitizer" ]; then
  only=()
  "$sanitizer" --help 2>/dev/null | grep -q -- --kernel-name && only=(--kernel-name kns=mustdrop)
  for tool in memcheck racecheck synccheck initcheck; do
    part "sanitizer-$tool" 45 "$sanitizer" --tool "$tool" "${only[@]}" --error-exitcode 9 "$PYTHON" bench/gpu_once.py
  done
else
  skip sanitizer "compute-sanitizer was not found"
fi

[ "$dry" = 1 ] && exit 0
awk -F '\t' '{printf "%-22s %4d s  %s\n", $1, $2, $3}' "$out/parts.tsv" >"$out/summary.txt"
"$PYTHON" - "$out" <<'END'
import json, subprocess, sys
from pathlib import Path

out = Path(sys.argv[1])
parts = [line.split("\t") for line in (out / "parts.tsv").read_text().splitlines()]
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
facts = json.loads((out / "facts.json").read_text()) if (out / "facts.json").exists() else None
rows = [{"part": name, "seconds": int(seconds), "result": result} for name, seconds, result in parts]
(out / "summary.json").write_text(json.dumps({"commit": commit, "facts": facts, "parts": rows}, indent=1) + "\n")
END
rm -f "$out/parts.tsv"
exit "$failed"
