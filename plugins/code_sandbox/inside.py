"""What runs in the sandbox: it limits itself, runs the answer, then its tests, and reports which of them passed.

Its source is handed to an interpreter of its own (`-I -c`), because the user that it runs as may not be allowed to
read this file. Standard input holds the job as JSON; standard output takes the report, one line a test.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import types

MOST_BYTES = 16 << 20  # of a file, the report included


def main() -> None:
    """Do the job in a child, and end when it ends: as the first of a process namespace, this ends all others."""
    job = json.load(sys.stdin)
    report = os.dup(1)  # forks of the answer have it, what they execute has not
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    limit(resource.RLIMIT_CPU, math.ceil(job["seconds"]))
    limit(resource.RLIMIT_AS, job["memory_mb"] << 20)
    limit(resource.RLIMIT_FSIZE, MOST_BYTES)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NPROC, job["processes"] + (2 if job["own_count"] else running()))
    os.write(report, f"{job['token']} began\n".encode())
    child = os.fork()
    if child == 0:
        try:
            run(job, report)
        finally:
            os._exit(0)
    # Whoever started this ends it in time, unless it has itself been killed by then.
    signal.signal(signal.SIGALRM, end)
    signal.alarm(math.ceil(job["seconds"]) + 1)
    os.waitpid(child, 0)


def end(*_: object) -> None:
    """End this process and its group, also where it is the first of a namespace and cannot kill itself."""
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


def limit(what: int, most: int) -> None:
    """Neither this process nor any that it starts can raise it again."""
    _, hard = resource.getrlimit(what)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def running() -> int:
    """The threads that this user already has on the machine: the limit counts them as well."""
    threads = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{process}").st_uid == os.getuid():
                threads += len(os.listdir(f"/proc/{process}/task"))
        except OSError:  # it has ended
            continue
    return threads


def run(job: dict, report: int) -> None:
    """Run the answer as a module that is imported, then each test with a copy of its names."""
    module = sys.modules["answer"] = types.ModuleType("answer")
    try:
        exec(compile(job["code"], "answer.py", "exec"), vars(module))
    except BaseException:
        return
    for number, test in enumerate(job["tests"]):
        try:
            exec(compile(test, f"test {number}", "exec"), dict(vars(module)))
        except BaseException:
            continue
        os.write(report, f"{job['token']} {number}\n".encode())


if __name__ == "__main__":
    main()
