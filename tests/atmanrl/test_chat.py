"""From text to ids: one BOS per prompt and no EOS, open turns, prompt and completion as they were given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from atmanrl.config import DataConfig
from atmanrl.models import decode, encode_completion, encode_prompt, end_of_turn_ids
from atmanrl.tasks import load_task
from atmanrl.tasks.ledger import build_tokenizer
from tests.atmanrl.tiny import BOS, CHAT_TEMPLATE, END_OF_TEXT, EOT, PAD, byte_level_tokenizer, write_gsm8k

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How much is 9 * 2?"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


def test_the_stand_in_doubles_the_bos_where_llama_3_does(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(text).count(tokenizer.bos_token_id) == 2


def test_messages_are_encoded_with_one_bos_and_an_open_assistant_turn(tokenizer):
    ids = encode_prompt(tokenizer, MESSAGES)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_messages_are_encoded_as_the_tokenizer_itself_does(tokenizer):
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encode_prompt(tokenizer, MESSAGES) == expected


def test_what_else_a_template_reads_reaches_it():
    thinking = byte_level_tokenizer(chat_template=CHAT_TEMPLATE + "{% if not enable_thinking %}</think>{% endif %}")
    ids = encode_prompt(thinking, MESSAGES, {"enable_thinking": False})
    assert thinking.decode(ids).endswith("</think>")
    assert encode_prompt(thinking, MESSAGES, {"enable_thinking": True}) == encode_prompt(
        byte_level_tokenizer(), MESSAGES
    )


def test_a_rendered_prompt_passed_as_text_keeps_one_bos(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert encode_prompt(tokenizer, text) == encode_prompt(tokenizer, MESSAGES)


def test_a_template_without_bos_and_a_tokenizer_without_bos_are_left_alone():
    silent = byte_level_tokenizer(chat_template=CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    assert silent.bos_token_id not in encode_prompt(silent, MESSAGES)
    no_bos = byte_level_tokenizer(chat_template=CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    no_bos.bos_token = None
    assert encode_prompt(no_bos, MESSAGES) == encode_prompt(silent, MESSAGES)


def test_plain_prompts_get_the_tokenizers_bos(tokenizer):
    ids = encode_prompt(tokenizer, "Problem: 9 * 2")
    assert tokenizer.decode(ids) == f"{BOS}Problem: 9 * 2"


def test_messages_without_a_chat_template_are_an_error():
    with pytest.raises(ValueError, match=r'no chat template.*prompt as text.*set data\.prompt_style to "plain"'):
        encode_prompt(byte_level_tokenizer(chat_template=None), MESSAGES)


@pytest.mark.parametrize("eos", [EOT, END_OF_TEXT])
def test_whichever_token_the_tokenizer_names_all_end_of_turn_tokens_end_a_completion(eos):
    tokenizer = byte_level_tokenizer(eos=eos)
    ends = end_of_turn_ids(tokenizer)
    assert ends == {tokenizer.convert_tokens_to_ids(name) for name in (EOT, END_OF_TEXT, PAD)}


def test_the_generation_configurations_tokens_end_a_completion_too(tokenizer):
    ordinary = tokenizer.encode(".", add_special_tokens=False)[0]
    assert end_of_turn_ids(tokenizer, ordinary) == end_of_turn_ids(tokenizer) | {ordinary}
    assert end_of_turn_ids(tokenizer, [ordinary, 0]) == end_of_turn_ids(tokenizer) | {ordinary, 0}


def test_words_that_look_like_an_end_but_are_no_special_tokens_do_not_end_a_completion():
    # "</s>" in the text of a Llama-3 model is four characters, and its vocabulary may hold them as an ordinary token.
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["</s>"])
    assert tokenizer.convert_tokens_to_ids("</s>") not in end_of_turn_ids(tokenizer)


def test_ledgers_completions_end_with_its_eos_or_padding():
    tokenizer = build_tokenizer()
    assert end_of_turn_ids(tokenizer) == {tokenizer.eos_token_id, tokenizer.pad_token_id}


def test_gsm8k_prompts_reach_the_model_with_one_bos_and_the_instruction_last(tokenizer, tmp_path):
    config = DataConfig(name="gsm8k", path=str(write_gsm8k(tmp_path / "train.jsonl")))
    for row in load_task(config).train:
        text = tokenizer.decode(encode_prompt(tokenizer, row["prompt"]))
        assert text.count(BOS) == 1
        assert text.startswith(f"{BOS}<|start_header_id|>user")
        assert '"The final answer is [answer]"' in text


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """Characters as SentencePiece has them; "llama" puts a space before every text while normalising it."""
    characters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:+="
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    vocabulary |= {character: 259 + i for i, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(space)
    if kind == "llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "byte level": byte_level_tokenizer(),
    "llama": sentencepiece("llama"),
    "metaspace": sentencepiece("metaspace"),
}
TEXT = st.text("aZ09 .:=+\nß中🙂", max_size=12)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(TEXT.filter(str.strip), TEXT)
def test_prompt_and_completion_decode_to_what_was_given(kind, prompt, completion):
    tokenizer = TOKENIZERS[kind]
    ids = encode_prompt(tokenizer, prompt)
    assert decode(tokenizer, ids + encode_completion(tokenizer, ids, completion)) == decode(tokenizer, ids) + completion
    assert (
        decode(tokenizer, ids).removeprefix(tokenizer.bos_token).removeprefix(" ") == prompt.removeprefix(" ")
        or " " in prompt[:1]
    )


def test_a_tokenizer_of_words_keeps_the_words_of_prompt_and_completion():
    tokenizer = build_tokenizer()
    ids = encode_prompt(tokenizer, "a 6 c 0 ? c <cot>")
    both = decode(tokenizer, ids + encode_completion(tokenizer, ids, "c 0 <ans> c 0"))
    assert both == "<b> a 6 c 0 ? c <cot> c 0 <ans> c 0"


@pytest.mark.parametrize(("before", "behind"), [("", EOT), (BOS, EOT), (BOS, END_OF_TEXT)])
def test_no_end_stands_behind_a_prompt_unless_it_was_written_there(before, behind):
    tokenizer = byte_level_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (before, behind) if token]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {behind}".strip(), special_tokens=special
    )
    for text in ("Question: 2+2\nResponse:", f"2+2{behind}", "a a a"):
        assert decode(tokenizer, encode_prompt(tokenizer, text)) == before + text


def test_a_last_message_of_the_assistant_is_continued(tokenizer):
    begun = [*MESSAGES, {"role": "assistant", "content": "Let me add:"}]
    text = tokenizer.decode(encode_prompt(tokenizer, begun))
    assert text == tokenizer.decode(encode_prompt(tokenizer, MESSAGES)) + "Let me add:"
    empty = [*MESSAGES, {"role": "assistant", "content": ""}]
    assert encode_prompt(tokenizer, empty) == encode_prompt(tokenizer, MESSAGES)


def test_half_a_surrogate_pair_is_refused_with_its_position(tokenizer):
    for prompt in ("ab\ud83d", [{"role": "user", "content": "ab\ud83d"}]):
        with pytest.raises(ValueError, match=r"the prompt is no Unicode text: half a surrogate pair .* at position 2"):
            encode_prompt(tokenizer, prompt)
    with pytest.raises(ValueError, match=r"the completion is no Unicode text.* at position 2"):
        encode_completion(tokenizer, [1], "ab\ud83d")
