#!/usr/bin/env bash
# Runs the Python tests on the wheels in dist/, installed into a fresh virtual environment, from a folder in which the
# sources are out of sight. usage: test_wheel.sh PYTHON [pytest arguments]
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$root/build/wheel-venv
rm -rf "$venv"
"$python" -m venv --without-pip "$venv"
"$python" -m pip --python "$venv/bin/python" install --quiet --no-deps "$root"/dist/*.whl
# torch and pytest are those of PYTHON, which come after the environment's own packages on the path.
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
"$python" -c "$packages" >"$("$venv/bin/python" -c "$packages")/development.pth"
cd "$venv"
"$venv/bin/python" - <<'PYTHON'
import pathlib, sys, strobe

assert pathlib.Path(strobe.__file__).is_relative_to(sys.prefix), f"strobe is imported from {strobe.__file__}"
PYTHON
# A process for every core. Each has PyTorch's threads, one a core, too: those that spin while they wait would take the
# cores from the others.
export OMP_WAIT_POLICY=passive
exec "$venv/bin/python" -m pytest -q -p no:cacheprovider -n logical --maxprocesses 8 --dist worksteal \
	"$root"/tests/{py,compat,hf,vllm} "$@"
