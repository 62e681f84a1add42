"""The floor: a plain loop that reads the same bytes and writes as many, on the same disk.

    python benchmarks/floor.py READS OUTPUT NBYTES --threads 3 --direct

READS is a JSON file with the byte ranges to read, `[[file, begin, end], …]`. Reads them, writes
NBYTES to OUTPUT in chunks of 8 MiB, by as many threads, and syncs them to the disk as a conversion
does (not with `--no-sync`). There is no header and no conversion, and reading and writing share
nothing. With `--direct` both are past the page cache, from and to huge pages; without it the system
is asked to fill the page cache as many chunks ahead as there are threads.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

CHUNK = 8 << 20
PAGE = 4096
HUGE_PAGE = 2 << 20


def tasks(reads: Sequence[tuple[str, int, int]], nbytes: int) -> list[tuple[str | None, int, int]]:
    """Return chunks to read (file, begin, end) and to write (None, begin, end), evenly mixed."""
    reading = [(f, at, min(at + CHUNK, e)) for f, b, e in reads for at in range(b, e, CHUNK)]
    writing = [(None, at, at + CHUNK) for at in range(0, nbytes, CHUNK)]
    mixed: list[tuple[float, tuple[str | None, int, int]]] = [
        *((i / len(reading), task) for i, task in enumerate(reading)),
        *((i / len(writing), task) for i, task in enumerate(writing)),
    ]
    return [task for _, task in sorted(mixed, key=lambda pair: pair[0])]


def memory(nbytes: int) -> mmap.mmap:
    """Return memory in huge pages, of which a disk takes more at a time."""
    found = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        found.madvise(mmap.MADV_HUGEPAGE)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reads", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("nbytes", type=int)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--no-sync", action="store_true")
    arguments = parser.parse_args()
    direct = os.O_DIRECT if arguments.direct else 0
    output = os.open(arguments.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | direct, 0o666)
    reads = json.loads(arguments.reads.read_text())
    files = {file: os.open(file, os.O_RDONLY | direct) for file, _, _ in reads}
    chunks = tasks(reads, arguments.nbytes)
    numbers = iter(range(len(chunks)))
    lock = threading.Lock()

    def work() -> None:
        buffer, read_buffer = memory(CHUNK), memoryview(memory(CHUNK + HUGE_PAGE))
        buffer.write(os.urandom(1 << 20) * (CHUNK >> 20))
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            ahead = number + arguments.threads
            for later, first, last in chunks[ahead : ahead + 1]:
                if later is not None and not direct:
                    os.posix_fadvise(files[later], first, last - first, os.POSIX_FADV_WILLNEED)
            file, begin, end = chunks[number]
            if file is not None:
                first, last = begin // PAGE * PAGE, -(-end // PAGE) * PAGE  # direct reads need it
                os.preadv(files[file], [read_buffer[: last - first]], first)
            else:
                os.pwrite(output, buffer, begin)

    threads = [threading.Thread(target=work) for _ in range(arguments.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.ftruncate(output, arguments.nbytes)
    if not arguments.no_sync:
        os.fsync(output)


if __name__ == "__main__":
    main()
