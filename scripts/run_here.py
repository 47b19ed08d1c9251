"""Runs a program on a strobe of exactly these sources, found or built without a network, as `make test-gpu` does.

usage: run_here.py demo/main.py [options] | run_here.py -m bench.main [options]
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "gpu"), str(ROOT / "scripts")]

from installed import find_or_build  # noqa: E402

site = find_or_build(ROOT)
os.chdir(ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
