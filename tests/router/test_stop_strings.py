"""Stop strings: cut exactly, whatever the pieces."""

from hypothesis import given
from hypothesis import strategies as st

from services.router.stop_strings import StopStrings

pieces = st.lists(st.text("abc", max_size=4), max_size=12)
stops = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reads a character at a time: the first end of a stop string, the longest one that ends there."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(pieces, stops)
def test_the_result_depends_on_the_text_and_not_on_its_pieces(parts: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = ""
    for part in parts:
        shown += matcher.feed(part)
        if matcher.matched is not None:
            break
    else:
        shown += matcher.flush()
    assert (shown, matcher.matched) == reference("".join(parts), stops)


@given(pieces, stops)
def test_no_beginning_of_a_stop_string_is_shown_too_early(parts: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    final, _ = reference("".join(parts), stops)
    shown = ""
    for part in parts:
        shown += matcher.feed(part)
        assert final.startswith(shown)
        if matcher.matched is not None:
            break


def test_nothing_is_looked_for_before_min_tokens() -> None:
    matcher = StopStrings(["END"])
    assert matcher.feed("END E", armed=False) == "END E"
    assert matcher.feed("ND") == "ND"
    assert matcher.feed(" END!") == " "
    assert matcher.matched == "END"


def test_without_stop_strings_text_passes_through() -> None:
    assert StopStrings([]).feed("abc") == "abc"
