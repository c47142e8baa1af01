from dataclasses import replace

import pytest

from atmanrl.records import Trajectory
from atmanrl.report import write_page
from tests.atmanrl import browser
from tests.atmanrl.saliency_runs import rollout, run

pytestmark = pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))

ENTER, ESCAPE, RIGHT, END, TAB = "\ue007", "\ue00c", "\ue014", "\ue010", "\ue004"
CARD = "const card = document.getElementById('card'); return card.hidden ? null : card.innerText"
TINT = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
TRANSPARENT = "rgba(0, 0, 0, 0)"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    course = Trajectory((0, 200), (2.0, 0.5), ((0.0, 0.0, 0.0), (0.1, 0.4, -0.3)))
    first = rollout(
        texts=("</script><script>document.title='owned'</script>", " six", "\u202eteen."),
        restored=(0.1, 0.4, -0.3),
        classes=("other", "needed", "filler"),
        trajectory=course,
    )
    first = replace(first, scores={**first.scores, "deletion": (0.0, 1.25, 0.5)})
    before = run(first, rollout("p1", correct=False))
    after = run(first, rollout("p1", correct=True), label="after")
    write_page(folder / "page.html", before, after, title="A title")
    with browser.browser(folder / "profile") as page:
        page.open(folder / "page.html")
        yield page


@pytest.fixture(autouse=True)
def no_script_error(page):
    yield
    assert page.messages() == []
    page.press(ESCAPE)
    page.run("document.activeElement.blur()")


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
        "deletion": "1.25",
    }
    page.hover("h1")
    assert page.run(CARD) is None


def test_a_click_keeps_the_card_and_draws_the_course(page):
    page.click(".cot [data-i='2']")
    page.hover("h1")
    assert "⟨U+202E⟩teen." in page.run(CARD)
    assert page.run("return document.querySelectorAll('#card svg path').length") == 2
    page.press(ESCAPE)
    assert page.run(CARD) is None


def test_the_keyboard_reaches_every_token(page):
    page.run("document.querySelector('input[value=all]').focus()")
    page.press(TAB)
    assert page.run("return document.activeElement.className") == "cot"
    assert "1 of 3" in page.run(CARD)
    page.press(RIGHT)
    assert "2 of 3" in page.run(CARD)
    page.press(END, RIGHT)
    assert "3 of 3" in page.run(CARD)
    page.press(ENTER)
    assert page.run("return document.querySelectorAll('#card svg').length") == 1


def test_a_resting_pointer_does_not_take_the_card_from_the_keyboard(page):
    page.hover(".cot [data-i='1']")
    page.run("document.querySelector('input[value=all]').focus()")
    page.press(TAB, END)
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
    page.click("input[value=token]")


def test_the_filters_hide_the_other_examples(page):
    shown = "return [...document.querySelectorAll('.example')].map(e => !e.hidden)"
    page.click("input[value=changed]")
    assert page.run(shown) == [False, True]
    page.click("input[value=all]")
    assert page.run(shown) == [True, True]
