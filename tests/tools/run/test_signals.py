"""The first signal asks, the second ends; afterwards all is as it was."""

import os
import signal

import pytest
from children import exit_code

from act24.tools.run.signals import Stopped, stop_on_signal

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_asks(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with stop_on_signal() as stop:
        stop.at_once = False
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal == number.name
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_before_there_is_anything_to_save_it_ends_at_once(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Stopped, match=number.name), stop_on_signal():
        signal.raise_signal(number)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def insists():
    with stop_on_signal() as stop:
        stop.at_once = False
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_second_ends():
    assert exit_code(insists) == -signal.SIGTERM
