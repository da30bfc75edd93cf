"""Run a program on so many cores to its end: python stopwatch.py CORES PROGRAM ARGUMENT...

The last line of stdout has the seconds that it took and the peak memory in kilobytes of the largest
of its processes.

Linux counts the memory of whoever calls exec into the peak of the program that it becomes. A
program that is started by a process as small as this one is not reported with the size of the
benchmark. """
import os
import sys
import time


def main():
    """Return the exit status of the program."""
    cores = int(sys.argv[1])
    program = sys.argv[2:]
    usable = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, usable[:cores])
    begun = time.perf_counter()
    pid = os.posix_spawn(program[0], program, os.environ)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - begun
    print(seconds, usage.ru_maxrss)
    return os.waitstatus_to_exitcode(status) & 255


if __name__ == "__main__":
    sys.exit(main())
