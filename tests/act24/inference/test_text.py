"""Tokens into text: what is shown adds up to what one decoding of everything gives, up to the stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act24.inference.text import RowText

SAMPLE = "naïve café, 漢字 and 🙂🙃 – ok"


def bytewise(ids) -> str:
    return bytes(ids).decode(errors="replace")


@given(st.text(min_size=1, max_size=30))
def test_pieces_add_up_and_are_whole_characters(text):
    row = RowText(bytewise, ())
    pieces = [row.add(byte) for byte in text.encode()]
    assert "".join([*pieces, row.finish()]) == text == row.text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_a_row_ends_before_its_first_stop_string(text, stops):
    row, shown = RowText(bytewise, stops), ""
    for byte in text.encode():
        shown += row.add(byte)
        assert text.startswith(shown)
        if row.stopped:
            break
    shown += row.finish()
    met = [text[:end] for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not met:
        assert (shown, row.stopped) == (text, "")
    else:
        first = min(met[0].rfind(stop) for stop in stops if met[0].endswith(stop))
        assert shown == row.text == text[:first]
        assert row.stopped in stops


def test_nothing_waits_that_no_stop_string_begins_with():
    row = RowText(bytewise, ("END",))
    assert [row.add(byte) for byte in b"xEyENEND"] == ["x", "", "Ey", "", "", "EN", "", ""]
    assert row.stopped == "END"


def test_bytes_that_are_no_character_come_at_the_end():
    row = RowText(bytewise, ())
    assert [row.add(byte) for byte in SAMPLE.encode()[:4]] == ["n", "a", "", "ï"]
    assert row.add(0xF0) == ""
    assert row.finish() == "\ufffd"


@pytest.mark.parametrize("stop", ["café", "🙂", "漢字 and"])
def test_stop_strings_of_several_bytes(stop):
    row, shown = RowText(bytewise, (stop,)), ""
    for byte in SAMPLE.encode():
        shown += row.add(byte)
        if row.stopped:
            break
    assert shown == SAMPLE[: SAMPLE.index(stop)]
