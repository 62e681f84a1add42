"""Threads that run steps, and threads that do what the steps leave to do."""

from __future__ import annotations

import threading

import pytest

from gptoss_stream._utils.thread_pool import run_steps

SECONDS = 30


def test_steps_go_on_while_others_are_finished():
    """One thread takes steps. With two that finish them, it runs the third step meanwhile, and
    finishes that itself."""
    together = threading.Barrier(3)
    threads: list[threading.Thread] = []

    def rest():
        threads.append(threading.current_thread())
        together.wait(SECONDS)

    def step(buffer):
        threads.append(threading.current_thread())
        return rest

    run_steps(iter([step, step, step]), 1, 4096, threading.Event(), 2)
    assert len({*threads}) == 3


def test_a_buffer_is_kept_until_its_step_is_finished():
    marks = []

    def step(number):
        def run(buffer):
            buffer[:] = number % 256
            return lambda: marks.append((number, set(buffer.tolist())))

        return run

    run_steps((step(number) for number in range(500)), 3, 4096, threading.Event(), 2)
    assert sorted(marks) == [(number, {number % 256}) for number in range(500)]


@pytest.mark.parametrize("finishers", [0, 1, 2])
@pytest.mark.parametrize("fails", ["step", "rest"])
def test_the_first_error_ends_all(fails, finishers):
    finished = []

    def rest(number):
        if number == 5 and fails == "rest":
            raise OSError("full")
        finished.append(number)

    def step(number):
        def run(buffer):
            if number == 5 and fails == "step":
                raise OSError("full")
            return lambda: rest(number)

        return run

    stop, threads = threading.Event(), threading.active_count()
    with pytest.raises(OSError, match="full"):
        run_steps((step(number) for number in range(10_000)), 2, 4096, stop, finishers)
    assert stop.is_set()
    assert len(finished) < 9_999
    assert threading.active_count() == threads
