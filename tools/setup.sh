#!/usr/bin/env bash
# Creates .venv in the checkout with the package (editable) and all that its tests need. Returns at once when that is done.
#
# Environment:
#   PYTHON               the interpreter to build on (default: the first of python3.11, python3.12, python3 that fits)
#   MTP_VENV             the folder to make instead of .venv, for an environment beside it
#   MTP_TORCH_INDEX_URL  a package index for torch alone, for example one with CPU builds (default: pip's own settings); on a
#                        machine with a GPU another index replaces torch, and an environment keeps to the last one named
#   MTP_SETUP_FORCE=1    install again although nothing changed
#   MTP_DEEPSPEED=0      leave DeepSpeed out; its tests are then skipped
#   MTP_TRITON=0         leave Triton out; the tests of the loss's kernels are then skipped where torch comes without it
#
# In a vendor's container (NVIDIA's, whose torch is 2.12.0a0+...nv26.07) the environment sees the container's packages, its
# torch stays, and what is missing is installed beside it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${MTP_VENV:-.venv}"
venv="${venv%/}"
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

torch_of() { "$1" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true; }

# The version of a torch that a container's vendor built, or that the container's constraints ask for: its Transformer Engine
# and Apex fit no other. Nothing where there is none.
vendor_torch() {
  local base found
  base=$("$1" -c 'import sys; print(sys._base_executable)' 2>/dev/null) || return 0 # not of an environment
  found=$(torch_of "$base")
  # shellcheck disable=SC2086 # a list of files
  if [[ "$found" == *a0* || "$found" == *+*nv* ]] ||
    { [[ -n "$found" ]] && grep -qsE '^torch *(==|@)' ${PIP_CONSTRAINT:-} /dev/null; }; then
    echo "$found"
  fi
}

# One set-up at a time; a second one waits for the first and then finds the work done.
writable=1
if ! { mkdir -p "$(dirname "$venv")" && : >>"$venv.lock"; } 2>/dev/null; then
  writable=0 # nor can anybody else change it
elif command -v flock >/dev/null; then
  exec 9>"$venv.lock"
  flock 9
fi

if [[ -x "$venv/bin/python" ]] && supported "$(version_of "$venv/bin/python")" && [[ -z "${PYTHON:-}" ]]; then
  python="$venv/bin/python"
else
  python=$(pick_python)
fi
version=$(version_of "$python")
vendor=$(vendor_torch "$python")
constraints="tools/constraints-cpu-py${version/./}.txt"
[[ -f "$constraints" ]] || die "$constraints is missing from the checkout."
device=cpu
if [[ -n "${CUDA_VISIBLE_DEVICES-all}" ]] && lists_gpu; then device=gpu; fi # empty: the CPU is meant

with_deepspeed=0
if [[ "${MTP_DEEPSPEED:-1}" == 1 ]]; then with_deepspeed=1; fi
no_nvcc=
# With a GPU its installation asks nvcc for its version.
if [[ $with_deepspeed == 1 && $device == gpu ]] && ! command -v nvcc >/dev/null; then with_deepspeed=0 no_nvcc=1; fi
index="${MTP_TORCH_INDEX_URL:-}" last_index=
key=$(cat pyproject.toml "$constraints" tools/setup.sh | sha256sum | cut -d' ' -f1)-$version-$device
if [[ $with_deepspeed != 1 ]]; then key+=-without-deepspeed; fi
if [[ "${MTP_TRITON:-1}" != 1 ]]; then key+=-without-triton; fi
if [[ -n $vendor ]]; then
  key+=-$vendor
elif [[ $device == gpu ]]; then
  # Scripts that call this one know nothing of an index that was named once.
  last_index=$(cat "$venv/.mtp-torch-index" 2>/dev/null || true)
  index="${index:-$last_index}"
  if [[ -n $index ]]; then key+=-$(sha256sum <<<"$index" | cut -c1-12); fi
fi
if [[ -z "${MTP_SETUP_FORCE:-}" && -f "$stamp" && "$(cat "$stamp")" == "$key" && "$(version_of "$venv/bin/python")" == "$version" ]]; then
  exit 0
fi

if [[ ! -w . ]]; then
  die "the checkout in $PWD cannot be written, and an editable installation keeps its metadata there: use a writable copy of it."
elif ((!writable)); then
  die "$venv.lock cannot be written: set MTP_VENV=/path/to/environment to have the environment elsewhere, or use a writable copy of the checkout."
fi
if [[ -n $vendor ]]; then
  misfit=$(torch_misfit "$("$python" -c 'import sys; print(sys._base_executable)')")
  [[ -z $misfit ]] || die "this container has $misfit. Its Transformer Engine and Apex fit no other torch, so it is not replaced: use a container whose torch is in that range (NVIDIA's PyTorch container has 2.11 from nvcr.io/nvidia/pytorch:26.02-py3 on)."
fi

if [[ "$(version_of "$venv/bin/python")" != "$version" || (-n $vendor && "$(torch_of "$venv/bin/python")" != "$vendor") ]]; then
  say "creating $venv with Python $version"
  # What a machine with a GPU has of torch is seen, and replaced only where it is outside the range; a vendor's never.
  site=()
  if [[ -n $vendor ]] || { [[ $device == gpu ]] && "$python" -c 'import torch' 2>/dev/null; }; then
    site=(--system-site-packages)
  fi
  if [[ -n $vendor ]]; then python=$("$python" -c 'import sys; print(sys._base_executable)'); fi # it may be of this $venv
  "$python" -m venv --clear "${site[@]}" "$venv"
fi
rm -f "$stamp"
if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then # uv makes such environments
  say "$venv has no pip: installing it"
  "$venv/bin/python" -m ensurepip >/dev/null ||
    die "$venv has no pip, and ensurepip cannot install it. Remove $venv, and this script makes a new one."
fi
pip=("$venv/bin/python" -m pip install -qq --disable-pip-version-check)

torch_index=()
if [[ -n $index ]]; then torch_index=(--index-url "$index"); fi
requirement() { grep -oE "\"$1[^\"]*\"" pyproject.toml | head -n 1 | tr -d '"'; }

if [[ -n $vendor ]]; then
  say "torch $vendor is this container's and stays; installing what is missing"
  if [[ -n $index ]]; then say "MTP_TORCH_INDEX_URL is not used: torch is there"; fi
  pins=$(mktemp) needs=$(mktemp)
  trap 'rm -f "$pins" "$needs"' EXIT
  # The container's constraints are for the container's own packages, which nothing in this environment changes.
  export PIP_CONSTRAINT=
  echo "torch==$vendor" >"$pins"
  "$venv/bin/python" - >"$needs" <<'PY'
import re, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
needs = [*project["dependencies"], *extras["parquet"], *extras["report"], *extras["zst"], *extras["dev"]]
print(*(need for need in needs if not re.match(r"(torch|megatron-core|mtp-megatron)[^\w-]", need)), sep="\n")
PY
  retry "${pip[@]}" -c "$pins" -r "$needs"
  retry "${pip[@]}" --no-deps "$(requirement megatron-core)" # to pip a 2.11.0a0 may be too old for it
  retry "${pip[@]}" --no-deps -e .
elif [[ $device == cpu ]]; then
  say "installing torch ($(grep -E '^torch==' "$constraints")) for CPU"
  retry "${pip[@]}" -c "$constraints" "${torch_index[@]}" torch
  say "installing the package and its tools"
  retry "${pip[@]}" -c "$constraints" -e '.[dev]'
else
  # The pins are those of the CPU environment: here torch may be any release in pyproject.toml's range.
  say "GPU found: installing $(requirement torch)"
  # To pip a torch of another index, or one without CUDA, is as good.
  if [[ -n "$(torch_of "$venv/bin/python")" ]] && { [[ "$index" != "$last_index" ]] ||
    [[ "$("$venv/bin/python" -c 'import torch; print(torch.version.cuda)' 2>/dev/null)" == None ]]; }; then
    say "replacing torch $(torch_of "$venv/bin/python")"
    retry "${pip[@]}" --force-reinstall --no-deps "${torch_index[@]}" "$(requirement torch)"
  fi
  retry "${pip[@]}" "${torch_index[@]}" "$(requirement torch)"
  pins=$(mktemp)
  trap 'rm -f "$pins"' EXIT
  grep -vE '^(torch|triton|nvidia-)' "$constraints" >"$pins"
  say "installing the package and its tools"
  retry "${pip[@]}" -c "$pins" -e '.[dev]'
fi
if [[ -n $no_nvcc ]]; then say "DeepSpeed is left out, and its tests are skipped: with a GPU its installation needs nvcc, which is not on PATH"; fi
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
if [[ -z $vendor && $device == cpu && "${MTP_TRITON:-1}" == 1 && "$(uname -s)" == Linux && ! -d "$venv/triton/triton-$triton.dist-info" ]]; then
  say "installing Triton $triton for the tests of its kernels"
  rm -rf "$venv/triton"
  retry "${pip[@]}" --no-deps --target "$venv/triton" "triton==$triton"
fi

"$venv/bin/python" -c 'import torch, megatron.core, mtp_megatron' 2>/dev/null ||
  die "the environment in $venv does not import torch and megatron.core; run '$venv/bin/python -c \"import megatron.core\"' to see why."
if [[ -n $vendor && "$(torch_of "$venv/bin/python")" != "$vendor" ]]; then
  die "$venv has torch $(torch_of "$venv/bin/python") in place of the container's $vendor. Remove $venv and try again; if that does not help, this is a defect of tools/setup.sh."
fi
# A selection of devices is the caller's business; here the question is whether torch and the driver fit.
if [[ $device == gpu ]] && ! why=$(unset CUDA_VISIBLE_DEVICES; cuda_works "$venv/bin/python"); then
  if [[ -n $vendor ]]; then
    remedy="A newer driver is needed, or a container for this one."
  elif [[ "$("$venv/bin/python" -c 'import torch; print(torch.version.cuda)')" == None ]]; then
    remedy="It comes from ${index:-the default index}. Name one with a build for CUDA in MTP_TORCH_INDEX_URL, or make an environment for the CPU: CUDA_VISIBLE_DEVICES= bash tools/setup.sh"
  else
    remedy="For a driver of CUDA 12: MTP_TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126 bash tools/setup.sh"
  fi
  die "nvidia-smi lists a GPU that the torch in $venv cannot use. $why
$remedy"
fi
if [[ $device == gpu && -z $vendor && -n $index ]]; then (umask 077 && echo "$index" >"$venv/.mtp-torch-index"); fi
echo "$key" >"$stamp"
say "done: $venv, Python $version, $("$venv/bin/python" -c 'import torch; print("torch", torch.__version__)')"
