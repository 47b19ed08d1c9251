"""The strobe that is tested: a build of exactly these sources, found or made without a network."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import receipt

STAMP = "sources.sha256"  # in the package's folder: receipt.digest() of what it was built from
BUILT = ("src", "python")


def _problem(site, root):
    """Why the package in `site` is no build of these sources, or None."""
    package = Path(site) / "strobe"
    if not list(package.glob("_C*.so")):
        return "no extension is in it"
    stamp = package / STAMP
    if not stamp.exists():
        return f"it has no {STAMP} (python3 scripts/receipt.py stamp SITE, right after the build)"
    if stamp.read_text().strip() != receipt.digest(root, BUILT):
        return "it was built from other sources"
    for source in sorted((root / "python" / "strobe").rglob("*")):
        copy = package / source.relative_to(root / "python" / "strobe")
        if not source.is_file() or not receipt.counts(source):
            continue
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            return f"its {copy.name} is not that of the tree"
    return None


def _from_wheel(root, site):
    """Unpacks dist/*.whl where dist/*.tar.gz, which it was built from, holds these sources."""
    wheels, archives = (sorted((root / "dist").glob(p)) for p in ("strobe-*.whl", "strobe-*.tar.gz"))
    if not wheels or not archives:
        return False
    with tarfile.open(archives[-1]) as tar:
        held = {m.name.split("/", 1)[1]: tar.extractfile(m).read() for m in tar if m.isfile()}
    for path in receipt.files(root, BUILT):
        if held.get(path.relative_to(root).as_posix()) != path.read_bytes():
            return False
    shutil.rmtree(site, ignore_errors=True)
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(site)
    receipt.stamp(site, root)
    return True


def _lacks():
    if not shutil.which("cmake"):
        return "cmake"
    if not shutil.which("ninja") and not shutil.which("make"):
        return "ninja or make"
    if not shutil.which("c++"):
        return "a C++20 compiler as c++"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"Python.h in {sysconfig.get_path('include')}"
    return None


def _build(root, site):
    lacks = _lacks()
    if lacks:
        raise SystemExit(
            f"make test-gpu needs a strobe built from these sources, and cannot build one: {lacks} is missing here.\n"
            "Bring one along: build it elsewhere (pip install --no-deps --target build/gpu/site .), then "
            "python3 scripts/receipt.py stamp build/gpu/site"
        )
    print("building strobe from these sources", flush=True)
    folder = root / "build" / "gpu" / "cmake"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(root), "-B", str(folder), *generator, "-DSKBUILD=ON"]
    for command in (
        [*configure, f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", str(folder), "--target", "_C", "-j", str(os.cpu_count() or 4)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(root / "python", site, ignore=shutil.ignore_patterns("__pycache__"))
    (extension,) = folder.glob("_C*.so")
    shutil.copy(extension, Path(site) / "strobe")
    receipt.stamp(site, root)


def find_or_build(root):
    """The folder to import strobe from."""
    spec = importlib.util.find_spec("strobe")
    here = str(Path(spec.origin).parents[1]) if spec and spec.origin else None
    made = str(root / "build" / "gpu" / "site")
    for site in filter(None, (here, made)):
        problem = _problem(site, root) if Path(site, "strobe").exists() else "nothing is there"
        if problem is None:
            return site
        if site == here:
            print(f"the installed strobe is not used: {problem}", flush=True)
    if not _from_wheel(root, made):
        _build(root, made)
    problem = _problem(made, root)
    if problem:
        raise SystemExit(f"build/gpu/site: {problem}")
    return made


def described(site, root):
    path = Path(site).resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else "an installed package"
