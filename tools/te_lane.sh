#!/usr/bin/env bash
# The tests that need the real Transformer Engine and no GPU (tests/transformer_engine), in an environment of their own:
#   bash tools/te_lane.sh                the environment, where it is not there yet, then the tests
#   bash tools/te_lane.sh -k history     some of them
# Options:
#   --setup-only   the environment alone
#   -k EXPRESSION  pytest's
#   --help         this text
# Environment:
#   PYTHON         a Python 3.12 to build on (default: python3.12, or one of pyenv's)
#   MTP_TE_VENV    an environment to use as it is: nothing is installed into it
#   MTP_TE_WHEELS  a folder of wheels to look into first; with transformer-engine-torch's in it nothing is compiled
#   MTP_TE_JOBS    compilers at a time (default: the number of cores; each takes up to 1.5 GB)
#   MTP_SETUP_FORCE=1  install again although nothing changed
#
# It makes .venv-te in the checkout: 6 GB (a CUDA build of torch), a download of 3 GB, and on 2 cores 8 to 15 minutes, most
# of it for Transformer Engine's extension, which PyPI has as source. Needs Linux on x86_64 and a C++ compiler; neither a
# GPU nor a CUDA toolkit. Too heavy for tools/test.sh, which skips these tests; docs/fp8.md has their last result.
#
# The tests run twice, with the oldest and the newest megatron-core; the newest lies in megatron-core-VERSION in the
# environment's folder, and brings Megatron-LM's loop. Where there is no such folder, the second run is left out.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source tools/common.sh te-lane
usage() { sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' tools/te_lane.sh; }
tests=1 selection=()
while (($#)); do
  case $1 in
    --setup-only) tests=0 ;;
    -k) selection=(-k "${2:?-k needs an expression}"); shift ;;
    -h | --help) usage; exit 0 ;;
    *) die "unknown option $1 (see --help)" ;;
  esac
  shift
done

# The oldest megatron-core and torch of the project's ranges; this megatron-core names Transformer Engine below 2.12.
torch=2.11.0 cuda=13.0 megatron=0.16.1 engine=2.11.0
newest=0.19.2 # the newest, which takes any

setup() {
  local venv=$1 stamp=$1/.mtp-setup key python site folder
  [[ "$(uname -sm)" == "Linux x86_64" ]] || die "Transformer Engine has wheels for Linux on x86_64, this is $(uname -sm)."
  command -v "${CXX:-g++}" >/dev/null || die "Transformer Engine's extension is C++: install g++, or set CXX."
  # One set-up at a time; a second one waits for the first and then finds the work done.
  if command -v flock >/dev/null; then
    exec 9>"$venv.lock"
    flock 9
  fi
  key=$(cat pyproject.toml tools/te_lane.sh | sha256sum | cut -d' ' -f1)
  if [[ -z "${MTP_SETUP_FORCE:-}" && -f "$stamp" && "$(cat "$stamp")" == "$key" && -x "$venv/bin/python" ]]; then return; fi
  python=$(find_py312 ${PYTHON:+"$PYTHON"})
  [[ -n "$python" ]] || die "no Python 3.12 found${PYTHON:+: PYTHON=$PYTHON is none}. Install one, or set PYTHON=/path/to/python3.12."
  if [[ "$("$venv/bin/python" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null)" != "3 12" ]]; then
    say "creating $venv"
    "$python" -m venv --clear "$venv"
  fi
  rm -f "$stamp"
  local pip=("$venv/bin/python" -m pip install -qq --disable-pip-version-check)
  if [[ -n ${MTP_TE_WHEELS:-} ]]; then pip+=(--find-links "$MTP_TE_WHEELS"); fi
  say "installing torch $torch for CUDA $cuda, with the headers and the compiler's front end that the build asks for"
  retry "${pip[@]}" "torch==$torch" "nvidia-cuda-nvcc==$cuda.*" "nvidia-cuda-cccl==$cuda.*" 'setuptools>=77' wheel ninja
  say "installing megatron-core $megatron and what the project needs beside torch"
  needs=$(mktemp)
  trap 'rm -f "$needs"' EXIT
  "$venv/bin/python" - >"$needs" <<'PY'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print("\n".join(need for need in project["dependencies"] if not need.startswith(("torch", "megatron-core"))))
print("pytest>=8.2\npytest-timeout>=2.3")
PY
  retry "${pip[@]}" -r "$needs" "megatron-core==$megatron"
  retry "${pip[@]}" --no-deps --no-build-isolation -e .
  rm -rf "$venv"/megatron-core-*
  retry "${pip[@]}" --no-deps --target "$venv/megatron-core-$newest" "megatron-core==$newest"
  say "building Transformer Engine $engine's extension for torch (minutes)"
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  for folder in "$site"/nvidia/*/include; do CPLUS_INCLUDE_PATH="$folder:${CPLUS_INCLUDE_PATH:-}"; done
  export CPLUS_INCLUDE_PATH CUDA_HOME="$site/nvidia/cu${cuda%.*}" MAX_JOBS="${MTP_TE_JOBS:-$(nproc)}"
  export NVTE_PYTORCH_FORCE_BUILD=TRUE PATH="$PWD/$venv/bin:$PATH"
  retry "${pip[@]}" "transformer-engine==$engine" "transformer-engine-cu${cuda%.*}==$engine" einops onnx onnxscript
  retry "${pip[@]}" --no-deps --no-build-isolation "transformer-engine-torch==$engine"
  # With CUDA_HOME it would take that folder for a whole toolkit, and look for cuBLAS no further.
  env -u CUDA_HOME "$venv/bin/python" -c 'import transformer_engine.pytorch' ||
    die "the environment in $venv does not import Transformer Engine, see above."
  echo "$key" >"$stamp"
}

if [[ -n ${MTP_TE_VENV:-} ]]; then
  venv=$MTP_TE_VENV
  "$venv/bin/python" -c 'import transformer_engine.pytorch, megatron.core' ||
    die "MTP_TE_VENV=$venv does not import Transformer Engine and megatron-core, see above."
else
  venv=.venv-te
  setup "$venv"
  exec 9>&- # its lock: the tests may take their time
fi
if ((!tests)); then exit 0; fi
unset CUDA_HOME CPLUS_INCLUDE_PATH

export MTP_TE_LANE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_VISIBLE_DEVICES=
# Some tests hold torch's products in bf16 to those in fp32 that stand in for cuBLAS, bit by bit. On processors with AMX
# oneDNN adds them up in another order, and about one in ten thousand is rounded otherwise.
export ONEDNN_MAX_CPU_ISA="${ONEDNN_MAX_CPU_ISA:-AVX512_CORE_BF16}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

status=0 found=0
run_tests() {
  local code=0
  "$venv/bin/python" - <<'PY'
import platform
from importlib.metadata import version

names = ("torch", "transformer-engine", "transformer-engine-torch", "megatron-core")
print(f"== Python {platform.python_version()},", ", ".join(f"{name} {version(name)}" for name in names))
PY
  "$venv/bin/python" -m pytest -rs -p no:cacheprovider tests/transformer_engine "${selection[@]}" || code=$?
  case $code in
    0) found=1 ;;
    5) ;; # none of the selection is among them
    *) status=$code ;;
  esac
}

run_tests
newer=("$venv"/megatron-core-*)
if [[ -d ${newer[0]} ]]; then
  PYTHONPATH="${newer[0]}:$PYTHONPATH" run_tests
else
  say "left out: the same with megatron-core $newest, which is not in $venv/megatron-core-$newest"
fi
if ((!found && !status)); then status=5; fi
exit $status
