#!/usr/bin/env bash
# Choose the Python that runs this project and export it as PYTHON.
#
#     source scripts/setup_env.sh || exit 1        # then "$PYTHON" train_c2i.py ...
#
# Takes $PYTHON (default: python3) where it meets requirements.txt; else .venv, which is made, or completed, by pip.
# The network is touched only then. SKIP_SETUP=1 takes $PYTHON as it is. Two scripts at once wait for each other.
# Left out: the choice of a package index or of a torch build; pip's own variables (PIP_INDEX_URL, ...) do that.

_setup_say() { printf 'setup: %s\n' "$*" >&2; }

# _setup_lacks PYTHON: prints what it lacks on one line and succeeds; fails when nothing is lacking.
_setup_lacks() {
  local missing status=0
  missing=$("$1" "$_setup_root/scripts/check_requirements.py" "$_setup_root/requirements.txt") || status=$?
  case $status in
    0) return 1 ;;
    1) printf '%s' "${missing//$'\n'/; }" ;;
    *) printf 'a readable requirements check (%s)' "$1" ;;
  esac
}

# Runs under the lock: the other script may have done the work meanwhile.
_setup_install() {
  local base=$1 venv=$2 missing
  if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    missing=$(_setup_lacks "$venv/bin/python") || return 0
  else
    rm -f "$venv"/bin/python*  # links to a Python that is gone: venv would keep them
    "$base" -m venv "$venv" >&2 || {
      _setup_say "error: '$base -m venv $venv' failed (on Debian and Ubuntu: apt install python3-venv)"
      return 1
    }
    missing=$(_setup_lacks "$venv/bin/python") || return 0
  fi
  _setup_say "installing into $venv: $missing"
  "$venv/bin/python" -m pip install --disable-pip-version-check -r "$_setup_root/requirements.txt" >&2 || {
    _setup_say "error: pip could not install (no network?); missing: $missing"
    return 1
  }
  if missing=$(_setup_lacks "$venv/bin/python"); then
    _setup_say "error: still missing after pip: $missing"
    return 1
  fi
}

_setup_choose() {
  local base venv="$_setup_root/.venv" missing
  base=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)') || {
    _setup_say "error: ${PYTHON:-python3} does not run; set PYTHON to a Python 3.10 to 3.12"
    return 1
  }
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    _setup_say "error: $base is $("$base" -V 2>&1); set PYTHON to a Python 3.10 to 3.12"
    return 1
  }
  PYTHON=$base
  [ "${SKIP_SETUP:-0}" != 1 ] || return 0
  missing=$(_setup_lacks "$base") || return 0
  PYTHON="$venv/bin/python"
  if [ -x "$PYTHON" ] && ! _setup_lacks "$PYTHON" >/dev/null; then return 0; fi
  _setup_say "$base lacks: $missing"
  "$base" -c 'import sys; sys.exit(sys.version_info >= (3, 13))' ||
    _setup_say "note: $base is newer than the Python 3.10 to 3.12 that this project is tested with"
  mkdir -p "$venv" || { _setup_say "error: cannot write $venv"; return 1; }
  # The lock belongs to the open file, so it survives the Python that takes it and goes with this subshell, even killed.
  # Linux locks on NFS count on all machines; Lustre needs its mount option flock.
  (
    "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' || {
      _setup_say "error: $venv/.lock cannot be locked (file system?): install into a Python once, then PYTHON=that one"
      exit 1
    }
    _setup_install "$base" "$venv"
  ) 9>"$venv/.lock"
}

_setup_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) && _setup_choose && export PYTHON
