#!/usr/bin/env bash
# Makes the virtual environment DIR with everything in requirements-dev.txt; names the system package that is missing,
# and installs it where the user is root. usage: setup.sh DIR
set -euo pipefail
venv=$1

# Debian and Ubuntu split Python: ensurepip comes with python3-venv, Python.h with python3-dev.
missing_packages() {
  command -v make >/dev/null || echo make
  command -v c++ >/dev/null || echo g++
  command -v python3 >/dev/null || { echo python3 python3-venv python3-dev; return; }
  python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
  python3 -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    echo python3-dev
}

missing=$(missing_packages | xargs)
if [ -n "$missing" ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "strobe needs $missing: sudo apt-get install $missing" >&2
    exit 1
  fi
  echo "installing $missing: apt-get install $missing" >&2
  # shellcheck disable=SC2086 # one word per package
  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q $missing
  missing=$(missing_packages | xargs)
  # What is still missing belongs to a Python that did not come from apt.
  [ -z "$missing" ] || { echo "strobe still misses $missing for $(command -v python3)" >&2; exit 1; }
fi

python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "strobe needs Python 3.10 or newer, $(command -v python3) is $(python3 -V)" >&2; exit 1; }
printf '%s\n' '#include <concepts>' '#if defined(__clang__) ? __clang_major__ < 15 : __GNUC__ < 12' '#error old' '#endif' |
  c++ -std=c++20 -x c++ -fsyntax-only - 2>/dev/null ||
  { echo "strobe needs g++ 12 or clang 15, or newer; $(command -v c++) is $(c++ --version | head -n 1)" >&2; exit 1; }

python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
