"""Ctrl-C is delivered where the engine is consistent, once, and at once where it is insisted on."""

import signal
import threading

import pytest

from edgemoe.interrupts import DeferredInterrupt


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_delivered_at_the_safe_point():
    interrupts, steps = DeferredInterrupt(), []
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        interrupt()
        steps.append("the rest of the layer")
        interrupts.safe_point()
        steps.append("never")
    assert steps == ["the rest of the layer"]
    with interrupts.deferred():  # delivered once
        interrupts.safe_point()


def test_delivered_after_the_block():
    interrupts, steps = DeferredInterrupt(), []
    with pytest.raises(KeyboardInterrupt):
        with interrupts.deferred():
            interrupt()
            steps.append("whole")
        steps.append("never")
    assert steps == ["whole"]


def test_insisted_on():
    interrupts, steps = DeferredInterrupt(), []
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        interrupt()
        steps.append(1)
        interrupt()
        steps.append(2)
    assert steps == [1]
    interrupts.safe_point()


def test_the_handler_of_others_is_called_and_kept():
    interrupts, calls = DeferredInterrupt(), []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append("called"))
    try:
        mine = signal.getsignal(signal.SIGINT)
        with interrupts.deferred():
            interrupt()
            assert calls == []
            interrupts.safe_point()
            assert calls == ["called"]
        assert signal.getsignal(signal.SIGINT) is mine and calls == ["called"]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interrupts.deferred():
            interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_left_alone():
    interrupts, seen = DeferredInterrupt(), []

    def work() -> None:
        with interrupts.deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
