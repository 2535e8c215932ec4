"""The pattern language: what is read is what is written, and what cannot be read says where and why."""

from string import ascii_uppercase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.design import PatternError, parse, render
from plait.design.merges import MERGE_KINDS
from plait.design.pattern import MAX_SLOTS, Letter, Parallel, letters

names = st.sampled_from([first + rest for first in ascii_uppercase for rest in ("", "a", "zq")]).map(Letter)


def chains(items):
    repeated = st.builds(
        lambda unit, times: tuple(unit) * times, st.lists(items, min_size=1, max_size=3), st.integers(1, 4)
    )
    return st.lists(repeated, min_size=1, max_size=4).map(lambda parts: tuple(x for part in parts for x in part))


def parallels(items):
    branches = st.lists(chains(items), min_size=2, max_size=3).map(tuple)
    return st.builds(Parallel, branches, st.none() | st.sampled_from(sorted(MERGE_KINDS)))


items = st.recursive(names, lambda inner: inner | parallels(inner), max_leaves=8)


@given(chains(items))
@settings(deadline=None, max_examples=150)
def test_parse_reads_what_render_writes(chain):
    text = render(chain)
    assert parse(text) == chain
    assert render(parse(text)) == text
    assert parse(text.replace(" ", "   ")) == chain


@given(st.text(alphabet="AMF()[]|:3 sumx", max_size=12))
@settings(deadline=None, max_examples=500)
def test_any_text_is_read_or_refused(text):
    error, chain = reading(text)
    if error is None:
        assert parse(render(chain)) == chain
        return
    assert 1 <= error.column <= len(text) + 1
    assert f"column {error.column}" in str(error)
    assert "\n" not in str(error)


def reading(text):
    try:
        return None, parse(text)
    except PatternError as error:
        return error, None


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("M3", "MMM"),
        ("(MF)3 AF", "MF MF MF AF"),
        ("((DF)3 AF)2", "DF DF DF AF DF DF DF AF"),
        (" ( M F ) 2 ", "MFMF"),
        ("[M|A]2", "[M|A][M|A]"),
        ("[M2|A]", "[MM|A]"),
        ("[M|A] : sum AF", "[M|A]:sum AF"),
        ("[M|A]:sumAF", "[M|A]:sum AF"),
        ("[M|A]:gated2", "[M|A]:gated [M|A]:gated"),
        ("Aw2", "Aw Aw"),
    ],
)
def test_spellings_of_the_same(text, same):
    assert parse(text) == parse(same)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("MFMFMFAF", "(MF)3 AF"),
        ("AAAA", "A4"),
        ("DFDFDFAFDFDFDFAF", "((DF)3 AF)2"),
        ("[MF|A]:gated F", "[MF|A]:gated F"),
        ("[M[A|D]:sum |W]F", "[M[A|D]:sum|W]F"),
    ],
)
def test_render_is_short(text, short):
    assert render(parse(text)) == short


def test_structure():
    assert parse("M[MF|A]:gated") == (
        Letter("M"),
        Parallel(((Letter("M"), Letter("F")), (Letter("A"),)), "gated"),
    )
    assert [letter.name for letter in letters(parse("M[MF|[A|D]]"))] == ["M", "M", "F", "A", "D"]


@pytest.mark.parametrize(
    ("text", "column", "reason"),
    [
        ("", 1, "expected a letter"),
        ("(MF", 4, "missing ')' for the '(' in column 1"),
        ("[M|A", 5, "missing ']' for the '[' in column 1"),
        ("(M]", 3, "found ']', missing ')' for the '(' in column 1"),
        ("[M|A)", 5, "found ')', missing ']'"),
        ("MF)", 3, "')' without '(' before it"),
        ("M]", 2, "']' without '[' before it"),
        ("M|A", 2, "'|' without '[' before it"),
        ("[M]", 3, "one branch alone is not parallel"),
        ("[M|]", 4, "expected a letter"),
        ("[|A]", 2, "expected a letter"),
        ("()", 2, "expected a letter"),
        ("3M", 1, "a count must follow"),
        ("M0", 2, "a count is at least 1"),
        ("mF", 1, "did you mean 'M'?"),
        ("M-F", 2, "unexpected '-'"),
        ("[M|A]:", 7, "expected the name of a merge"),
        ("[M|A]:Gated", 7, "expected the name of a merge after ':', in lower case"),
        ("M99999999", 1, f"more than {MAX_SLOTS:,} layers"),
        ("(" * 5000, 1, "nested too deeply"),
        ("[" * 65 + "A" + "|F]" * 65, 65, "more than 64 parallel slots inside each other"),
    ],
)
def test_errors_say_where_and_what(text, column, reason):
    with pytest.raises(PatternError) as caught:
        parse(text)
    assert reason in str(caught.value)
    assert caught.value.column == column
    assert f"column {column}:" in str(caught.value)


def test_brackets_side_by_side_are_not_deep():
    assert len(parse("[M|[A|F]]100" + "[M|A]" * 100 + "[" * 64 + "A" + "|F]" * 64)) == 201


@pytest.mark.parametrize("wrong", [None, 3, ["M", "F"]])
def test_not_a_string(wrong):
    with pytest.raises(ValueError, match="expected a string"):
        parse(wrong)


@pytest.mark.parametrize(
    "text", ["(MF)-2", "M1e3", "M2.5", "M*4", "(M)x4", "M1_0", "M\u0663", "M\u00b2", "M^2", "[A|M]+2"]
)
def test_a_count_is_plain_digits(text):
    with pytest.raises(PatternError, match="a count is a whole number from 1 to 10,000"):
        parse(text)


@pytest.mark.parametrize("text", ["M10001", "M" + "9" * 6000, "(((MF)60)60)60", "[M3000|A3000]2", "[M|[A100|M]90]200"])
def test_there_are_only_so_many_layers(text):
    with pytest.raises(PatternError, match="more than 10,000 layers") as caught:
        parse(text)
    assert len(str(caught.value)) < 200
