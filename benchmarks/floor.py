"""The floor: a plain loop that reads the same bytes and writes as many, on the same disk.

    python benchmarks/floor.py SOURCE OUTPUT NBYTES --threads 3 --direct

Reads every safetensors file of SOURCE through its page cache, writes NBYTES to OUTPUT in pieces
of 8 MiB, by as many threads, and waits until they are on the disk as a conversion does
(`--no-sync`: does not). No header, no conversion, nothing shared between reading and writing.
"""

from __future__ import annotations

import argparse
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

PIECE = 8 << 20


def tasks(source: Path, nbytes: int) -> Iterator[tuple[Path | None, int]]:
    """Pieces to read (file, offset) and to write (None, offset), evenly mixed."""
    reads = [
        (f, at)
        for f in sorted(source.glob("*.safetensors"))
        for at in range(0, f.stat().st_size, PIECE)
    ]
    writes: list[tuple[Path | None, int]] = [(None, at) for at in range(0, nbytes, PIECE)]
    mixed = [(i / len(reads), task) for i, task in enumerate(reads)]
    mixed += [(i / len(writes), task) for i, task in enumerate(writes)]  # type: ignore[misc]
    return iter([task for _, task in sorted(mixed, key=lambda pair: pair[0])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("nbytes", type=int)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--no-sync", action="store_true")
    arguments = parser.parse_args()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if arguments.direct else 0)
    output = os.open(arguments.output, flags, 0o666)
    files = {f: os.open(f, os.O_RDONLY) for f in arguments.source.glob("*.safetensors")}
    pieces = tasks(arguments.source, arguments.nbytes)
    taking = threading.Lock()

    def work() -> None:
        buffer, unread = mmap.mmap(-1, PIECE), mmap.mmap(-1, PIECE)
        buffer.write(os.urandom(1 << 20) * (PIECE >> 20))
        while True:
            with taking:
                file, at = next(pieces, (None, -1))
            if at < 0:
                return
            if file is not None:
                os.preadv(files[file], [unread], at)
            else:
                os.pwrite(output, buffer, at)

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
