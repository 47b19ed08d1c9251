"""The receipt of the GPU tests, tests/gpu/receipt.json: what was run, where, and on which sources.

receipt.py check       exits non-zero unless the receipt is of these sources with nothing failed, or tests/gpu/PENDING
                       says in a sentence what has not been run yet
receipt.py merge PART  adds what main.py --only ... --receipt PART saw on another machine, of the same sources: jobs
                       that the receipt's own machine skipped, for want of a second GPU
receipt.py digest      prints the digest of every source that reaches a GPU
receipt.py stamp SITE  marks the strobe in SITE as a build of these sources, for machines that only run it
"""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "python", "compat", "tests/gpu")
NOT_SOURCES = ("receipt.json", "PENDING")  # of tests/gpu


def counts(path):
    """Whether a file is a source: no cache, nothing built, not what the tests write."""
    return "__pycache__" not in path.parts and path.suffix not in (".pyc", ".so") and path.name not in NOT_SOURCES


def files(root=ROOT, folders=FOLDERS):
    return sorted(path for folder in folders for path in (root / folder).rglob("*") if path.is_file() and counts(path))


def digest(root=ROOT, folders=FOLDERS):
    total = hashlib.sha256()
    for path in files(root, folders):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()


def stamp(site, root=ROOT):
    (Path(site) / "strobe" / "sources.sha256").write_text(digest(root, ("src", "python")) + "\n")


def _driver():
    try:
        text = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    found = re.search(r"Driver Version:\s*([\d.]+)", text)
    return found[1] if found else "unknown"


def _machine():
    import torch

    major, minor = torch.cuda.get_device_capability()
    return dict(
        device=torch.cuda.get_device_name(),
        devices=torch.cuda.device_count(),
        architecture=f"sm_{major}{minor}",
        driver=_driver(),
        cuda=torch.version.cuda,
        torch=torch.__version__,
        python=sys.version.split()[0],
    )


def _store(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


def write(path, result):
    """Writes the receipt, and removes tests/gpu/PENDING: what it asked for has been run."""
    _store(path, dict(sources=digest(), **_machine(), **result))
    (ROOT / "tests" / "gpu" / "PENDING").unlink(missing_ok=True)


def write_part(path, passed, failed, seconds):
    """What some of the jobs came to, for merge()."""
    _store(path, dict(sources=digest(), **_machine(), passed=passed, failed=failed, seconds=seconds))


def merge(path, part):
    """Skipped jobs of the receipt at `path` that passed in `part` are passed; where, is kept. Returns how many."""
    receipt, part = json.loads(Path(path).read_text()), json.loads(Path(part).read_text())
    if part["sources"] != receipt["sources"]:
        raise SystemExit("the part is of other sources than the receipt")
    if part["failed"]:
        raise SystemExit(f"{part['failed']} jobs of the part failed")
    shown = {line: name for line in receipt["skipped"] for name in part["passed"] if line.startswith(f"{name}: ")}
    receipt["skipped"] = [line for line in receipt["skipped"] if line not in shown]
    for counted in (receipt["counts"], receipt["kinds"]["scenario"]):
        counted["skipped"] -= len(shown)
        counted["passed"] += len(shown)
    if shown:
        where = {key: part[key] for key in part if key not in ("sources", "passed", "failed")}
        receipt.setdefault("elsewhere", []).append(where | dict(passed=sorted(shown.values())))
        _store(Path(path), receipt)
    return len(shown)


def problem(root=ROOT):
    """Why the receipt proves nothing about these sources, or None."""
    path = root / "tests" / "gpu" / "receipt.json"
    if not path.exists():
        return "tests/gpu/receipt.json is missing"
    try:
        receipt = json.loads(path.read_text())
        counted = receipt["counts"]
        failed, passed = counted["failed"], counted["passed"]
        sources, sanitizer = receipt["sources"], receipt["sanitizer"]
    except (ValueError, KeyError, TypeError) as error:
        return f"tests/gpu/receipt.json cannot be read: {error!r}"
    if sources != digest(root):
        return "tests/gpu/receipt.json is of other sources"
    if failed != 0 or passed < 3000:
        return f"tests/gpu/receipt.json counts {passed} passed and {failed} failed"
    found = {name: run for name, run in sanitizer.items() if name != "seconds"} if isinstance(sanitizer, dict) else {}
    dirty = [name for name, run in found.items() if run["findings"] != 0 and not name.startswith("planted")]
    if dirty:
        return f"tests/gpu/receipt.json: compute-sanitizer is not clean: {', '.join(dirty)}"
    return None


def check(root=ROOT):
    pending = root / "tests" / "gpu" / "PENDING"
    why = problem(root)
    if why is None:
        print("the GPU receipt is of these sources, nothing failed")
        sanitizer = json.loads((root / "tests" / "gpu" / "receipt.json").read_text())["sanitizer"]
        if not isinstance(sanitizer, dict):
            print(f"NOTICE: {sanitizer}")
        return 0
    sentence = pending.read_text().strip() if pending.exists() else ""
    if len(sentence.split()) >= 4:
        print(f"NOTICE: {why}; accepted because tests/gpu/PENDING says: {sentence}")
        return 0
    print(f"{why}: run make test-gpu on a machine with a GPU", file=sys.stderr)
    if pending.exists():
        print("tests/gpu/PENDING holds no sentence", file=sys.stderr)
    return 1


def main(arguments):
    if arguments == ["check"]:
        return check()
    if len(arguments) == 2 and arguments[0] == "merge":
        print(f"{merge(ROOT / 'tests' / 'gpu' / 'receipt.json', arguments[1])} skipped jobs have passed elsewhere")
        return 0
    if arguments == ["digest"]:
        print(digest())
        return 0
    if len(arguments) == 2 and arguments[0] == "stamp":
        stamp(arguments[1])
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
