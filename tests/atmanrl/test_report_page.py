import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest

from atmanrl.report import Plot, render_page, show, write_page
from atmanrl.report.html import sentences, words
from atmanrl.report.scale import Scale, fitted_scale, fixed_scale, meaning_of, scale_for
from atmanrl.report.text import visible
from tests.atmanrl.saliency_runs import HOSTILE, rollout, run


class Page(HTMLParser):
    """What a browser would make of the page, as far as these tests ask."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.tokens = []
        self.data = []
        self.scripts = 0
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.scripts += tag == "script"
        self._open.append((tag, attributes))
        if "data-i" in attributes:
            self.tokens.append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script" and attributes.get("type") == "application/json":
            self.data.append(json.loads(data))
        elif "data-i" in attributes:
            self.tokens[-1] += data

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


@pytest.fixture
def hostile_page():
    item = rollout("</title><script>", texts=HOSTILE, restored=[0.1] * len(HOSTILE), predicted=HOSTILE[0])
    before = run(item, label="<b>before</b>")
    return Page(render_page(before, run(item, label='"after"'), title="<i>title</i>", note="</header>"))


def test_hostile_tokens_stay_text(hostile_page):
    assert hostile_page.scripts == 3, "the page's own script and one block of data per completion"
    assert not hostile_page.attributes("onerror")
    assert not hostile_page.attributes("onmouseover")
    assert "img" not in [tag for tag, _ in hostile_page.tags]
    shown = [visible(text).lstrip() if text.strip() else visible(text) for text in HOSTILE]
    assert hostile_page.tokens == shown * 2


def test_the_data_of_hostile_tokens_parses_and_counts_every_token(hostile_page):
    assert [len(data["ids"]) for data in hostile_page.data] == [len(HOSTILE)] * 2
    assert hostile_page.data[0]["scores"]["restored"] == [0.1] * len(HOSTILE)


def test_the_page_asks_for_nothing_from_outside(tmp_path):
    picture = tmp_path / "plot.svg"
    picture.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", encoding="utf-8")
    text = render_page(run(rollout()), plots=[Plot(picture, "a plot", picture)])
    page = Page(text)
    references = [
        value for name in ("src", "srcset", "href", "action", "data", "poster") for value in page.attributes(name)
    ]
    assert references
    assert all(value.startswith("data:image/svg+xml;base64,") for value in references)
    assert "default-src 'none'" in page.attributes("content")[0]
    assert not re.search(r"@import|url\(|<link|<base|<iframe|fetch\(|XMLHttpRequest|import\(", text)


def test_no_invisible_character_reaches_the_page(hostile_page):
    text = "".join(hostile_page.tokens)
    assert not re.search("[\x00-\x09\x0b-\x1f\u200b\u202a-\u202e\u2066-\u2069\ue000]", text)
    assert "⟨U+202E⟩gnp.exe" in text


def test_both_runs_stand_side_by_side_with_their_headline_numbers():
    classes = ["other", "needed", "filler"]
    before = run(*(rollout(f"p{i}", classes=classes, correct=i > 0) for i in range(4)))
    after = run(*(rollout(f"p{i}", ("a", " 6"), (0.1, 0.5), classes[:2]) for i in range(4)), label="after")
    text = render_page(before, after)
    sides = re.findall(r'<div class="side">.*?<b>(before|after)</b>', text, re.DOTALL)
    assert sides == ["before", "after"] * 4
    assert re.search(r"accuracy \(%\).*?75\.0.*?100\.0.*?\+25\.0", text, re.DOTALL)
    assert re.search(r"filler per CoT \(tokens\).*?1\.00.*?0\.00.*?−1\.00", text, re.DOTALL)
    assert text.count('data-changed="yes"') == 1


def test_a_token_takes_the_shade_of_its_score():
    text = render_page(run(rollout(texts=("low", " mid", " high"), restored=(-0.49, 0.01, 0.6))))
    shades = dict(re.findall(r'<span class="t (\w+) c-other" data-i="(\d)"', text))
    assert shades == {"d10": "0", "z": "1", "u10": "2"}


def test_a_completion_without_saliency_says_why():
    text = render_page(run(rollout(restored=None, skipped="no answer found")))
    assert "no saliency: no answer found" in text
    assert not re.search(r'class="t [ud]\d+', text)


def test_only_so_many_completions_are_shown_and_the_page_says_so():
    text = render_page(run(*(rollout(f"p{i}") for i in range(9))), shown=4)
    assert text.count('<article class="example"') == 4
    assert "The first 4 of 9 are shown" in text


def test_a_plot_that_is_no_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"notes\.txt: not a picture"):
        render_page(run(rollout()), plots=[Plot(tmp_path / "notes.txt", "caption")])


def test_a_hundred_thousand_tokens_make_a_page(tmp_path):
    texts = [HOSTILE[i % len(HOSTILE)] for i in range(100_000)]
    write_page(tmp_path / "long.html", run(rollout(texts=texts, restored=[0.2] * len(texts))))
    text = (tmp_path / "long.html").read_text(encoding="utf-8")
    assert text.count("data-i=") == 100_000
    blocks = re.findall('<div class="block">(.*?)</div>', text, re.DOTALL)
    assert 50 <= len(blocks) <= 100
    assert max(block.count("data-i=") for block in blocks) < 2000
    assert len(text) < 20e6


def test_the_scale_is_centred_on_weight_decay_and_reaches_as_far_as_the_steps():
    scale = scale_for([run(rollout())], "restored")
    assert scale.centre == pytest.approx(0.00995, abs=1e-5)
    assert scale.reach == pytest.approx(0.5)
    assert [scale.level(value) for value in (-1, -0.49, 0.00995, 0.06, 0.26, 0.51, 1)] == [-10, -10, 0, 1, 5, 10, 10]


def scored(name, *values):
    item = replace(rollout(), scores={name: values})
    return replace(run(item), score=name)


@pytest.mark.parametrize("name", ["restored", "sparse-mask", "deletion", "leave-one-out", "gradient"])
def test_scores_whose_size_has_a_meaning_are_coloured_alike_on_every_page(name):
    faint, strong = scored(name, -0.02, 0.005, 0.01), scored(name, -2.0, 0.5, 1.0)
    assert scale_for([faint], name) == scale_for([strong], name) == fixed_scale([faint], name)
    assert fitted_scale([faint], name) != fitted_scale([strong], name)


def test_nats_are_coloured_by_the_share_of_the_probability_that_they_take_away():
    scale = fixed_scale([run()], "deletion")
    assert [scale.level(nats) for nats in (-50.0, -0.7, -0.04, 0.0, 0.3, 0.7, 1.6, 3.0, 50.0)] == [
        *(-10, -5, 0, 0, 3, 5, 8, 10, 10)
    ]
    assert scale.ticks == pytest.approx((-2.996, -0.693, 0, 0.693, 2.996), abs=1e-3)
    assert [scale.level(tick) for tick in scale.ticks[1:4]] == [-5, 0, 5]


def test_attention_has_no_fixed_scale_and_reaches_its_largest_value():
    attention = scored("attention", 0.02, 0.005, 0.001)
    assert fixed_scale([attention], "attention") is None
    assert scale_for([attention], "attention") == Scale(0.0, 0.02)


SCORES = ("restored", "sparse-mask", "leave-one-out", "attention", "random")


@pytest.mark.parametrize("score", SCORES)
def test_the_page_explains_the_score_it_shows_and_no_other(score):
    page = " ".join(unescape(render_page(scored(score, 0.2, 0.5, 0.1))).split())
    texts = {name: " ".join(meaning_of(name).text.split()) for name in SCORES}
    assert len(set(texts.values())) == len(SCORES)
    assert [name for name, text in texts.items() if text in page] == [score]


def test_a_scale_needs_a_reach():
    with pytest.raises(ValueError, match="reach must be positive, got 0"):
        Scale(0.0, 0.0)


def test_words_and_sentences_cover_all_tokens_in_order():
    texts = [
        "Tom",
        " has",
        " 3",
        ".",
        "5",
        " app",
        "les",
        ".",
        " \n",
        "So",
        " what",
        "?!",
        " \u201cEh",
        ".\u201d",
        " Ok",
    ]
    joined = ["".join(texts[i] for i in unit) for unit in words(texts)]
    assert joined == ["Tom", " has", " 3.5", " apples. \n", "So", " what?!", " \u201cEh.\u201d", " Ok"]
    joined = ["".join(texts[i] for i in unit) for unit in sentences(texts)]
    assert joined == ["Tom has 3.5 apples. \n", "So what?!", " \u201cEh.\u201d", " Ok"]
    assert words([]) == sentences([]) == []


@pytest.mark.parametrize("texts", [HOSTILE, ["", "", ""], [" ", "\n"], ["一。", "二"]])
def test_units_of_odd_tokens_still_partition_them(texts):
    for units in (words(texts), sentences(texts)):
        assert [i for unit in units for i in unit] == list(range(len(texts)))


def test_a_notebook_shows_the_page_in_a_frame_that_holds_it_whole():
    item = run(rollout(texts=HOSTILE, restored=[0.1] * len(HOSTILE)))
    frame = Page(show(item, height=300)._repr_html_())
    assert [tag for tag, _ in frame.tags] == ["iframe"]
    assert frame.attributes("srcdoc") == [render_page(item)]
    assert frame.attributes("sandbox") == ["allow-scripts"]
