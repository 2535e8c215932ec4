import io
import re
from html.parser import HTMLParser

from plait.pages.plots import smooth
from plait.study.report import ends, render, write_report
from plait.study.table import table

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_the_page_is_one_whole_file(fake_results, tmp_path):
    path = write_report(tmp_path, fake_results)
    page = read(path.read_text())
    assert page.count["svg"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_nothing_is_fetched(fake_results):
    text = render(fake_results)
    for name, value in read(text).attributes:
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#"), (name, value)
    assert not re.search(r"@import|url\((?!#)|<script|<link", text)


def test_ids_are_unique_and_references_lead_somewhere(fake_results):
    text = render(fake_results)
    ids = [value for name, value in read(text).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'(?:href="|url\()#([^")]+)', text):
        assert reference in ids


def test_colours_follow_the_reader(fake_results):
    text = render(fake_results)
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "prefers-color-scheme: dark" in text
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+):", text))
    assert "var(--series-0)" in pictures
    assert "var(--ink)" in pictures
    assert not re.search(r"(?:fill|stroke): #", pictures)


def test_numbers_and_samples_are_there(fake_results):
    text = render(fake_results)
    for word in ("1,000,001", "2.100", "6,400", "A Processor", "plait demo", "torch 2.13.0", "([D|A]F)4", "64 KiB"):
        assert word in text
    assert "sample &lt;b&gt;parallel&lt;/b&gt; &amp; more" in text


def test_a_narrow_page_hides_no_number_behind_a_scroll_bar(fake_results):
    text = render(fake_results)
    headings = re.findall(r"<th>([^<]*)</th>", text)[1:]
    labels = re.findall(r'<td data-label="([^"]*)"', text)
    assert labels == headings * len(fake_results["models"])  # as cards, where there is no row of headings
    assert "overflow-x" not in text


def test_numbers_stand_beside_their_machine(fake_results):
    assert render(fake_results).count("A Processor (AVX2), 2 cores") == 2


def test_equal_results_give_an_equal_page(fake_results):
    assert render(fake_results) == render(fake_results)


def test_the_table_has_a_row_a_model(fake_results):
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(fake_results))
    shown = console.export_text()
    for word in ("([D|A]F)4", "transformer", "2.100", "at 8,192", "A Processor"):
        assert word in shown


def test_the_ends_of_contexts_are_numbers_not_words():
    assert ends({"8192": 1, "256": 1, "1024": 1}) == ["256", "8192"]
    assert ends({"64": 1}) == ["64"]


def test_smoothing_takes_means():
    assert smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    line = [float(x) for x in range(120)]
    assert smooth(line)[2:-2] == line[2:-2]
    assert smooth(line)[0] == 1.0
