"""One line for whatever reading raises, and no more than that is caught."""

import json
import tomllib

import pytest

from act24.errors import Act24Error, reading


class Narrower(Act24Error):
    pass


def deep_json():
    json.loads("[" * 100_000)


def deep_toml():
    tomllib.loads("a = " + "[" * 100_000)


def huge():
    raise MemoryError


def beyond():
    float(10**400)


def not_utf8():
    b"\xff".decode()


def cut():
    raise EOFError


def missing():
    open("no such file", encoding="utf-8").close()


REASONS = {
    deep_json: "nested too deep",
    deep_toml: "nested too deep",
    huge: "out of memory",
    beyond: "int too large to convert to float",
    not_utf8: "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    cut: "EOFError",
    missing: "No such file or directory",
}


@pytest.mark.parametrize("read", REASONS, ids=lambda read: read.__name__)
def test_what_reading_raises_is_one_line(read):
    with pytest.raises(Narrower) as caught, reading("cannot read x", error=Narrower):
        read()
    assert str(caught.value) == f"cannot read x: {REASONS[read]}"


def test_a_bug_stays_a_bug_and_our_own_error_as_it_is():
    with pytest.raises(KeyError), reading("cannot read x"):
        raise KeyError("bug")
    with pytest.raises(Act24Error, match=r"^said already$"), reading("cannot read x"):
        raise Act24Error("said already")
    with (
        pytest.raises(Act24Error, match=r"^cannot read x: bad page$"),
        reading("cannot read x", RuntimeError),
    ):
        raise RuntimeError("bad\npage")
