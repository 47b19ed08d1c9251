"""A stand-in for the process that owns the GPU in a benchmark. A file of its own: it starts without PyTorch."""

import os
import time


def dying(connection):
    """System b kills the process, c hangs, d loses the device."""
    while True:
        _, (task, budget, names, broken) = connection.recv()
        values = dict(broken)
        for name in names:
            if name in broken:
                continue
            connection.send(("at", name))
            if name == "b":
                os._exit(3)
            if name == "c":
                time.sleep(60)
            if name == "d":
                connection.send(("lost", "illegal address"))
                os._exit(1)
            values[name] = 1.0
        connection.send(("done", values))
