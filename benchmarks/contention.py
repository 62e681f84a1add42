"""How fast threads of one process convert, by a model: the bounds, and a simulation of the lock.

A thread goes through steps. It takes Python's lock for a moment, then works without it, and again;
once it has made a chunk, it writes it. Either kind of work needs a processor. Times are random,
exponentially distributed, with the means that were measured. A thread that finds the lock taken
sleeps, and can take the lock again some time after it was dropped (`wake`); meanwhile a thread
that is awake may take it, as in CPython. The disk writes one chunk after another. Reading is ahead
of the threads and takes none of their time.

Memory bandwidth and reading bound the rate; they do not slow the threads before that.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

from gptoss_stream.writing.executor import CHUNK_NBYTES

CHUNK_GB = CHUNK_NBYTES / 1e9
_STEPS = 40_000


@dataclass(frozen=True)
class Cost:
    """What a conversion takes for each GB that it writes."""

    cpu: float
    """Seconds of a processor, with the lock and without."""
    lock: float
    """Seconds that the lock is held."""
    holds: float
    """How often the lock is taken."""
    read: float
    """GB that are read from the disk."""
    traffic: float
    """GB that are read from and written to memory."""


@dataclass(frozen=True)
class Machine:
    """A machine; speeds in GB/s."""

    processors: float
    """Those that the process may use; less than 2 by a quota of time on 2."""
    wake: float
    """Seconds from when the lock is dropped until a thread that sleeps runs."""
    read: float = math.inf
    write: float = math.inf
    memory: float = math.inf


def bounds(cost: Cost, machine: Machine) -> dict[str, float]:
    """Return the most GB/s that each stage allows, if nothing ever waits for another."""
    return {
        "processors": machine.processors / cost.cpu,
        "lock": 1 / cost.lock if cost.lock else math.inf,
        "memory": machine.memory / cost.traffic,
        "reading": machine.read / cost.read,
        "writing": machine.write,
    }


def rate(cost: Cost, machine: Machine, threads: int) -> float:
    """Return GB/s written by some threads: simulated, and within the bounds."""
    return min(simulated(cost, machine, threads), *bounds(cost, machine).values())


def best_threads(cost: Cost, machine: Machine) -> int:
    """Return the fewest threads that are within 3 % of the fastest."""
    counts = sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, math.ceil(machine.processors) + 1})
    rates = {threads: rate(cost, machine, threads) for threads in counts}
    return min(threads for threads in counts if rates[threads] > 0.97 * max(rates.values()))


def simulated(cost: Cost, machine: Machine, threads: int) -> float:
    """Return GB/s written by some threads, once queues are as long as they stay."""
    generator = random.Random(0)
    holds = max(1, round(cost.holds * CHUNK_GB))
    held = cost.lock * CHUNK_GB / holds
    free = (cost.cpu - cost.lock) * CHUNK_GB / holds
    writing = CHUNK_GB / machine.write
    # When a thread is ready, its turn among those that are, and what it has done of its chunk: one
    # for taking the lock, one for working without it, and so on.
    ready = [(0.0, i, 2 * generator.randrange(holds)) for i in range(threads)]
    heapq.heapify(ready)
    turn, done, now, begin = threads, 0, 0.0, 0.0
    processors = [0.0] * math.ceil(machine.processors)  # when each is free
    lock = disk = 0.0  # when they are free
    while done < 2 * _STEPS:
        now, order, step = heapq.heappop(ready)
        if step == 2 * holds:
            disk = max(disk, now) + writing
            heapq.heappush(ready, (disk, order, 0))
        elif processors[0] > now:
            heapq.heappush(ready, (processors[0], order, step))
        elif step % 2 == 0 and lock > now:
            heapq.heappush(ready, (lock + machine.wake, order, step))
        else:
            end = now + generator.expovariate(1) * (free if step % 2 else held)
            if step % 2 == 0:
                lock = end
            heapq.heapreplace(processors, end)
            heapq.heappush(ready, (end, turn, step + 1))
            turn, done = turn + 1, done + 1
            begin = now if done == _STEPS else begin
    return _STEPS / 2 / holds * CHUNK_GB / (now - begin)
