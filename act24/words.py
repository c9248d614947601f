"""Numbers and what they count, as English has them."""

from __future__ import annotations


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number and what there is of it.

    Args:
        one: what stands behind 1.
        several: what stands behind every other number; None: `one` and an s.

    >>> counted(1, "file"), counted(2000, "file"), counted(1, "row fits", "rows fit")
    ('1 file', '2,000 files', '1 row fits')
    """
    return f"{number:,} {one if number == 1 else several or one + 's'}"
