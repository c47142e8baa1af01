import re

import pytest

from atmanrl.config import MaskConfig
from atmanrl.evaluation.examples import Example, read_examples
from atmanrl.evaluation.explain import explain
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
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 8: \d+ tokens, more than the model's context of 512"):
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
