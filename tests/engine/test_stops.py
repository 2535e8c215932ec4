"""Stop strings, wherever tokens happen to be cut."""

from hypothesis import given
from hypothesis import strategies as st

from plait.engine.text import StoppedText


class Pieces:
    """A text stream whose tokens are the places of its pieces; the last piece comes at the end."""

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, token):
        return self.pieces[token]

    def finish(self):
        return self.pieces[-1]


def run(pieces, stops):
    text, given_out = StoppedText(Pieces(pieces), tuple(stops)), []
    for token in range(len(pieces) - 1):
        given_out.append(text.push(token))
        if text.ended:
            break
    return [*given_out, text.finish()]


@given(
    st.lists(st.text("ab", max_size=3), min_size=1, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_stop_string_completed_first(pieces, stops):
    whole = "".join(pieces)
    found = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    assert "".join(run(pieces, stops)) == (whole[: min(found)[1]] if found else whole)


def test_text_is_held_back_only_while_it_may_become_a_stop_string():
    assert run(["ab", "<", "b", "<e", "nd>x", ""], ["<end>"]) == ["ab", "", "<b", "", "", ""]
    assert run(["ab", "<e", "nd"], ["<end>"]) == ["ab", "", "<end"]
    assert run(["ab", "c"], []) == ["ab", "c"]
