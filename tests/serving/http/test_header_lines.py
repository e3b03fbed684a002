"""Lines of headers hold what was put into them."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from serving.http.header_lines import Header, header_line, headers_in

NAMES = st.from_regex(rb"[a-z0-9-]{1,20}", fullmatch=True)
VALUES = st.binary(max_size=20).filter(lambda value: b"\r" not in value and b"\n" not in value)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=5))
def test_headers_come_back_as_they_went_in(headers: Sequence[Header]) -> None:
    assert headers_in(b"".join(map(header_line, headers))) == headers
