"""How fast threads of one process convert, by a model: the bounds, and a simulation of the lock.

Each thread does what one thread was measured to do, from a place of its own on: it holds Python's
lock for some time, works without it for some time, and so on, on a processor. Whenever it has made
a chunk, it writes it. A thread that finds the lock taken sleeps. One that drops the lock wakes the
first that sleeps, which takes `wake` seconds of its own; the other one then tries again, `wake`
after the lock was dropped. Meanwhile a thread that is awake may take it, as in CPython. The disk
writes one chunk after another. Reading is ahead of the threads and takes none of their time.

Memory bandwidth and reading bound the rate; they do not slow the threads before that.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from gptoss_stream.writing.executor import CHUNK_NBYTES

CHUNK_GB = CHUNK_NBYTES / 1e9
_STEPS = 100_000


@dataclass(frozen=True)
class Work:
    """What a conversion takes."""

    held: Sequence[float]
    """Seconds for which one thread held the lock, one time after another."""
    free: Sequence[float]
    """Seconds of work without it after each of these times."""
    written: float
    """GB that the thread wrote."""
    read: float
    """GB that are read from the disk for each GB written."""
    traffic: float
    """GB that are read from and written to memory for each GB written."""

    @property
    def lock(self) -> float:
        """Seconds that the lock is held for each GB written."""
        return sum(self.held) / self.written

    @property
    def cpu(self) -> float:
        """Seconds of a processor for each GB written."""
        return self.lock + sum(self.free) / self.written


@dataclass(frozen=True)
class Machine:
    """A machine; speeds in GB/s."""

    processors: float
    """Those that the process may use; less than 2 by a quota of time on 2."""
    wake: float
    """Seconds that waking a thread takes, and until it runs."""
    read: float = math.inf
    write: float = math.inf
    memory: float = math.inf


def bounds(work: Work, machine: Machine) -> dict[str, float]:
    """Return the most GB/s that each stage allows, if nothing ever waits for another."""
    return {
        "processors": machine.processors / work.cpu,
        "lock": 1 / work.lock if work.lock else math.inf,
        "memory": machine.memory / work.traffic,
        "reading": machine.read / work.read,
        "writing": machine.write,
    }


def rate(work: Work, machine: Machine, threads: int) -> float:
    """Return GB/s written by some threads: simulated, and within the bounds."""
    return min(simulated(work, machine, threads), *bounds(work, machine).values())


def best_threads(work: Work, machine: Machine) -> int:
    """Return the fewest threads that are within 3 % of the fastest."""
    counts = sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, math.ceil(machine.processors) + 1})
    rates = {threads: rate(work, machine, threads) for threads in counts}
    return min(threads for threads in counts if rates[threads] > 0.97 * max(rates.values()))


def simulated(work: Work, machine: Machine, threads: int) -> float:
    """Return GB/s written by some threads, once queues are as long as they stay."""
    count = len(work.held)
    times = [time for pair in zip(work.held, work.free, strict=True) for time in pair]
    chunk = max(1, round(count * CHUNK_GB / work.written)) * 2
    places = [i * count // threads * 2 for i in range(threads)]
    # When a thread is ready, its turn among those that are, the thread. One that has just made a
    # step comes first: it goes on, on its processor.
    ready = [(0.0, i, i) for i in range(threads)]
    sleeping: deque[int] = deque()
    waking = [0.0] * threads  # what each has spent on waking another
    processors = [0.0] * math.ceil(machine.processors)  # when each is free
    disk = 0.0  # when it is free
    holder = -1
    turn, done, worked, begin, now = threads, 0, 0.0, 0.0, 0.0
    while done < 2 * _STEPS:
        now, order, thread = heapq.heappop(ready)
        place = places[thread]
        if thread == holder:
            holder = -1
            if sleeping:
                heapq.heappush(ready, (now + machine.wake, turn, sleeping.popleft()))
                waking[thread], turn = machine.wake, turn + 1
        if processors[0] > now:
            heapq.heappush(ready, (processors[0], order, thread))
            continue
        if place % 2 == 0 and holder >= 0:
            sleeping.append(thread)
            continue
        end = now + times[place] + waking[thread]
        heapq.heapreplace(processors, end)
        if place % 2 == 0:
            holder = thread
        elif place % chunk == chunk - 1 and machine.write < math.inf:
            disk = end = max(disk, end) + CHUNK_GB / machine.write
        heapq.heappush(ready, (end, 0, thread))
        places[thread], waking[thread] = (place + 1) % len(times), 0.0
        worked += times[place]
        turn, done = turn + 1, done + 1
        if done == _STEPS:
            begin, worked = now, 0.0
    return worked / work.cpu / (now - begin)
