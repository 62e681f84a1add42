"""The model of threads that share Python's lock, and how costs are measured. Nothing is timed."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import contention
import cores
import costs
import numpy as np
import pytest
import tables
from contention import Machine, Work

_random = np.random.default_rng(0)
# 0.1 and 0.7 s for a GB, exponentially distributed.
WORK = Work(
    held=(5e-6 * _random.standard_exponential(20_000)).tolist(),
    free=(35e-6 * _random.standard_exponential(20_000)).tolist(),
    written=1,
    read=0.3,
    traffic=4,
)
needs_compiler = pytest.mark.skipif(
    not (sys.platform == "linux" and shutil.which("cc")),
    reason="lock.c needs Linux and a C compiler",
)


@pytest.mark.parametrize("threads", [1, 2, 4, 8, 16, 32])
def test_waiting_for_the_lock_is_as_long_as_a_formula_says(threads):
    """That of one repairman for some machines: M/M/1 with a finite number of customers."""
    work = (WORK.cpu - WORK.lock) / WORK.lock
    states = [math.perm(threads, waiting) / work**waiting for waiting in range(threads + 1)]
    expected = (1 - 1 / sum(states)) / WORK.lock
    found = contention.rate(WORK, Machine(processors=64, wake=0), threads)
    assert found == pytest.approx(expected, rel=0.03)


def test_a_thread_that_has_to_be_woken_takes_the_lock_later():
    rates = [contention.rate(WORK, Machine(64, wake), 8) for wake in (0, 5e-6, 50e-6)]
    assert rates[0] > 1.2 * rates[1] > 1.2 * 1.2 * rates[2]
    alone = [contention.rate(WORK, Machine(64, wake), 1) for wake in (0, 50e-6)]
    assert alone[0] == alone[1]


def test_waking_takes_a_part_of_two_processors_that_grows_with_the_threads():
    rates = [contention.simulated(WORK, Machine(2, 5e-6), threads) for threads in (2, 3, 8)]
    parts = [1 - found * WORK.cpu / 2 for found in rates]
    assert 0.03 < parts[0] < parts[1] < parts[2]
    assert parts[1] < 0.08  # a thread goes on until it waits, whoever else waits for a processor


@pytest.mark.parametrize(
    ("machine", "threads", "expected"),
    [
        (Machine(2, 0), 8, 2 / 0.8),
        (Machine(0.5, 0), 8, 0.5 / 0.8),
        (Machine(64, 0, write=2), 32, 2),
        (Machine(64, 0, read=0.6), 32, 2),
        (Machine(64, 0, memory=12), 32, 3),
        (Machine(64, 0, write=5), 1, 1 / (0.8 + 1 / 5)),
    ],
    ids=["processors", "quota", "writing", "reading", "memory", "one thread waits for the disk"],
)
def test_what_bounds_the_rate(machine, threads, expected):
    assert contention.rate(WORK, machine, threads) == pytest.approx(expected, rel=0.03)


def test_threads_wait_for_processors_and_for_the_disk():
    assert contention.simulated(WORK, Machine(2, 0), 8) == pytest.approx(2 / 0.8, rel=0.03)
    assert contention.simulated(WORK, Machine(64, 0, write=2), 32) == pytest.approx(2, rel=0.03)


def test_no_more_threads_than_help():
    assert contention.best_threads(WORK, Machine(64, 0, write=1)) == 2
    assert contention.best_threads(WORK, Machine(1, 0)) == 1


@needs_compiler
def test_the_lock_is_recorded_in_the_thread_that_takes_it_most(tmp_path):
    program = """if True:
        import threading, time
        def work(times):
            for _ in range(times):
                time.sleep(0)  # drops the lock
        work(5000)
        for times in (500, 1000, 10):
            thread = threading.Thread(target=work, args=(times,))
            thread.start()
            thread.join()
    """
    found = tmp_path / "lock.bin"
    preload = {"LD_PRELOAD": str(costs.built_lock(tmp_path)), "LOCK_FILE": str(found)}
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **preload})
    times = np.fromfile(found, np.float32).reshape(-1, 2)
    assert 1000 <= len(times) < 1100
    assert (times >= 0).all()
    assert (times > 0).any(axis=0).all()


@needs_compiler
def test_work_of_a_conversion(tmp_path):
    case = costs.Case("hf", "hf")
    lock = costs.built_lock(tmp_path)
    with costs.checkpoints(tmp_path, "tiny", 2, "hf") as inputs:
        before = sorted(tmp_path.rglob("*"))
        work, runs = costs.work(case, inputs, lock, runs=2)
        assert {*tmp_path.rglob("*")} - {*before} == {lock.with_suffix(".bin")}
    assert {*tmp_path.iterdir()} == {lock, lock.with_suffix(".bin")}
    assert work.read == pytest.approx(1, rel=0.02)
    assert work.traffic == pytest.approx(5, rel=0.02)
    assert len(work.held) > 10
    assert 0 < work.lock < work.cpu
    assert len(runs) == 2


def test_results_are_json_and_a_table():
    case = costs.Case("hf", "hf")
    work = replace(WORK, held=[0.0] * len(WORK.held))
    trial = {"case": "hf to hf", "processors": 0.5, "read": None, "write": 0.4, "threads": 3}
    results = {
        "wake": 1e-5,
        "copying": {"1": 10.0},
        "costs": [cores.described(case, work, [costs.Conversion(1, 0.5, 0.3)])],
        "trials": [{**trial, "measured": 0.6, "predicted": 0.62, "cpu": 1.25}],
        "predictions": cores.predicted(case, work, 1e-5),
    }
    text = tables.cores(json.loads(json.dumps(results, allow_nan=False)))
    rows = [" ".join(line.strip("| ").split()) for line in text.splitlines()]
    assert any("| 0.80 s | 0.000 s | 20,000 times |" in row for row in rows)
    assert any("| 0.5 | –, 0.4 GB/s | 0.60 | 0.62" in row for row in rows)
    assert any("| 16 |" in row and row.endswith("| 5.0 | writing") for row in rows)
    assert results["predictions"][0]["best"] == pytest.approx(5, rel=0.05)
