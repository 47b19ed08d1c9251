"""The files of docs/images, written or compared by the programs that draw them."""

import sys
from pathlib import Path

IMAGES = Path(__file__).parent / "images"


def main(drawn: dict[str, str]) -> int:
    """Writes pictures, by file name; with --check says instead which files differ, and returns whether any does."""
    if "--check" not in sys.argv[1:]:
        IMAGES.mkdir(exist_ok=True)
        for name, picture in drawn.items():
            (IMAGES / name).write_text(picture + "\n", encoding="utf-8")
        return 0
    stale = [str(IMAGES / name) for name, picture in drawn.items() if not holds(IMAGES / name, picture + "\n")]
    if stale:
        print(f"not as {sys.argv[0]} draws them:", *stale, sep="\n  ")
    return bool(stale)


def holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text
