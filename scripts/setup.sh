#!/usr/bin/env bash
# Makes the virtual environment DIR with everything in requirements-dev.txt; names the system package that is missing,
# and installs it where the user is root. usage: setup.sh DIR
set -euo pipefail
venv=$1
missing=()
command -v c++ >/dev/null || missing+=(g++)
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "strobe needs Python 3.10 or newer" >&2; exit 1; }
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
python3 -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || missing+=(python3-dev)
if ((${#missing[@]})); then
  echo "missing: ${missing[*]}; install with: apt-get install ${missing[*]}" >&2
  [ "$(id -u)" = 0 ] || exit 1
  apt-get update -q && apt-get install -y -q "${missing[@]}"
fi
echo 'int main() { return [] consteval { return 0; }(); }' | c++ -std=c++20 -x c++ -fsyntax-only - ||
  { echo "strobe needs a C++20 compiler: g++ 12 or clang 15, or newer" >&2; exit 1; }
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
