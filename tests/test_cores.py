"""The model of threads that share Python's lock, and how costs are measured. Nothing is timed."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import contention
import cores
import costs
import pytest
from contention import Cost, Machine

COST = Cost(cpu=0.8, lock=0.1, holds=20_000, read=0.3, traffic=4)
needs_compiler = pytest.mark.skipif(
    not (sys.platform == "linux" and shutil.which("cc")),
    reason="lock.c needs Linux and a C compiler",
)


@pytest.mark.parametrize("threads", [1, 2, 4, 8, 16, 32])
def test_waiting_for_the_lock_is_as_long_as_a_formula_says(threads):
    """That of one repairman for some machines: M/M/1 with a finite number of customers."""
    work = (COST.cpu - COST.lock) / COST.lock
    states = [math.perm(threads, waiting) / work**waiting for waiting in range(threads + 1)]
    expected = (1 - 1 / sum(states)) / COST.lock
    found = contention.rate(COST, Machine(processors=64, wake=0), threads)
    assert found == pytest.approx(expected, rel=0.03)


def test_a_thread_that_has_to_be_woken_takes_the_lock_later():
    rates = [contention.rate(COST, Machine(64, wake), 8) for wake in (0, 5e-6, 50e-6)]
    assert rates[0] > 1.2 * rates[1] > 1.2 * 1.2 * rates[2]
    alone = [contention.rate(COST, Machine(64, wake), 1) for wake in (0, 50e-6)]
    assert alone[0] == alone[1]


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
    assert contention.rate(COST, machine, threads) == pytest.approx(expected, rel=0.03)


def test_threads_wait_for_processors_and_for_the_disk():
    assert contention.simulated(COST, Machine(2, 0), 8) == pytest.approx(2 / 0.8, rel=0.03)
    assert contention.simulated(COST, Machine(64, 0, write=2), 32) == pytest.approx(2, rel=0.03)


def test_no_more_threads_than_help():
    assert contention.best_threads(COST, Machine(64, 0, write=1)) == 2
    assert contention.best_threads(COST, Machine(1, 0)) == 1


@needs_compiler
def test_the_lock_is_counted_in_threads_but_the_first(tmp_path):
    program = """if True:
        import threading, time
        def work(times):
            for _ in range(times):
                time.sleep(0)  # drops the lock
        work(5000)
        thread = threading.Thread(target=work, args=(1000,))
        thread.start()
        thread.join()
    """
    found = tmp_path / "lock.txt"
    preload = {"LD_PRELOAD": str(costs.built_lock(tmp_path)), "LOCK_FILE": str(found)}
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **preload})
    held, times = found.read_text().split()
    assert 1000 <= int(times) < 1100
    assert 0 < float(held) < 1


@needs_compiler
def test_costs_of_a_conversion(tmp_path):
    case = costs.Case("hf", "hf")
    with (
        costs.checkpoint(tmp_path, "tiny", 1, "hf") as tiny,
        costs.checkpoint(tmp_path, "tiny", 2, "hf") as source,
    ):
        found = costs.costs(case, source, tiny, costs.built_lock(tmp_path), runs=1)
        assert {file.name for file in tmp_path.iterdir()} == {tiny.name, source.name, "lock.so"}
    assert found["cost"]["read"] == pytest.approx(1, rel=0.02)
    assert found["cost"]["traffic"] == pytest.approx(5, rel=0.02)
    assert found["runs"][0]["holds"] > 0


def test_results_are_json_and_a_table():
    cost = {**vars(COST), "lock": 0.0}
    found = {"case": "hf to hf", "user": 0.5, "system": 0.3, "cost": cost}
    trial = {"case": "hf to hf", "processors": 0.5, "read": None, "write": 0.4, "threads": 3}
    results = {
        "wake": 1e-5,
        "copying": {"1": 10.0},
        "costs": [found],
        "trials": [{**trial, "measured": 0.6, "predicted": 0.62}],
        "predictions": cores.predicted(found, 1e-5),
    }
    text = cores.tables(json.loads(json.dumps(results, allow_nan=False)))
    assert "0.5     –   0.4       3     0.60      0.62" in text
    assert "processors 20.0, memory 25.0, reading 23.3, writing 5.0" in text
    assert results["predictions"][0]["best"] == pytest.approx(5, rel=0.05)
