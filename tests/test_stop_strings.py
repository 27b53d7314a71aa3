"""Stop strings: the same cut however the text arrives, nothing shown that belongs to one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.stop_strings import StopStrings

TEXT = st.text("abX", max_size=24)
STOPS = st.lists(st.text("abX", min_size=1, max_size=5), max_size=4)


def whole(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the text before the stop string that is complete first, the longest one."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=400, deadline=None)
@given(TEXT, STOPS, st.data())
def test_any_cut_gives_the_same(text, stops, data):
    matcher, shown, stopped, rest = StopStrings(stops), "", False, text
    while rest and not stopped:
        count = data.draw(st.integers(1, len(rest)))
        piece, rest = rest[:count], rest[count:]
        out, stopped = matcher.push(piece)
        shown += out
        assert whole(text, stops)[0].startswith(shown)
    if not stopped:
        shown += matcher.flush()
    assert (shown, stopped) == whole(text, stops)


def test_only_what_may_still_match_is_held_back():
    matcher = StopStrings(["<end>", "\n\n"])
    assert matcher.push("a <e") == ("a ", False)
    assert matcher.push("x\n") == ("<ex", False)
    assert matcher.push("b") == ("\nb", False)
    assert matcher.push("c<en") == ("c", False)
    assert matcher.push("d> more") == ("", True)
    assert StopStrings([]).push("x") == ("x", False)
