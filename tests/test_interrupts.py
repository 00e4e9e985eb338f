"""Ctrl-C at any time: what was called has happened or it has not, and the optimizer can go on.

Real signals, thousands of them at random times, in a process of their own.
"""

from __future__ import annotations

import _thread
import os
import random
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager

import pytest
import torch
from torch.nn import Parameter

import ranger_cuda
from helpers import bits
from ranger_cuda import Lookahead, RAdam, Ranger

STEPS = 6  # three Lookahead cycles, with steps before and after rectification begins
K = 2
INTERRUPTS = 2000  # of each test, or as many as there are in
SECONDS = 3


class Alarm:
    """Raises KeyboardInterrupt once, some seconds from when it is set, in the main thread."""

    def __init__(self):
        self.is_set = False

    def raises(self, signum, frame):
        if self.is_set:
            self.is_set = False
            raise KeyboardInterrupt


class Timer(Alarm):
    """By the system's timer: between any two instructions of Python."""

    @contextmanager
    def ready(self):
        before = signal.signal(signal.SIGALRM, self.raises)
        try:
            yield
        finally:
            self.unset()
            signal.signal(signal.SIGALRM, before)

    def set(self, seconds):
        self.is_set = True
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def unset(self):
        self.is_set = False
        signal.setitimer(signal.ITIMER_REAL, 0)


class OtherThread(Alarm):
    """By a thread, which runs when the main one lets go of Python's lock: within kernels, too."""

    @contextmanager
    def ready(self):
        before = signal.signal(signal.SIGINT, self.raises)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)  # a step is shorter than the turns that threads take
        self.due, self.over = None, False
        thread = threading.Thread(target=self._wait)
        thread.start()
        try:
            yield
        finally:
            self.unset()
            self.over = True
            thread.join()
            sys.setswitchinterval(interval)
            signal.signal(signal.SIGINT, before)

    def _wait(self):
        by_kill = False
        while not self.over:
            due = self.due
            if due is None or time.perf_counter() < due:
                time.sleep(0)
                continue
            self.due = None
            by_kill = not by_kill
            if by_kill:
                os.kill(os.getpid(), signal.SIGINT)
            else:
                _thread.interrupt_main()

    def set(self, seconds):
        self.is_set = True
        self.due = time.perf_counter() + seconds

    def unset(self):
        self.is_set = False
        self.due = None


def interrupted(alarm, seconds, call):
    """Call it, to be interrupted after so many seconds: None if it was not, else the files of the
    functions that were under way, outermost first."""
    try:
        alarm.set(seconds)
        call()
        alarm.unset()
    except KeyboardInterrupt as error:
        return [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return None


def is_torn_by_torch(optimizer, files):
    """Whether the step of an inner optimizer of torch's was under way, which may stop halfway."""
    if not isinstance(getattr(optimizer, "optimizer", None), torch.optim.AdamW):
        return False
    ours = [i for i, file in enumerate(files) if file == ranger_cuda.lookahead.__file__]
    return any("torch/optim/" in file for file in files[ours[0] :]) if ours else False


BUILDS = {
    "native": lambda params: Ranger(params, lr=0.1, k=K),
    "reference": lambda params: Ranger(params, lr=0.1, k=K, backend="reference"),
    "Lookahead(RAdam)": lambda params: Lookahead(RAdam(params, lr=0.1), k=K),
    "Lookahead(RAdam), reference": lambda params: Lookahead(
        RAdam(params, lr=0.1, backend="reference"), k=K, backend="reference"
    ),
    "Lookahead(AdamW)": lambda params: Lookahead(torch.optim.AdamW(params, lr=0.1), k=K),
}
MODELS = {  # "both": one is the CPU kernels', one the reference's
    "float32": [torch.float32, torch.float32],
    "both": [torch.float32, torch.bfloat16, torch.float32],
}
CASES = [(build, model) for build in BUILDS for model in MODELS]


def start(case):
    """A new optimizer with its parameters, always the same."""
    build, model = case
    generator = torch.Generator().manual_seed(0)
    params = []
    for dtype in MODELS[model]:
        param = Parameter(torch.randn(7, generator=generator).to(dtype))
        param.grad = torch.randn(7, generator=generator).to(dtype)
        params.append(param)
    return BUILDS[build](params), params


def snapshot(optimizer, params):
    """All parameters and state, to be compared with ``==``."""
    found = [("param", i, bits(param).tolist()) for i, param in enumerate(params)]
    for i, param in enumerate(params):
        state = optimizer.state.get(param, {})
        found += [(name, i, bits(value).tolist()) for name, value in sorted(state.items())]
    return found


def time_of(call):
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def check_steps(target, case, make_alarm, count):
    optimizer, params = start(case)
    track = [snapshot(optimizer, params)]
    for _ in range(STEPS):
        optimizer.step()
        track.append(snapshot(optimizer, params))
    length = time_of(optimizer.step)
    assert track[0] != track[1]

    chance = random.Random(0)
    alarm = make_alarm()
    interrupts = at = 0
    until = time.monotonic() + SECONDS
    optimizer, params = start(case)
    with alarm.ready():
        while interrupts < count and time.monotonic() < until:
            within = interrupted(alarm, chance.uniform(1e-6, 1.1 * length), optimizer.step)
            interrupts += within is not None
            if within is not None and is_torn_by_torch(optimizer, within):
                with optimizer.slow_weights():  # only the lock is ours
                    pass
                optimizer, params, at = *start(case), 0
                continue
            found = snapshot(optimizer, params)
            if within is None or found != track[at]:
                at += 1
                assert found == track[at], f"torn in step {at}, interrupt {interrupts}"
            if at == STEPS:
                optimizer, params, at = *start(case), 0


def check_slow_weights(target, case, make_alarm, count):
    optimizer, params = start(case)
    for _ in range(STEPS - 1):
        optimizer.step()
    fast = snapshot(optimizer, params)
    with optimizer.slow_weights():
        slow = snapshot(optimizer, params)
    assert slow[: len(params)] != fast[: len(params)]
    entered = [False]

    def evaluate():
        entered[0] = False
        with optimizer.slow_weights():
            entered[0] = True

    length = time_of(evaluate)
    chance = random.Random(0)
    alarm = make_alarm()
    interrupts = 0
    until = time.monotonic() + SECONDS
    with alarm.ready():
        while interrupts < count and time.monotonic() < until:
            within = interrupted(alarm, chance.uniform(1e-6, 1.1 * length), evaluate)
            assert entered[0] or within is not None
            interrupts += within is not None
            assert snapshot(optimizer, params) == fast, f"not back after interrupt {interrupts}"
            with optimizer.slow_weights():
                assert snapshot(optimizer, params) == slow, f"after interrupt {interrupts}"
        optimizer.step()


ALARMS = [Timer, OtherThread]


def name_of(case):
    return ", ".join(case)


@pytest.mark.parametrize("alarm", ALARMS, ids=lambda alarm: alarm.__name__)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_an_interrupted_step_has_been_made_or_has_not(processes, case, alarm):
    processes["cpu-2-threads"].run(check_steps, case, alarm, INTERRUPTS)


@pytest.mark.parametrize("alarm", ALARMS, ids=lambda alarm: alarm.__name__)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_an_interrupt_leaves_the_fast_weights_in_place(processes, case, alarm):
    """Whether it strikes on entering slow_weights(), within or on leaving."""
    processes["cpu-2-threads"].run(check_slow_weights, case, alarm, INTERRUPTS)
