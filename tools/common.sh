# shellcheck shell=bash
# What the scripts of this folder share. `source tools/common.sh NAME`: the name stands before their messages.

script=$1
say() { printf '[%s] %s\n' "$script" "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# retry COMMAND...: up to three times, for a network that fails now and then.
retry() {
  local attempt
  for attempt in 1 2 3; do
    "$@" && return
    if ((attempt < 3)); then say "attempt $attempt failed; again in $((attempt * 5)) s"; sleep $((attempt * 5)); fi
  done
  die "failed three times: $*"
}

# The first of the given interpreters (default: python3.12 on PATH, then pyenv's) that really runs as Python 3.12 and can
# make environments: a shim of pyenv may exist and refuse. Nothing where none does.
find_py312() {
  local candidate
  while read -r candidate; do
    if [[ "$("$candidate" -c 'import ensurepip, sys, venv; print(*sys.version_info[:2])' 2>/dev/null)" == "3 12" ]]; then
      echo "$candidate"
      return
    fi
  done < <(
    if (($#)); then
      printf '%s\n' "$@"
    else
      type -aP python3.12
      printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python
    fi
  )
}
