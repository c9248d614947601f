"""The first signal asks, a second Ctrl-C ends; afterwards all is as it was."""

import itertools
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


def insists(signals, launched):
    if launched:
        os.environ["TORCHELASTIC_RUN_ID"] = "none"
    with stop_on_signal() as stop:
        stop.at_once = False
        for number in signals:
            os.kill(os.getpid(), number)
        assert stop.signal == signals[0].name
        os._exit(0)  # what was to be saved is saved


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "below torchrun"])
def test_a_stop_that_arrives_twice_is_one_and_only_ctrl_c_insists(launched):
    """The second one ended the process, and with it the work: torchrun passes on what a scheduler sends."""
    for first, second in itertools.product(SIGNALS, SIGNALS):
        ends = second == signal.SIGINT and not launched
        code = exit_code(insists, (first, second, second), launched)
        assert code == (-second if ends else 0), (first, second)
