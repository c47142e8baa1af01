import re
from dataclasses import replace

import pytest
from selenium.webdriver.common.keys import Keys

from atmanrl.evaluation.records import Trajectory
from atmanrl.report import write_page
from atmanrl.report.html import scored_html
from atmanrl.report.scale import Scale, fitted_scale, fixed_scale
from tests.atmanrl import browser
from tests.atmanrl.saliency_runs import HOSTILE, rollout, run

pytestmark = pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))

CARD = "const card = document.getElementById('card'); return card.hidden ? null : card.innerText"
TINT = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
TRANSPARENT = "rgba(0, 0, 0, 0)"


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser.browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture(scope="module")
def runs():
    course = Trajectory((0, 200), (2.0, 0.5), ((0.0, 0.0, 0.0), (0.1, 0.4, -0.3)))
    first = rollout(
        texts=("</script><script>document.title='owned'</script>", " six", "\u202eteen."),
        restored=(0.1, 0.4, -0.3),
        classes=("other", "needed", "filler"),
        trajectory=course,
    )
    first = replace(first, scores={**first.scores, "deletion": (0.0, 1.25, 0.5)})
    before = run(first, rollout("p1", correct=False))
    return before, run(first, rollout("p1", correct=True), label="after")


@pytest.fixture
def page(window, runs, tmp_path):
    write_page(tmp_path / "page.html", *runs, title="A title")
    window.open(tmp_path / "page.html")
    yield window
    assert window.messages() == []


def test_hostile_tokens_run_nothing_and_nothing_is_requested(page):
    assert page.run("return document.title") == "A title"
    assert page.run("return document.scripts.length") == 5
    assert page.run("return performance.getEntriesByType('resource').map(e => e.name)") == []


def test_hovering_a_token_shows_its_numbers(page):
    page.hover(".cot [data-i='1']")
    card = page.run(CARD).split("\n")
    assert card[0] == "six"
    assert dict(zip(card[1::2], card[2::2], strict=True)) == {
        "token id": "1",
        "position": "2 of 3",
        "class": "needed",
        "restored": "0.4",
        "normalised mask": "0.6",
        "deletion": "1.25 nats of loss if hidden",
    }
    page.hover("h1")
    assert page.run(CARD) is None


def test_a_click_keeps_the_card_and_draws_the_course(page):
    page.click(".cot [data-i='2']")
    page.hover("h1")
    assert "⟨U+202E⟩teen." in page.run(CARD)
    assert page.run("return document.querySelectorAll('#card svg path').length") == 2
    assert "enabled, line\n0 → -0.3\nloss, dashes\n2 → 0.5" in page.run(CARD)
    page.press(Keys.ESCAPE)
    assert page.run(CARD) is None


def test_the_keyboard_reaches_every_token(page):
    page.run("document.querySelector('input[value=all]').focus()")
    page.press(Keys.TAB)
    assert page.run("return document.activeElement.className") == "cot"
    assert "1 of 3" in page.run(CARD)
    page.press(Keys.ARROW_RIGHT)
    assert "2 of 3" in page.run(CARD)
    page.press(Keys.END, Keys.ARROW_RIGHT)
    assert "3 of 3" in page.run(CARD)
    page.press(Keys.ENTER)
    assert page.run("return document.querySelectorAll('#card svg').length") == 1


def test_a_resting_pointer_does_not_take_the_card_from_the_keyboard(page):
    page.hover(".cot [data-i='1']")
    page.run("document.querySelector('input[value=all]').focus()")
    page.press(Keys.TAB, Keys.END)
    page.run("scrollBy(0, 1); scrollBy(0, -1)")
    assert "3 of 3" in page.run(CARD)


def test_colours_follow_the_chosen_unit(page):
    token, word, sentence = ".cot .t.u8", ".cot .w", ".cot .s"
    assert page.run(TINT, token) != TRANSPARENT
    assert page.run(TINT, word) == TRANSPARENT
    page.click("input[value=word]")
    assert page.run(TINT, token) == TRANSPARENT
    assert page.run(TINT, word) != TRANSPARENT
    page.click("input[value=sentence]")
    assert page.run(TINT, word) == TRANSPARENT
    assert page.run(TINT, sentence) != TRANSPARENT


SHADES = """return [...document.querySelectorAll('.cot')].map(box =>
  [...box.querySelectorAll('.t, .w, .s')].map(unit => unit.className.split(' ')[1]))"""


def rendered_shades(runs, score, scale):
    """The shades that Python gives the units of every chain of thought, in the document's order."""
    found = []
    for pair in zip(*(each.rollouts for each in runs), strict=True):
        for item in pair:
            html = scored_html(item, item.scores.get(score), scale)
            found.append(re.findall(r'<span class="[tws] (\w+)', html))
    return found


def test_another_score_and_another_scale_recolour_the_page_as_python_would(page, runs):
    legend = "return [...document.querySelectorAll('.scale')].filter(e => !e.hidden).map(e => e.textContent)"
    first = page.run(SHADES)
    assert first == rendered_shades(runs, "restored", fixed_scale(runs, "restored"))
    page.click("input[value=deletion]")
    assert page.run(SHADES) == rendered_shades(runs, "deletion", fixed_scale(runs, "deletion"))
    assert "≥ 3" in page.run(legend)[0]
    page.click("input[value=fitted]")
    assert page.run(SHADES) == rendered_shades(runs, "deletion", fitted_scale(runs, "deletion"))
    (shown,) = page.run(legend)
    assert "≥ 1.2" in shown
    page.click("input[value=restored]")
    assert page.run(SHADES) == rendered_shades(runs, "restored", fitted_scale(runs, "restored"))
    page.click("input[value=fixed]")
    assert page.run(SHADES) == first


def test_the_agreement_shown_is_that_of_the_score_shown(page):
    badges = "return [...document.querySelectorAll('.badge[data-for]')].filter(e => !e.hidden).map(e => e.textContent)"
    assert page.run(badges) == ["rank correlation with deletion 0.500"] * 2
    page.click("input[value=deletion]")
    assert page.run(badges) == []


def test_a_score_without_a_fixed_scale_offers_none(window, tmp_path):
    item = rollout()
    both = replace(item, scores={**item.scores, "attention": (0.02, 0.01, 0.0)})
    write_page(tmp_path / "page.html", run(both))
    window.open(tmp_path / "page.html")
    window.click("input[value=attention]")
    chosen = """return [document.querySelector('input[name=scale]:checked').value,
      document.querySelector('input[value=fixed]').disabled]"""
    assert window.run(chosen) == ["fitted", True]
    assert window.run(SHADES) == rendered_shades([run(both)], "attention", Scale(0.0, 0.02))
    window.click("input[value=restored]")
    assert window.run(chosen) == ["fixed", False]
    assert window.run(SHADES) == rendered_shades([run(both)], "restored", fixed_scale([run(both)], "restored"))
    assert window.messages() == []


def test_every_pair_of_text_and_ground_can_be_read_in_light_and_dark(page):
    contrasts = """
      const channels = colour => colour.match(/[\\d.]+/g).map(Number);
      const mix = (top, below) => [0, 1, 2].map(i => top[i] * (top[3] ?? 1) + below[i] * (1 - (top[3] ?? 1)));
      const luminance = c => c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
      const panel = channels(getComputedStyle(document.querySelector('.example')).backgroundColor);
      const ink = luminance(channels(getComputedStyle(document.querySelector('.cot')).color));
      return [...document.querySelectorAll('.bar i')].map(tile => {
        const ground = luminance(mix(channels(getComputedStyle(tile).backgroundColor), panel));
        return (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05);
      });"""
    for scheme in ("light", "dark"):
        page.emulate(scheme=scheme)
        found = page.run(contrasts)
        assert len(set(found)) > 15
        assert min(found) > 4.5, scheme
    page.emulate()


def test_print_shows_whole_chains_and_no_controls(page):
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert page.run(style, ".cot", "maxHeight") != "none"
    page.emulate("print", "dark")
    assert page.run(style, ".cot", "maxHeight") == "none"
    assert page.run(style, ".controls", "display") == "none"
    assert page.run(style, "body", "backgroundColor") == "rgb(255, 255, 255)"
    assert page.run(style, ".scale .bar", "printColorAdjust") == "exact"
    assert page.run(style, ".badge.good", "color") == "rgb(0, 105, 75)"
    page.emulate()
    opened = "return [...document.querySelectorAll('footer details')].map(part => part.open)"
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run(opened) == [True, True]
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run(opened) == [False, False]


def test_a_hundred_thousand_hostile_tokens_can_be_hovered_and_recoloured(window, tmp_path):
    texts = [HOSTILE[i % len(HOSTILE)] for i in range(100_000)]
    scores = [(i % 21 - 10) / 20 for i in range(len(texts))]
    item = rollout(texts=texts, restored=scores)
    write_page(tmp_path / "long.html", run(replace(item, scores={**item.scores, "deletion": tuple(scores)})))
    window.open(tmp_path / "long.html")
    assert window.run("return document.querySelectorAll('.cot .t').length") == len(texts)
    window.hover(".cot [data-i='50']")
    assert "51 of 100000" in window.run(CARD)
    window.click("input[value=deletion]")
    shade = "return document.querySelector('.cot [data-i=\"99999\"]').className.split(' ')[1]"
    assert window.run(shade) == f"u{fixed_scale([], 'deletion').level(scores[-1])}"
    assert window.run("return [document.scripts.length, document.images.length]") == [2, 0]
    assert window.messages() == []


def test_the_filters_hide_the_other_examples(page):
    shown = "return [...document.querySelectorAll('.example')].map(e => !e.hidden)"
    page.click("input[value=changed]")
    assert page.run(shown) == [False, True]
    page.click("input[value=all]")
    assert page.run(shown) == [True, True]
