"""A process that owns the GPU. A kernel that hangs, faults or kills it costs one figure and not the run: the parent
notes who was at work, starts another process and goes on without that system."""

import multiprocessing
import os

SILENCE = 150  # seconds without a word after which a process hangs; the longest honest wait is a peer's compiler


class Died(Exception):
    """The process is gone. `at`: whose turn it was, None before the first."""

    def __init__(self, why, at):
        super().__init__(why)
        self.at = at


def answer(connection, handle):
    """Sends back what handle(name, *arguments) returns for each request, or why there is nothing."""
    import bench.gpu_run as gpu_run

    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:  # the parent has closed its end
            return
        try:
            result = handle(name, *arguments)
        except gpu_run.Lost as lost:
            connection.send(("lost", str(lost)))
            os._exit(1)  # destructors would wait for the device
        except Exception as error:
            connection.send(("error", gpu_run.reason(error)))
        else:
            connection.send(("done", result))


def serve(connection):
    import bench.gpu_run as gpu_run

    def handle(name, *arguments):
        if name == "run":
            return gpu_run.run(*arguments, at=lambda system: connection.send(("at", system)))
        return gpu_run.HANDLERS[name]()

    answer(connection, handle)


class Worker:
    def __init__(self, silence=SILENCE, target=serve):
        self.silence, self.target, self.process = silence, target, None

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=self.target, args=(theirs,), daemon=False)
        self.process.start()
        theirs.close()

    def stop(self, patience=0):
        """Ends the process, by itself if it does that within `patience` seconds."""
        if self.process:
            self.connection.close()
            self.process.join(patience)
            self.process.kill()
            self.process.join()
            self.process = None

    def ask(self, name, *arguments):
        """The answer. Died if the process is lost, RuntimeError for an error that it survived."""
        if self.process is None:
            self.start()
        at = None
        try:
            self.connection.send((name, arguments))
            while True:
                if not self.connection.poll(self.silence):
                    raise Died(f"no answer within {self.silence} s", at)
                kind, value = self.connection.recv()
                if kind == "at":
                    at = value
                elif kind == "done":
                    return value
                elif kind == "lost":
                    raise Died(value, at)
                else:
                    raise RuntimeError(value)
        except (EOFError, ConnectionError) as error:
            self.process.join(5)
            raise Died(f"the process ended with status {self.process.exitcode}", at) from error
        except KeyboardInterrupt:
            self.stop()
            raise

    def run(self, task, budget, names):
        """{system: figure or why not}, with as many processes as it takes."""
        broken = {}
        while True:
            try:
                return self.ask("run", task, budget, names, broken)
            except Died as died:
                self.stop()
                if died.at not in names or died.at in broken:
                    return {**dict.fromkeys(names[:1], str(died)), **broken}
                broken[died.at] = str(died)
            except RuntimeError as error:
                return {**dict.fromkeys(names[:1], str(error)), **broken}
