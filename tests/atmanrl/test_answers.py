"""Splitting completions: exact on the generated tokens, whatever the tokenizer does at the borders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from atmanrl.answers import GSM8K_ANSWER, LEDGER_ANSWER, MMLU_ANSWER, rollout_from_completion, split_completion
from atmanrl.rollout import Rollout
from atmanrl.tasks.ledger import build_tokenizer
from tests.atmanrl.tiny import END_OF_TEXT, EOT, byte_level_tokenizer
from tests.random_cases import random_cases

FLEXIBLE = GSM8K_ANSWER.with_mode("flexible")


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def byte_tokens() -> PreTrainedTokenizerFast:
    """Every byte a token: characters beyond ASCII are always split."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def words_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose tokens are exactly ``words``, to put any token on any border."""
    encoded = [ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)[0][0] for word in words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(encoded)}, unk_token=encoded[0]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def parts(words: list[str], answer_format=GSM8K_ANSWER) -> tuple[list[str], list[str], list[str]]:
    """Chain, marker and answer of the completion made of these tokens, as tokens."""
    split = split_completion(range(len(words)), words_tokenizer(*words), answer_format, end_ids=())
    return tuple([words[i] for i in ids] for ids in (split.cot_ids, split.marker_ids, split.answer_ids))


@pytest.mark.parametrize(
    ("cot", "marker", "answer", "rest"),
    [
        pytest.param(["so", " 9."], [" The", " final answer is", " "], ["18"], ["."], id="clean borders"),
        pytest.param(["so"], [" The", " final", " answer", " is"], [" 18"], ["."], id="space and value in a token"),
        pytest.param(["so"], [".\n\nThe final", " answer is "], ["18"], [], id="chain and marker in a token"),
        pytest.param(["so"], ["The final answer is"], [" 18."], [" Bye"], id="value and full stop in a token"),
        pytest.param(["so"], [], [". The final answer is 18."], [], id="all in a token"),
        pytest.param(["so"], ["The final answer is $\\boxed"], ["{1", "8", "}$"][:2], ["}$"], id="LaTeX brace"),
        pytest.param(["so"], ["The final answer is $"], ["1", ",", "234", ".50"], ["."], id="value of four tokens"),
        pytest.param([], ["The final answer is "], ["18"], [], id="no chain"),
        pytest.param(["so"], ["The final answer is 9 * 2", " = "], ["18"], [" dollars"], id="equation"),
        pytest.param(
            ["The final answer is 5", ". No. "], ["the final answer is "], ["6"], [" eggs"], id="last announcement"
        ),
    ],
)
def test_straddling_tokens_go_to_the_later_part(cot, marker, answer, rest):
    assert parts([*cot, *marker, *answer, *rest]) == (cot, marker, answer)


def test_a_number_without_marker_splits_into_chain_and_answer_in_flexible_mode():
    words = ["she", " has ", "18", " eggs"]
    assert parts(words, FLEXIBLE) == (["she", " has "], [], ["18"])
    assert parts(words) == (words, [], [])


def test_characters_split_over_tokens_do_not_shift_the_borders(byte_tokens):
    text = "中文 🙂 café. The final answer is \u221218€ 🙂"
    ids = byte_tokens.encode(text)
    split = split_completion(ids, byte_tokens, GSM8K_ANSWER, end_ids=())
    assert byte_tokens.decode(split.cot_ids) == "中文 🙂 café. "
    assert byte_tokens.decode(split.marker_ids) == "The final answer is "
    assert byte_tokens.decode(split.answer_ids) == "\u221218"


def test_a_token_that_ends_the_chain_and_begins_the_signs_bytes_is_answer():
    # The minus sign's three bytes lie in two tokens, the first of which also holds the space before it.
    minus = "\u2212".encode()
    head, tail = (b" " + minus[:1], minus[1:] + b"5")
    alphabet = dict(zip(range(256), _byte_characters(), strict=True))
    vocabulary = ["The final answer is", "".join(alphabet[b] for b in head), "".join(alphabet[b] for b in tail)]
    vocabulary[0] = "".join(alphabet[b] for b in vocabulary[0].encode())
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    backend.decoder = decoders.ByteLevel()
    split = split_completion([0, 1, 2], PreTrainedTokenizerFast(tokenizer_object=backend), GSM8K_ANSWER, end_ids=())
    assert split.answer.value == "\u22125"
    assert (split.marker_ids, split.answer_ids) == ((0,), (1, 2))


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte, by GPT-2's rule."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


@random_cases(150)
@given(st.data())
def test_borders_agree_with_byte_offsets_for_any_tokens(bpe, data):
    pieces = st.sampled_from(
        ["The final answer is 18.", " final answer is $", "\\boxed{7}", "中", "🙂 ", "\n", "-5", " é"]
    )
    ids = data.draw(st.lists(st.integers(6, len(bpe) - 1), max_size=8))
    for piece in data.draw(st.lists(pieces, min_size=1, max_size=5)):
        ids += bpe.encode(piece, add_special_tokens=False)
    split = split_completion(ids, bpe, FLEXIBLE)
    if split.answer is None:
        assert split.cot_ids == tuple(ids)
        return
    # Independent of decoding prefixes: each token's own bytes, added up.
    characters = {c: b for b, c in enumerate(_byte_characters())}
    lengths = [len(bytes(characters[c] for c in token)) for token in bpe.convert_ids_to_tokens(ids)]
    raw = bytes(characters[c] for token in bpe.convert_ids_to_tokens(ids) for c in token)
    offsets = _character_offsets(raw, split.text)
    marker, value, end = (offsets[p] for p in (split.answer.marker_span[0], *split.answer.value_span))
    starts = [sum(lengths[:i]) for i in range(len(ids) + 1)]
    first = [sum(1 for s in starts[1:] if s <= position) for position in (marker, value)]
    last = next(i for i, s in enumerate(starts) if s >= end)
    assert (len(split.cot_ids), len(split.marker_ids)) == (first[0], first[1] - first[0])
    assert split.answer_ids == tuple(ids[first[1] : last])


def _character_offsets(raw: bytes, text: str) -> list[int]:
    """Byte offset of every character of ``text``, the lossy decoding of ``raw``, and of its end."""
    offsets, position = [], 0
    for character in text:
        offsets.append(position)
        size = len(character.encode())
        if raw[position : position + size] == character.encode():
            position += size
        else:
            # A replacement character stands for the longest broken prefix of a sequence: try lengths in turn.
            position += next(n for n in (3, 2, 1) if raw[position : position + n].decode(errors="replace") == "\ufffd")
    return [*offsets, position]


@pytest.mark.parametrize("end", [EOT, END_OF_TEXT])
def test_every_end_of_turn_token_ends_the_completion(bpe, end):
    ids = bpe.encode(f"so. The final answer is 18{end} The final answer is 5", add_special_tokens=False)
    split = split_completion(ids, bpe, GSM8K_ANSWER)
    assert split.answer.value == "18"
    assert split.finished
    assert bpe.decode(split.cot_ids + split.marker_ids + split.answer_ids) == "so. The final answer is 18"


def test_a_completion_without_answer_is_all_chain_of_thought(bpe):
    ids = bpe.encode("I do not know" + EOT, add_special_tokens=False)
    split = split_completion(ids, bpe, GSM8K_ANSWER)
    assert (split.cot_ids, split.marker_ids, split.answer_ids, split.answer) == (tuple(ids[:-1]), (), (), None)
    cut_off = split_completion(ids[:-1], bpe, GSM8K_ANSWER)
    assert not cut_off.finished
    assert rollout_from_completion([1], ids, bpe, GSM8K_ANSWER) == Rollout((1,), tuple(ids[:-1]), ())


def test_an_empty_completion_gives_an_empty_rollout(bpe):
    eot = bpe.convert_tokens_to_ids(EOT)
    for completion in ([], [eot], [eot, eot]):
        assert rollout_from_completion([1], completion, bpe, GSM8K_ANSWER) == Rollout((1,), (), ())


def test_ledgers_answer_is_every_word_behind_its_marker():
    tokenizer = build_tokenizer()
    ids = tokenizer.encode("c 0 . b 6 <ans> c 0 b 6 <eos> <pad>", add_special_tokens=False)
    rollout = rollout_from_completion([1, 2], ids, tokenizer, LEDGER_ANSWER)
    assert rollout == Rollout((1, 2), tuple(ids[:5]), tuple(ids[6:10]), (ids[5],))


def test_target_correct_puts_the_gold_tokens_behind_the_same_marker(bpe):
    ids = bpe.encode("so. The final answer is 17." + EOT, add_special_tokens=False)
    predicted = rollout_from_completion([1], ids, bpe, GSM8K_ANSWER)
    correct = rollout_from_completion([1], ids, bpe, GSM8K_ANSWER, target="correct", gold="1234")
    assert (correct.cot_ids, correct.marker_ids) == (predicted.cot_ids, predicted.marker_ids)
    assert bpe.decode(correct.completion_ids) == "so. The final answer is 1234"


def test_target_correct_keeps_a_space_that_stood_in_the_value_token():
    words = ["so", " The final answer is", " 17.", " 18"]
    tokenizer = words_tokenizer(*words)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rollout = rollout_from_completion([1], [0, 1, 2], tokenizer, GSM8K_ANSWER, target="correct", gold="18", end_ids=())
    assert (rollout.cot_ids, rollout.marker_ids, rollout.answer_ids) == ((0,), (1,), (3,))


def test_target_correct_keeps_the_tokens_of_a_right_answer(bpe):
    ids = bpe.encode("The final answer is $1,234.00", add_special_tokens=False)
    correct = rollout_from_completion([1], ids, bpe, GSM8K_ANSWER, target="correct", gold="1234")
    assert bpe.decode(correct.answer_ids) == "1,234.00"


def test_target_correct_has_no_place_for_the_gold_answer_without_a_marker(bpe):
    ids = bpe.encode("no idea", add_special_tokens=False)
    rollout = rollout_from_completion([1], ids, bpe, GSM8K_ANSWER, target="correct", gold="18")
    assert (rollout.cot_ids, rollout.answer_ids) == (tuple(ids), ())


def test_target_correct_without_gold_is_an_error(bpe):
    with pytest.raises(ValueError, match="needs the gold answer"):
        rollout_from_completion([1], [7], bpe, GSM8K_ANSWER, target="correct")


def test_sentencepiece_style_tokens_split_and_take_the_gold_answer():
    pieces = ["<unk>", "▁so", "▁The", "▁final", "▁answer", "▁is", "▁", "1", "7", "8", "."]
    backend = Tokenizer(models.Unigram([(piece, -1.0 - i / 100) for i, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    ids = tokenizer.encode("so The final answer is 17.", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids)[-4:] == ["▁", "1", "7", "."]
    rollout = rollout_from_completion([1], ids, tokenizer, GSM8K_ANSWER, target="correct", gold="18", end_ids=())
    assert tokenizer.convert_ids_to_tokens(rollout.marker_ids) == ["▁The", "▁final", "▁answer", "▁is", "▁"]
    assert tokenizer.convert_ids_to_tokens(rollout.answer_ids) == ["1", "8"]


def test_a_choice_letter_is_the_answer_token(bpe):
    ids = bpe.encode("Mitosis. The best answer is (C).", add_special_tokens=False)
    split = split_completion(ids, bpe, MMLU_ANSWER)
    assert bpe.decode(split.answer_ids).strip(" ().") == "C"
    assert split.text[slice(*split.answer.marker_span)] == "The best answer is ("
