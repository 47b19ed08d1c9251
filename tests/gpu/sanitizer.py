"""compute-sanitizer over sanitizer_calls.py, beside the suite: memcheck, racecheck, synccheck, initcheck."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOOLS = dict(
    memcheck=["--tool", "memcheck"],
    racecheck=["--tool", "racecheck", "--racecheck-report", "all"],
    synccheck=["--tool", "synccheck"],
    initcheck=["--tool", "initcheck"],
)
# Strobe's kernels live in namespace strobe; what torch launches beside them is not under test.
OURS = ["--kernel-name", "kernel_substring=strobe"]
# initcheck does not see what tensor copies write, such as outputs of sm90. Only the backward pass reads those, by
# kernels of sm80, which are watched there.
BLIND = {("sm90", "initcheck"): ["--kernel-name-exclude", "kernel_substring=bwd"]}
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
DONE = re.compile(r"(\d+) calls, (\d+) refused")


def find():
    places = [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    path = os.pathsep.join([os.environ.get("PATH", ""), *places, *PLACES])
    return shutil.which("compute-sanitizer", path=path)


class Runs:
    """Starts all tools on all engines, and on a planted mistake, at once; finish() waits for them."""

    def __init__(self, engines):
        self.tool = find()
        self.running, self.begin = {}, time.monotonic()
        if not self.tool:
            return
        # Each tensor is an allocation of its own, so that its bounds and its first writes are known.
        env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for name, arguments in TOOLS.items():
            self._start(f"planted {name}", arguments, env, "sanitizer_planted.py", name)
            for engine in engines:
                watched = arguments + BLIND.get((engine, name), [])
                self._start(f"{engine} {name}", watched, env, "sanitizer_calls.py", engine)

    def _start(self, name, tool, env, script, argument):
        log = tempfile.TemporaryFile("w+")
        path = str(Path(__file__).with_name(script))
        command = [self.tool, *tool, *OURS, "--print-limit", "20", sys.executable, path, argument]
        self.running[name] = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT), log

    def finish(self, seconds):
        if not self.tool:
            return "compute-sanitizer is not on this machine: nothing was run"
        deadline, findings = time.monotonic() + seconds, {}
        for name, (process, log) in self.running.items():
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
                late = False
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                late = True
            log.seek(0)
            text = log.read()
            findings[name] = _finding(text, process.returncode, late)
            if not _is_clean(name, findings[name]):
                print(f"SANITIZER {name}: {findings[name]}\n{_excerpt(text)}", flush=True)
        findings["seconds"] = round(time.monotonic() - self.begin, 1)
        return findings


def _finding(text, status, late):
    summary, done = SUMMARY.search(text), DONE.search(text)
    if late or not summary or not done:
        return dict(findings=None, why="out of time" if late else f"no summary, exit status {status}")
    return dict(findings=int(summary[1] or summary[2]), calls=int(done[1]), refused=int(done[2]))


def _excerpt(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[:25] + ["..."] * (len(lines) > 50) + lines[25:][-25:])


def _is_clean(name, finding):
    """What was planted has to be found, and nothing else."""
    found = finding.get("findings")
    return bool(found) if name.startswith("planted") else found == 0


def clean(findings):
    """True where no tool found anything; a machine without the tool says so in the receipt."""
    if not isinstance(findings, dict):
        return True
    return all(_is_clean(name, finding) for name, finding in findings.items() if name != "seconds")
