#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in runs of less than ten minutes:
#
#   bench/run_on_gpu.sh [--dry-run] [RUN...]
#
#   quick     build, short times, a CUDA graph, the suite on every backend, compute-sanitizer (the default)
#   suite     every GPU test, the slow ones too, on every backend
#   sanitize  memcheck, racecheck, synccheck and initcheck over every kernel
#   bench     every operator, shape, type and peer
#   e2e       LLaVA-1.5-7B from its configuration, batch 1 and 32, full against 192, 128 and 64 tokens; a CUDA graph
#   decode    the same at batch 1 with a static cache, its decode steps compiled into CUDA graphs, and what they answer
#
# Each part of a run has its own time limit, and a part that fails leaves the others. Results go to $OUT (default:
# bench/results/gpu): summary.txt and summary.json, facts.json, log.txt with what every part said, and the JSON of times.
# `mustdrop bench --load` and `python bench/e2e.py --load` show those.
#
# Needs Python >= 3.10 with torch >= 2.10 for CUDA and pytest with hypothesis; nvcc and CMake for the CUDA kernels (without
# them the Triton kernels are what is measured). Installs nothing and needs no network. PYTHON names the interpreter
# (default: .venv/bin/python, else python3).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

dry=0
runs=()
for word in "$@"; do
  case $word in
    --dry-run) dry=1 ;;
    quick | suite | sanitize | bench | e2e | decode) runs+=("$word") ;;
    *) echo "usage: bench/run_on_gpu.sh [--dry-run] [quick|suite|sanitize|bench|e2e|decode]..." >&2; exit 2 ;;
  esac
done
[ "${#runs[@]}" = 0 ] && runs=(quick)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
out="${OUT:-bench/results/gpu}"
run_seconds=590 # for all parts of a run
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export MUSTDROP_EMULATION_SAMPLE=0 # the device itself is here

if [ "$dry" = 0 ]; then
  if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "run_on_gpu: no NVIDIA GPU was found; --dry-run shows what would be done" >&2
    exit 1
  fi
  mkdir -p "$out"
  rm -f "$out/parts.tsv" "$out/log.txt"
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
  local label=$1 limit=$2 began=$SECONDS status=0 left=$((deadline - SECONDS))
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
  timeout --kill-after=5 "$limit" "$@" >"$out/part.log" 2>&1 || status=$?
  case $status in
    0) note "$label" $((SECONDS - began)) ok ;;
    124 | 137) note "$label" $((SECONDS - began)) "FAILED: it took longer than $limit s" ;;
    *) note "$label" $((SECONDS - began)) "FAILED ($status), see log.txt" ;;
  esac
  if [ "$status" != 0 ]; then
    failed=1
    tail -n 12 "$out/part.log" | sed 's/^/    /'
  fi
  { printf '\n===== %s\n' "$label"; cat "$out/part.log"; } >>"$out/log.txt"
  rm "$out/part.log"
}
has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$1'))" 2>/dev/null; }

# --- parts -----------------------------------------------------------------------------------------------------------
build() { # what is here, and the library
  local cmake missing=""
  if [ "$dry" = 0 ]; then part machine 15 nvidia-smi; else part machine 15 nvidia-smi "(driver, clocks)"; fi
  cmake=$(PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" command -v cmake)
  has setuptools || missing="$missing setuptools"
  [ -n "$cmake" ] || missing="$missing cmake"
  if [ -n "$missing" ] && [ "$dry" = 0 ]; then
    skip build "needs$missing (nothing is installed from here)"
  else
    part build 150 "$PYTHON" setup.py -q build_ext --inplace
  fi
  part facts 30 "$PYTHON" bench/gpu_once.py --facts "$out/facts.json"
  part doctor 30 "$PYTHON" -m mustdrop_kernels doctor
}
suites() { # suites SECONDS [pytest options]: tests/ops on every backend that serves the device
  local limit=$1 names="cuda triton cupy" workers=()
  shift
  if [ "$dry" = 0 ]; then
    names=$("$PYTHON" -c "import json; print(*json.load(open('$out/facts.json'))['backends'])" 2>/dev/null)
    [ -n "$names" ] || { skip suite "no backend serves the GPU"; failed=1; }
  fi
  has xdist && workers=(-n 6)
  for backend in $names; do
    part "suite-$backend" "$limit" env MUSTDROP_TEST_BACKENDS="$backend" "$PYTHON" -m pytest -q "$@" \
      -p no:cacheprovider "${workers[@]}" -k cuda tests/ops
  done
}
sanitizers() { # sanitizers SECONDS
  local only=() sanitizer
  sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  part coverage 40 "$PYTHON" bench/gpu_once.py --coverage
  if [ "$dry" = 0 ] && [ ! -x "$sanitizer" ]; then
    skip sanitizer "compute-sanitizer was not found"
    return
  fi
  "$sanitizer" --help 2>/dev/null | grep -q -- --kernel-name && only=(--kernel-name kns=mustdrop)
  for tool in memcheck racecheck synccheck initcheck; do
    part "sanitizer-$tool" "$1" "$sanitizer" --tool "$tool" "${only[@]}" --error-exitcode 9 "$PYTHON" bench/gpu_once.py
  done
}
times() { # times NAME SECONDS [options of mustdrop bench]: into NAME.json
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" -m mustdrop_kernels bench --device cuda --json "$out/$name.json" "$@"
}
graph() { part graph 40 "$PYTHON" bench/gpu_once.py --graph; }

# --- runs ------------------------------------------------------------------------------------------------------------
for run in "${runs[@]}"; do
  deadline=$((SECONDS + run_seconds))
  build
  case $run in
    quick)
      times ops 130 --dtype bfloat16 --quick --shapes llava-1.5,llava-next,video-mha,video-gqa,llava-1.5:8,llava-1.5:64
      graph
      suites 65 -m "not slow"
      sanitizers 45
      ;;
    suite) suites 180 ;;
    sanitize) sanitizers 125 ;;
    bench)
      for dtype in bfloat16 float16 float32; do
        times "ops-$dtype" 125 --dtype "$dtype" --shapes llava-1.5,llava-next,llava-1.5:8,llava-1.5:64
      done
      times ops-video 135 --dtype bfloat16 --shapes video-mha,video-gqa
      ;;
    e2e)
      part e2e 420 "$PYTHON" bench/e2e.py --device cuda --model llava-1.5-7b --batch 1,32 --new-tokens 128 \
        --json "$out/e2e.json"
      graph
      ;;
    decode)
      part decode-tokens 90 "$PYTHON" -m pytest -q tests/integrations/test_compiled.py -k cuda_graph
      part e2e-static 420 "$PYTHON" bench/e2e.py --device cuda --model llava-1.5-7b --cache static --new-tokens 128 \
        --json "$out/e2e-static.json"
      ;;
  esac
done

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
