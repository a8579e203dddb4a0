#!/usr/bin/env bash
# Creates .venv in the checkout with the package (editable) and all that its tests need. Returns at once when that is done.
#
# Environment:
#   PYTHON               the interpreter to build on (default: the first of python3.11, python3.12, python3 that fits)
#   MTP_VENV             the folder to make instead of .venv, for an environment beside it
#   MTP_TORCH_INDEX_URL  a package index for torch alone, for example one with CPU builds (default: pip's own settings)
#   MTP_SETUP_FORCE=1    install again although nothing changed
#   MTP_DEEPSPEED=0      leave DeepSpeed out; its tests are then skipped
#   MTP_TRITON=0         leave Triton out; the tests of the loss's kernels are then skipped where torch comes without it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${MTP_VENV:-.venv}"
stamp="$venv/.mtp-setup"

# shellcheck source=/dev/null
source tools/common.sh setup

# "3.11" for an interpreter that really runs (a pyenv shim may exist and refuse) and can make environments; else nothing.
version_of() { "$1" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
supported() { [[ "$1" == 3.11 || "$1" == 3.12 ]]; }

pick_python() {
  local name candidate version seen=""
  if [[ -n "${PYTHON:-}" ]]; then
    version=$(version_of "$PYTHON")
    supported "$version" || die "PYTHON=$PYTHON is ${version:-no Python that runs and has venv}: this project is tested on 3.11 and 3.12. Point PYTHON at one of them."
    echo "$PYTHON"
    return
  fi
  for name in python3.11 python3.12 python3 python; do
    while read -r candidate; do
      version=$(version_of "$candidate")
      if supported "$version"; then echo "$candidate"; return; fi
      seen+="; $candidate is ${version:-not usable (does not run, or lacks venv: apt install python3-venv)}"
    done < <(type -aP "$name" || true)
  done
  die "no usable Python 3.11 or 3.12 found${seen}. Install one, or set PYTHON=/path/to/python3.11."
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU '; }

# One set-up at a time; a second one waits for the first and then finds the work done.
if command -v flock >/dev/null; then
  exec 9>"$venv.lock"
  flock 9
fi

if [[ -x "$venv/bin/python" ]] && supported "$(version_of "$venv/bin/python")" && [[ -z "${PYTHON:-}" ]]; then
  version=$(version_of "$venv/bin/python")
else
  python=$(pick_python)
  version=$(version_of "$python")
fi
constraints="tools/constraints-cpu-py${version/./}.txt"
[[ -f "$constraints" ]] || die "$constraints is missing from the checkout."
device=cpu
if has_gpu; then device=gpu; fi

with_deepspeed="${MTP_DEEPSPEED:-1}"
# With a GPU its installation asks nvcc for its version.
if [[ $device == gpu ]] && ! command -v nvcc >/dev/null; then with_deepspeed=0; fi
key=$(cat pyproject.toml "$constraints" tools/setup.sh | sha256sum | cut -d' ' -f1)-$version-$device
if [[ "${MTP_DEEPSPEED:-1}" != 1 ]]; then key+=-without-deepspeed; fi
if [[ "${MTP_TRITON:-1}" != 1 ]]; then key+=-without-triton; fi
if [[ -z "${MTP_SETUP_FORCE:-}" && -f "$stamp" && "$(cat "$stamp")" == "$key" && "$(version_of "$venv/bin/python")" == "$version" ]]; then
  exit 0
fi

if [[ "$(version_of "$venv/bin/python")" != "$version" ]]; then
  say "creating $venv with Python $version"
  # A vendor's container brings a torch (and Transformer Engine, Apex) built for its GPU: see them, and replace torch only
  # where it is outside the range.
  site=()
  if [[ $device == gpu ]] && "$python" -c 'import torch' 2>/dev/null; then site=(--system-site-packages); fi
  "$python" -m venv --clear "${site[@]}" "$venv"
fi
rm -f "$stamp"
pip=("$venv/bin/python" -m pip install -qq --disable-pip-version-check)

torch_index=()
if [[ -n "${MTP_TORCH_INDEX_URL:-}" ]]; then torch_index=(--index-url "$MTP_TORCH_INDEX_URL"); fi
requirement() { grep -oE "\"$1[^\"]*\"" pyproject.toml | head -n 1 | tr -d '"'; }

if [[ $device == cpu ]]; then
  say "installing torch ($(grep -E '^torch==' "$constraints")) for CPU"
  retry "${pip[@]}" -c "$constraints" "${torch_index[@]}" torch
  say "installing the package and its tools"
  retry "${pip[@]}" -c "$constraints" -e '.[dev]'
else
  # The pins are those of the CPU environment: here torch may be any release in pyproject.toml's range.
  say "GPU found: installing $(requirement torch)"
  retry "${pip[@]}" "${torch_index[@]}" "$(requirement torch)"
  pins=$(mktemp)
  trap 'rm -f "$pins"' EXIT
  grep -vE '^(torch|triton|nvidia-)' "$constraints" >"$pins"
  say "installing the package and its tools"
  retry "${pip[@]}" -c "$pins" -e '.[dev]'
fi
if [[ $with_deepspeed == 1 ]]; then
  say "installing $(requirement deepspeed)"
  # Its build looks at the torch that is installed. The kernels are compiled when they are first used.
  retry "${pip[@]}" -c "${pins:-$constraints}" 'setuptools>=77'
  DS_BUILD_OPS=0 retry "${pip[@]}" -c "${pins:-$constraints}" --no-build-isolation "$(requirement deepspeed)"
fi
# For the tests of the loss's kernels, in Triton's interpreter (3.6's fails with numpy 2.4). CPU builds of torch come without
# it, and megatron-core takes other paths through its code where it can import it: so it goes (640 MB) where only those tests
# look (tests/interpreter.py).
triton=3.7.1
if [[ $device == cpu && "${MTP_TRITON:-1}" == 1 && "$(uname -s)" == Linux && ! -d "$venv/triton/triton-$triton.dist-info" ]]; then
  say "installing Triton $triton for the tests of its kernels"
  rm -rf "$venv/triton"
  retry "${pip[@]}" --no-deps --target "$venv/triton" "triton==$triton"
fi

"$venv/bin/python" -c 'import torch, megatron.core, mtp_megatron' 2>/dev/null ||
  die "the environment in $venv does not import torch and megatron.core; run '$venv/bin/python -c \"import megatron.core\"' to see why."
echo "$key" >"$stamp"
say "done: $venv, Python $version, $("$venv/bin/python" -c 'import torch; print("torch", torch.__version__)')"
