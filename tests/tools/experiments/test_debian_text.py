from pathlib import Path

from act24.tools.experiments.debian_text import documents, pages


def test_pages_are_read_as_text(tmp_path: Path) -> None:
    menu = "<nav>Home <b>Next</b></nav>"
    body = f"<body>{menu}<p>one\n <em>two</em></p><pre>  a = 1\n  b</pre><script>x</script>AT&amp;T"
    (tmp_path / "whole.html").write_text(f"<html><head><title>t</title></head>{body}</body></html>")
    (tmp_path / "open-head.html").write_text(f"<html><head><title>t{body}")
    expected = ["one two", "a = 1", "b", "AT&T"]
    for text in pages(tmp_path):
        assert [line.strip() for line in text.splitlines() if line.strip()] == expected
    assert len(list(pages(tmp_path))) == 2
    assert list(documents(tmp_path)) == []
