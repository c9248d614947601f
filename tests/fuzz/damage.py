"""Ways to be wrong: bytes that were damaged, and values that nobody meant."""

from hypothesis import strategies as st

DEEP = 3000

#: Values as TOML writes them; each is of some type that a key does not have, or out of its range.
TOML_VALUES = st.one_of(
    st.sampled_from(
        [
            "[" * DEEP + "]" * DEEP,
            "{a=" * DEEP + "1" + "}" * DEEP,
            "1" + "0" * 400,
            "-1",
            "0",
            "1e400",
            "-1e400",
            "nan",
            "inf",
            "1979-05-27T07:32:00Z",
            "07:32:00",
            "true",
            "[]",
            "{}",
            '""',
            "'''\n'''",
            '"~nobody/x"',
            '"\\u0000"',
            '"' + "x" * 5000 + '"',
            "[[1, [2]], {a = 1}]",
            '["\\uFFFF"]',
            "9223372036854775808",
            "0x" + "f" * 300,
            "1" * 5000,
        ]
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(repr),
    st.text(max_size=20).map(lambda text: '"' + text.replace("\\", "").replace('"', "") + '"'),
    st.text(max_size=20),
)

#: Words of a command line.
WORDS = st.one_of(
    st.sampled_from(
        [
            "",
            "~nobody/x",
            "a\0b",
            "x" * 5000,
            "/nowhere/x",
            "/dev/null",
            "/proc/self/mem",
            ".",
            "..",
            "\udcff",
            "99999999999999999999",
            "-1",
            "nan",
            "inf",
            "1e400",
            "1" * 5000,
            "١٢",
            "0x10",
            "1_000",
            "True",
            "--",
            "-",
            "*",
            "[",
            "**/*",
        ]
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(repr),
    st.text(max_size=12),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content after one to four accidents."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["flip", "cut", "insert", "double", "zero", "overwrite", "none"]))
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 64))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=20))
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == "overwrite":
            data[at : at + length] = draw(st.binary(max_size=64))
    return bytes(data)


#: JSON values of any shape, to stand where another one belongs.
JSON_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=True),
        st.text(max_size=8),
        st.sampled_from(["", "\ud800", "../x", "x" * 3000, "a\0b", 10**400, -1, 0]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def altered(draw: st.DrawFn, value: object) -> object:
    """A JSON value with one to three of its parts replaced, removed or added."""
    for _ in range(draw(st.integers(1, 3))):
        value = _once(draw, value)
    return value


def _once(draw: st.DrawFn, value: object) -> object:
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        changed = dict(value)
        match draw(st.sampled_from(["inside", "inside", "inside", "remove", "rename"])):
            case "remove":
                del changed[key]
            case "rename":
                changed[draw(st.text(max_size=8))] = changed.pop(key)
            case _:
                changed[key] = _once(draw, value[key])
        return changed
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, min(len(value) - 1, 50)))
        return [*value[:at], _once(draw, value[at]), *value[at + draw(st.integers(0, 1)) :]]
    return draw(JSON_VALUES)
