"""Worker processes that run jobs. A job that hangs or breaks its GPU context costs its process, not the suite."""

import contextlib
import multiprocessing
import os
import time
import traceback
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import wait

JOB_SECONDS = 100  # a first call compiles for a few of them; compute-bound jobs are shorter
PASSED, FAILED, SKIPPED, REFUSED = "passed", "failed", "skipped", "refused"


@dataclass
class Result:
    job: object
    status: str
    text: str = ""
    seconds: float = 0.0


def _text_of(error):
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in reversed(frames))
    return f"{type(error).__name__}: {str(error)[:1500]} ({where})"


def _work(connection, guarded):
    os.environ["OMP_NUM_THREADS"] = "1"  # as many processes as processors
    import jobs
    import oracle
    import scenario
    import torch

    torch.set_num_threads(1)
    arena = None
    if guarded:
        from arena import Arena

        arena = Arena()
    import strobe

    oracle.honest_matmuls()
    scenario.groups()
    connection.send("ready")
    while (job := connection.recv()) is not None:
        begin, status, text, broken = time.monotonic(), PASSED, "", False
        try:
            if job.kind == "scenario":
                scenario.perform(strobe, job, arena)
            else:
                jobs.perform(strobe, job, "cuda", arena)
            torch.cuda.synchronize()
        except scenario.Skip as reason:
            status, text = SKIPPED, str(reason)
        except jobs.Refused as reason:
            status, text = REFUSED, str(reason)
        except Exception as error:
            status, text = FAILED, _text_of(error)
            del error
            try:
                torch.cuda.synchronize()
            except Exception as fault:
                broken, text = True, f"{text}\n    the GPU reports {str(fault).splitlines()[0]}"
        connection.send((status, text, time.monotonic() - begin))
        if broken:
            os._exit(1)


class _Worker:
    def __init__(self, guarded):
        context = multiprocessing.get_context("spawn")
        self.guarded = guarded
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, guarded), daemon=True)
        self.process.start()
        other.close()
        self.ready, self.job, self.group = False, None, deque()
        self.since = time.monotonic()

    def send_next(self, groups):
        if not self.group and groups:
            self.group = deque(groups.popleft())
        self.job = self.group.popleft() if self.group else None
        self.since = time.monotonic()
        self.connection.send(self.job)

    def stop(self):
        if self.ready and self.job is None:  # it was told to end
            self.process.join(10)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _step(worker, groups, report):
    """Takes what the worker says. False where it is lost, and its job with it."""
    try:
        message = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        if worker.job:
            report(Result(worker.job, FAILED, "the process died", time.monotonic() - worker.since))
        elif not worker.ready:
            raise RuntimeError("a worker process cannot start: see its error above") from None
        return False
    worker.ready = True
    if message != "ready":
        status, text, seconds = message
        report(Result(worker.job, status, text, seconds))
    with contextlib.suppress(BrokenPipeError):
        worker.send_next(groups)
    return True


def run(guarded, plain, workers, report, deadline):
    """Runs the groups of both kinds; report(Result) for each job. Returns the jobs for which there was no time."""
    queues = {True: deque(guarded), False: deque(plain)}
    some = [kind for kind in (False, True) if queues[kind]]
    # Plain jobs are few and long: they begin first, and whoever is done helps with the others.
    wanted = [False] * min(6, len(queues[False])) if False in some else []
    wanted += [True] * min(max(1, workers - len(wanted)), len(queues[True]))
    pool = [_Worker(kind) for kind in wanted]
    while pool and time.monotonic() < deadline:
        said = set(wait([w.connection for w in pool], timeout=1.0))
        for worker in list(pool):
            alive = True
            if worker.connection in said:
                alive = _step(worker, queues[worker.guarded], report)
            elif time.monotonic() - worker.since > JOB_SECONDS:
                if worker.job:
                    report(Result(worker.job, FAILED, f"no result after {JOB_SECONDS} s", JOB_SECONDS))
                alive = False
            if alive and not (worker.ready and worker.job is None):
                continue
            pool.remove(worker)
            worker.stop()
            if not alive and worker.group:
                queues[worker.guarded].appendleft(list(worker.group))
            kind = worker.guarded if queues[worker.guarded] else not worker.guarded
            if queues[kind]:
                pool.append(_Worker(kind))
    left = [job for w in pool for job in ([w.job] if w.job else []) + list(w.group)]
    for worker in pool:
        worker.stop()
    return left + [job for queue in queues.values() for group in queue for job in group]
