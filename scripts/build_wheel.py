"""Builds the sdist, and the wheel from what the sdist holds and nothing else. usage: build_wheel.py DIST"""

import subprocess
import sys
import tarfile
from pathlib import Path

from scikit_build_core.build import build_sdist

ROOT = Path(__file__).resolve().parents[1]


def unpack(archive: Path, folder: Path) -> None:
    """Makes `folder` what the archive holds. Files that are the same keep their time: the next build is incremental."""
    with tarfile.open(archive) as tar:
        contents = {m.name.split("/", 1)[1]: tar.extractfile(m).read() for m in tar if m.isfile()}
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        if path.relative_to(folder).as_posix() not in contents:
            path.unlink()
    for name, data in contents.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def main() -> None:
    dist = Path(sys.argv[1]).resolve()
    dist.mkdir(exist_ok=True)
    for old in [*dist.glob("strobe-*.whl"), *dist.glob("strobe-*.tar.gz")]:
        old.unlink()
    unpacked = ROOT / "build" / "sdist"
    unpack(dist / build_sdist(str(dist)), unpacked)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(dist), "-C", f"build-dir={ROOT / 'build' / 'wheel'}", str(unpacked)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
