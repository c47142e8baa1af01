import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atmanrl import estimate_saliency
from atmanrl.config import MaskConfig
from atmanrl.evaluation import recording
from atmanrl.evaluation.examples import AnnouncedAnswer, Example, LiteralAnswer, read_examples, stands_alone
from atmanrl.evaluation.explain import explain
from atmanrl.evaluation.records import Run
from atmanrl.evaluation.summary import compare, summarize
from atmanrl.report import render_page
from tests.atmanrl.tiny import EOT, byte_level_tokenizer, llama

QUICK = MaskConfig(steps=2)


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = byte_level_tokenizer()
    return llama(len(tokenizer)), tokenizer


@pytest.mark.parametrize(
    ("completion", "answer", "split"),
    [
        ("3 + 4 = 7. The final answer is 7.", None, ("3 + 4 = 7.", "The final answer is", "7")),
        ("Not A. The best answer is B.", None, ("Not A.", "The best answer is", "B")),
        ("so 7 #### 7", None, ("so 7", "####", "7")),
        ("it is 3, no, 4", None, ("it is 3, no,", "", "4")),
        ("the owl <script> is blue", "blue", ("the owl <script> is", "", "blue")),
        ("5 or 5 apples", "5", ("5 or", "", "5")),
    ],
)
def test_the_answer_is_found_or_given(model_and_tokenizer, completion, answer, split):
    (item,) = explain(*model_and_tokenizer, [Example("Q?", completion, answer)], mask=QUICK).rollouts
    assert (item.cot.text.strip(), item.marker.text.strip(), item.answer.text.strip()) == split
    assert len(item.restored) == len(item.cot)
    assert item.correct is None


def test_chat_messages_go_through_the_template(model_and_tokenizer):
    prompt = [{"role": "user", "content": "How many?"}]
    (item,) = explain(*model_and_tokenizer, [Example(prompt, f"1 + 1 = 2{EOT}", expected="2")], mask=QUICK).rollouts
    assert item.prompt.text.startswith("<|begin_of_text|><|start_header_id|>user")
    assert item.rest.text == EOT
    assert item.correct is True


def test_a_missing_completion_is_written_by_the_model(model_and_tokenizer):
    examples = [Example("1 +", name="own"), Example("Q?", "so 7 #### 7", name="given")]
    run = explain(*model_and_tokenizer, examples, mask=QUICK)
    assert [item.prompt_id for item in run.rollouts] == ["own", "given"]
    assert len(run.rollouts[0].cot) > 0
    # What was given has no end of turn, and lacks none.
    assert [item.truncated for item in run.rollouts] == [True, False]
    assert run.settings["generation"]["temperature"] == 0.0


def test_what_cannot_be_explained_is_named_by_its_place(model_and_tokenizer):
    missing = Example("Q?", "it is 3", answer="4", place="pairs.jsonl, line 7")
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 7: the completion does not contain the answer '4'"):
        explain(*model_and_tokenizer, [missing], mask=QUICK)
    long = Example("Q?", "1 " * 600, place="pairs.jsonl, line 8")
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 8: .* \d+ tokens, more than the model's context of 512"):
        explain(*model_and_tokenizer, [long], mask=QUICK)
    unfit = Example([{"role": "user", "content": "Q?"}], place="pairs.jsonl, line 9")
    plain = byte_level_tokenizer(chat_template=None)
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 9: the tokenizer has no chat template"):
        explain(model_and_tokenizer[0], plain, [unfit], mask=QUICK)
    with pytest.raises(ValueError, match="no prompts"):
        explain(*model_and_tokenizer, [])


def test_a_completion_without_an_answer_is_shown_without_saliency(model_and_tokenizer):
    (item,) = explain(*model_and_tokenizer, [Example("Q?", "I do not know")], mask=QUICK).rollouts
    assert (item.restored, item.skipped) == (None, "no answer found")


def test_columns_of_ones_own_may_stand_beside(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "source": "web", "answer": "1", "answers": ["1"]}\n', encoding="utf-8")
    (example,) = read_examples(path)
    assert example.answer == "1"


def test_examples_are_read_with_ids_and_places(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "b"}\n\n'
        '{"prompt": [{"role": "user", "content": "c"}], "id": 9, "expected": "1"}\n',
        encoding="utf-8",
    )
    first, second = read_examples(path)
    assert (first.prompt, first.completion, first.name, first.place) == ("a", "b", "1", f"{path}, line 1")
    assert (second.completion, second.expected, second.name, second.place) == (None, "1", "9", f"{path}, line 3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"completion": "x"}', 'line 2: "prompt" must be a text or a list of messages, got None'),
        (b'{"prompt": ""}', 'line 2: "prompt" must be'),
        (b'{"prompt": "a", "completion": 3}', 'line 2: "completion" must be a text, got 3'),
        (b'{"prompt": "a", "answr": "3"}', 'line 2: unknown key "answr"; did you mean "answer"?'),
        (b'{"prompt": "a", "answer": ""}', 'line 2: "answer" is empty'),
        (b'{"prompt": [{"role": "user"}]}', 'line 2: a message of "prompt" needs the texts "role" and "content"'),
        (b'{"prompt": ["a"]}', 'line 2: a message of "prompt" needs'),
        (b'{"prompt": "a", "id": 1}', "line 2: the id '1' is that of .*line 1"),
        (b'{"prompt"', "line 2: not JSON"),
        (b"\xff", "line 2: not UTF-8"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prompt": "a", "id": 1}\n' + line + b'\n{"prompt": "c"}\n')
    first, bad, last = read_examples(path)
    assert (first.prompt, first.fault, last.prompt, last.fault) == ("a", None, "c", None)
    assert re.search(message, f"{bad.place}: {bad.fault}")


def answer_of(text):
    found = AnnouncedAnswer.of(text).parse(text)
    return None if found is None else found.value


ANNOUNCED = st.sampled_from(["The final answer is {}.", "\\boxed{{{}}}", "The answer is {}.", "#### {}"])
CHAINS = st.lists(st.sampled_from(["In 1999 there were 3.", "Take 7.", "So 4 + 5 = 9.", "It may be A."]), max_size=4)


@given(CHAINS, ANNOUNCED, st.sampled_from(["Paris", "x+1", "20 or 30", "A or B", "about half"]))
def test_no_number_of_the_chain_stands_in_for_an_announced_answer_that_cannot_be_read(chain, phrase, value):
    assert answer_of(" ".join([*chain, phrase.format(value)])) is None


@given(CHAINS, ANNOUNCED, st.sampled_from(["18", "-7", "1,234", "B", "(C)"]))
def test_a_number_or_a_letter_behind_any_phrase_is_the_answer(chain, phrase, value):
    assert answer_of(" ".join([*chain, phrase.format(value)])) == value.strip("()")


def literal(text, answer):
    found = LiteralAnswer(kind="words", markers=(), literal=answer).parse(text)
    return None if found is None else (found.marker_span[0], *found.value_span)


@pytest.mark.parametrize(
    ("answer", "inside"),
    [
        (
            "5",
            [
                "15",
                "51",
                "0.5",
                ".5",
                "5.0",
                "1,5",
                "5,000",
                "-5",
                "\u22125",
                "5th",
                "x5",
                "5/6",
                "1/5",
                "5:30",
                "10^5",
                "5²",
            ],
        ),
        ("5", ["5-year", "5\u202f000", "1e5", "a_5"]),
        ("A", ["ACID", "BA", "A-level", "A's", "A1"]),
        ("blue", ["bluebird", "blueé", "blue\u0301"]),
        ("x+1", ["x+10", "2x+1"]),
    ],
)
def test_a_given_answer_is_not_found_inside_another_number_or_word(answer, inside):
    for word in inside:
        assert literal(f"It is {word} .", answer) is None
        assert literal(f"It is {word}", answer) is None
        # The one that stands alone is found, before or behind.
        assert literal(f"{answer} or {word} .", answer) == (0, 0, len(answer))


@pytest.mark.parametrize(
    "text", ["5", "(5)", "x = 5.", "$5", "5%", "5, 6", "7 - 5", "5 apples", "**5**", "5\n", "=5;", "答案是5个"]
)
def test_punctuation_units_and_scripts_without_spaces_leave_a_number_alone(text):
    start = text.index("5")
    assert stands_alone(text, start, start + 1)


@given(CHAINS, st.sampled_from(["Paris", "5", "A"]), st.lists(st.sampled_from(["No, {}.", "x{}", "{}"]), max_size=3))
def test_the_announced_occurrence_of_a_given_answer_counts_wherever_it_stands(chain, answer, behind):
    head = " ".join(chain)
    announced = f"{head} The final answer is \\boxed{{{answer}}}."
    start = announced.rindex(answer)
    text = " ".join([announced, *(each.format(answer) for each in behind)])
    assert literal(text, answer) == (len(head) + 1, start, start + len(answer))


def test_a_bad_example_is_recorded_with_its_place_and_the_others_are_explained(model_and_tokenizer, tmp_path):
    half = "\ud800"
    rows = [
        Example("Q?", "so 7 #### 7", name="good"),
        Example("Q?", "it is 3", answer="4", name="absent", place="f, line 2"),
        Example("Q?", "it is 34", answer="4", name="inside", place="f, line 3"),
        Example("Q?", "1 " * 600, name="long", place="f, line 4"),
        Example("Q " * 600, name="no room", place="f, line 5"),
        Example(f"Q{half}", "#### 7", name="half", place="f, line 6"),
        Example("", name="read", place="f, line 7", fault="not JSON"),
        Example("Q?", "so 8 #### 8", expected="Paris", name="last"),
    ]
    run = explain(*model_and_tokenizer, rows, mask=QUICK)
    assert [item.prompt_id for item in run.rollouts] == [row.name for row in rows]
    bad = run.rollouts[1:-1]
    assert all(item.unusable and item.skipped.startswith(f"f, line {i}: ") for i, item in enumerate(bad, start=2))
    assert all(item.restored for item in (run.rollouts[0], run.rollouts[-1]))
    # What is no number is another answer than a number, and no error once all is computed.
    assert run.rollouts[-1].correct is False
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == run
    summary = summarize(run)
    assert (summary.rollouts, summary["cot_tokens"].runs[0].value) == (2, len(run.rollouts[0].cot))
    assert render_page(run).count('<article class="example"') == len(rows)
    assert compare(run, run).rollouts == 2


def test_a_long_prompt_leaves_the_others_their_room(model_and_tokenizer):
    long, short = Example("Q? " * 150, name="long"), Example("Q?", name="short")
    together = explain(*model_and_tokenizer, [long, short], estimator="random")
    alone = explain(*model_and_tokenizer, [short], estimator="random")
    assert together.rollouts[1].cot.ids == alone.rollouts[0].cot.ids
    assert len(alone.rollouts[0].cot) > 100


def test_the_arguments_of_the_chat_template_reach_the_prompt(model_and_tokenizer):
    model, _ = model_and_tokenizer
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if thinking %} think{% endif %}"
    tokenizer = byte_level_tokenizer(chat_template=template)
    example = Example([{"role": "user", "content": "How many?"}], "so 7 #### 7")
    for thinking, ending in ((True, " think"), (False, "?")):
        run = explain(model, tokenizer, [example], mask=QUICK, chat_template_kwargs={"thinking": thinking})
        assert run.rollouts[0].prompt.text.endswith(ending)
        assert run.settings["chat_template_kwargs"] == {"thinking": thinking}


def test_what_was_scored_before_an_error_is_handed_out(model_and_tokenizer, monkeypatch):
    calls = []

    def failing(model, rollouts, *arguments, **options):
        calls.append(len(rollouts))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return estimate_saliency(model, rollouts, *arguments, **options)

    monkeypatch.setattr(recording, "estimate_saliency", failing)
    model, tokenizer = model_and_tokenizer
    examples = [Example("Q?", f"so {i} #### {i}", name=str(i)) for i in range(70)]
    kept = []
    with pytest.raises(torch.OutOfMemoryError):
        explain(model, tokenizer, examples, estimator="gradient", rescue=kept.append)
    (run,) = kept
    scored = [bool(item.scores) for item in run.rollouts]
    assert scored == [True] * 64 + [False] * 6
    assert {item.skipped for item in run.rollouts[64:]} == {"not scored: OutOfMemoryError ended the run"}
