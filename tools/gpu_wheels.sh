#!/usr/bin/env bash
# Fills a folder with wheels for `WHEELS=DIR bash tools/gpu_check.sh` on a GPU machine without a network:
#   bash tools/gpu_wheels.sh DIR
# The machine needs Linux on x86_64, Python 3.12 and torch 2.11 for CUDA 13.0 (as tools/te_lane.sh builds against); of
# everything else that the project needs there will be a wheel, Transformer Engine's among them. NVIDIA's Apex is on no
# package index: add the wheel of your own build (apex-*.whl).
# Options:
#   --architecture 9.0   GPU code of Transformer Engine for this compute capability alone: 30 MB in place of 170
#   --help               this text
# Environment: that of tools/te_lane.sh, whose environment this makes first (minutes; 3 GB of downloads).
set -euo pipefail

usage() { sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' tools/gpu_wheels.sh; }
folder='' architecture='' here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source tools/common.sh gpu-wheels
while (($#)); do
  case $1 in
    --architecture) architecture=${2:-}; shift ;;
    -h | --help) usage; exit 0 ;;
    -*) die "unknown option $1 (see --help)" ;;
    *) folder=$1 ;;
  esac
  shift
done
[[ -n $folder ]] || die "name a folder for the wheels (see --help)"
[[ -z $architecture || $architecture =~ ^[0-9]+\.[0-9]$ ]] ||
  die "--architecture $architecture: a compute capability is wanted, such as 9.0 for H100 and H200"
mkdir -p "$(cd "$here" && realpath -m "$folder")"
folder=$(cd "$here" && realpath "$folder")

bash tools/te_lane.sh --setup-only
venv=${MTP_TE_VENV:-.venv-te}
list=$(mktemp)
trap 'rm -f "$list"' EXIT
# What the project and its tests need, by the versions in that environment, without torch and what comes with it.
"$venv/bin/python" - >"$list" <<'PY'
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(texts):
    found, todo = {}, [(Requirement(text), "") for text in texts]
    seen = set()
    while todo:
        need, extra = todo.pop()
        name = canonicalize_name(need.name)
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:  # the environment does without it; pip there would not
            found[name] = str(need.specifier)
            continue
        found[name] = f"=={package.version}"
        for wanted in ("", *need.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                todo += [(Requirement(line), wanted) for line in package.requires or []]
    return found


project = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
project = [text for text in project if not text.startswith(("torch", "megatron-core"))]
wanted = closure([*project, "pytest", "pytest-timeout", "transformer-engine[pytorch,core_cu13]"])
for name in sorted(set(wanted) - set(closure(["torch"]))):
    print(f"{name}{wanted[name]}")
PY
# The newest megatron-core there, whose wheel has Megatron-LM's loop; the rivals of tools/bench_loss.py.
found=("$venv"/megatron-core-*)
if [[ -d ${found[0]} ]]; then
  megatron=${found[0]##*-}
else
  megatron=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("megatron-core"))')
fi
printf '%s\n' "megatron-core==$megatron" liger-kernel cut-cross-entropy >>"$list"
say "collecting $(wc -l <"$list") wheels in $folder"
retry "$venv/bin/python" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation \
  --wheel-dir "$folder" ${MTP_TE_WHEELS:+--find-links "$MTP_TE_WHEELS"} -r "$list"
if [[ -n $architecture ]]; then
  "$venv/bin/python" tools/thin_wheel.py "$folder"/transformer_engine_cu*.whl --architecture "$architecture"
fi
du -ch "$folder"/*.whl
