"""Processes of the demo and Ctrl-C."""

import os
import signal
import threading
import time

import pytest

from dilated_attention_pytorch.cli.demo import _ctrl_c_held_back


def test_ctrl_c_waits_until_the_processes_have_started():
    # A second thread, as queues and progress bars have: the system may hand it the signal.
    done, finished = threading.Event(), False
    thread = threading.Thread(target=done.wait)
    thread.start()
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt), _ctrl_c_held_back():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            finished = True
    finally:
        done.set()
        thread.join()
    assert finished
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_processes_started_meanwhile_do_not_hear_ctrl_c():
    with _ctrl_c_held_back():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())
