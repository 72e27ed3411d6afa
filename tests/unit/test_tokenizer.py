"""The tokenizer: round trips, no injection, fixed ids, Llama 4's chat format, and the same ids in transformers."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from minillama4 import scenes
from minillama4.config import Llama4Config
from minillama4.tokenizer import LLAMA4_SPECIAL_TOKENS, MINI_SPECIAL_TOKENS, load_tokenizer, train_tokenizer

PICTURE_CHAT = [
    {"role": "system", "content": " Be brief.\n"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Here "}, {"type": "image"}, {"type": "text", "text": "how many?"}],
    },
    {"role": "assistant", "content": "3"},
    {"role": "tool", "content": "[1, 2]"},
    {"role": "user", "content": ""},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(scenes.words(60))


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    (folder / "config.json").write_text('{"model_type": "llama4"}')  # as in a checkpoint; AutoTokenizer looks at it
    return folder


@pytest.fixture(scope="module")
def partner(folder):
    return AutoTokenizer.from_pretrained(folder)


# --- Text -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(id < 1000 for id in ids)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*MINI_SPECIAL_TOKENS, "<|", "|>", "eot", " ", "<|eot|", "é"])).map("".join))
def test_user_text_never_becomes_a_special_token(tokenizer, text):
    assert all(id < 1000 for id in tokenizer.encode(text))
    chat = tokenizer.encode_chat([{"role": "user", "content": text}])
    assert [id for id in chat if id >= 1000] == [1000, 1005, 1006, 1008, 1005, 1006]
    assert tokenizer.decode(tokenizer.encode(text, special=True), skip_special=False) == text


def test_special_text_is_parsed_only_on_request(tokenizer):
    text = "a<|eot|><|eot|> b"
    assert tokenizer.encode(text, special=True) == [*tokenizer.encode("a"), 1008, 1008, *tokenizer.encode(" b")]
    assert tokenizer.decode([*tokenizer.encode("a"), 1008]) == "a"
    assert tokenizer.decode(torch.tensor([1008]), skip_special=False) == "<|eot|>"


@pytest.mark.parametrize(
    "word", [" हिन्दी", " त्रिभुज", "مُثَلَّثٌ", " أحمر", " Étoile", " étoile", " don't", "123", "\n\n", "!?"]
)
def test_a_word_with_its_marks_is_one_piece(word):
    """If a combining mark ended a word, no merge could ever make that word one token."""
    assert len(train_tokenizer([word] * 50).encode(word)) == 1


def test_digits_come_in_groups_of_three():
    tokenizer = train_tokenizer(["1234567 1234567"] * 50)
    assert [tokenizer.decode([id]) for id in tokenizer.encode("1234567")] == ["123", "456", "7"]


def test_frequent_words_of_all_four_languages_are_single_tokens(tokenizer):
    for word in (" red", " circle", " rouge", " cercle", " लाल", " वृत्त", " الأحمر", " دائرة"):
        assert len(tokenizer.encode(word)) == 1, word
    texts = list(scenes.words(20))
    pieces = sum(len(text.split()) for text in texts)
    assert sum(len(tokenizer.encode(text)) for text in texts) < 1.5 * pieces


# --- Ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [[], ["a"], None])
def test_special_ids_never_move(texts, tokenizer):
    """Few texts give few merges; unused entries fill the gap."""
    tokenizer = tokenizer if texts is None else train_tokenizer(texts)
    assert tokenizer.vocab_size == 1024
    assert tokenizer.special_tokens == MINI_SPECIAL_TOKENS
    assert list(MINI_SPECIAL_TOKENS.values()) == list(range(1000, 1024))
    for frame in ("\n\n", "user", "assistant", "system", "ipython"):
        assert len(tokenizer.encode(frame)) == 1


@pytest.mark.parametrize("preset, tokens", [("scout", LLAMA4_SPECIAL_TOKENS), ("mini-scout", MINI_SPECIAL_TOKENS)])
def test_config_and_tokenizer_agree(preset, tokens):
    config = Llama4Config.preset(preset)
    assert config.bos_token == tokens["<|begin_of_text|>"]
    assert config.stop_tokens == (tokens["<|end_of_text|>"], tokens["<|eom|>"], tokens["<|eot|>"])
    assert config.pad_token == tokens["<|finetune_right_pad|>"]
    assert config.patch_token == tokens["<|patch|>"]


def test_released_ids():
    """Facts 2.3 and 3; the mini tokenizer has every one of these names."""
    assert LLAMA4_SPECIAL_TOKENS["<|tile_y_separator|>"] == 200085
    assert LLAMA4_SPECIAL_TOKENS["<|patch|>"] == 200092
    assert LLAMA4_SPECIAL_TOKENS["<|reasoning_thinking_end|>"] == 201143
    assert LLAMA4_SPECIAL_TOKENS.keys() <= MINI_SPECIAL_TOKENS.keys()


def test_training_is_deterministic(folder):
    again = train_tokenizer(scenes.words(60))
    assert json.loads((folder / "tokenizer.json").read_text("utf-8")) == json.loads(again._bpe.to_str())


# --- Chat -----------------------------------------------------------------------------------------------------------


def test_chat_has_the_structure_of_the_check_vector(tokenizer):
    """Facts 3: the released ids are [200000, 200005, 1556, 200006, 368, 19873, 200008, 200005, 140680, 200006, 368]."""
    (user,), (assistant,), (newlines,) = map(tokenizer.encode, ("user", "assistant", "\n\n"))
    hello = tokenizer.encode("Hello")
    assert tokenizer.encode_chat([{"role": "user", "content": "Hello"}]) == [
        1000, 1005, user, 1006, newlines, *hello, 1008, 1005, assistant, 1006, newlines,
    ]  # fmt: skip


@pytest.mark.parametrize("generation", [True, False])
def test_transformers_gives_the_same_chat_ids(tokenizer, partner, generation):
    theirs = partner.apply_chat_template(PICTURE_CHAT, add_generation_prompt=generation)["input_ids"]
    assert theirs == tokenizer.encode_chat(PICTURE_CHAT, generation)
    assert theirs.count(1000) == 1 and theirs.count(1014) == 1


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|" not in text))
def test_transformers_encodes_and_decodes_the_same(tokenizer, partner, text):
    ids = tokenizer.encode(text)
    assert partner(text, add_special_tokens=False).input_ids == ids
    assert partner(text).input_ids == [1000, *ids]
    assert partner.decode(ids) == text


def test_transformers_finds_the_special_roles(partner):
    assert (partner.bos_token_id, partner.eos_token_id, partner.pad_token_id) == (1000, 1008, 1018)
    assert len(partner) == 1024


# --- Files and errors -----------------------------------------------------------------------------------------------


def test_save_and_load(tokenizer, folder, partner, tmp_path):
    text = "How many लाल circles, <|eot|>?"
    assert load_tokenizer(folder).encode(text) == tokenizer.encode(text)
    partner.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode_chat(PICTURE_CHAT) == tokenizer.encode_chat(PICTURE_CHAT)


def error(call, *arguments):
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_files_are_refused_in_one_line(folder, tmp_path):
    assert "no folder" in error(load_tokenizer, tmp_path / "nowhere")
    assert "no tokenizer.json" in error(load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text("utf-8")[:5000], "utf-8")
    assert "cannot read" in error(load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in error(load_tokenizer, tmp_path)
    state = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "<|eot|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    assert "<|eot|>" in error(load_tokenizer, tmp_path)
    state["added_tokens"] = []
    state["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    assert "no Llama 4 tokenizer" in error(load_tokenizer, tmp_path)


def test_bad_calls_are_refused_in_one_line(tokenizer):
    assert "1024" in error(tokenizer.decode, [1024])
    assert "-1" in error(tokenizer.decode, [5, -1])
    assert "bytes" in error(tokenizer.encode, b"text")
    assert "surrogate" in error(tokenizer.encode, "a\ud800")
    assert "<|eot|>" in error(tokenizer.token_id, "<|eott|>")
    assert "vocab_size" in error(train_tokenizer, ["a"], 280)


@pytest.mark.parametrize("message, named", [
    ("Hello", "messages[1]"),
    ({"role": "user"}, "'content'"),
    ({"role": "robot", "content": "x"}, "'robot'"),
    ({"role": "user", "content": None}, "NoneType"),
    ({"role": "user", "content": ["x"]}, "'x'"),
    ({"role": "user", "content": [{"type": "text"}]}, "part"),
    ({"role": "user", "content": [{"type": "audio", "audio": "x"}]}, "audio"),
])  # fmt: skip
def test_a_bad_message_is_named(tokenizer, message, named):
    said = error(tokenizer.encode_chat, [{"role": "user", "content": "fine"}, message])
    assert "messages[1]" in said and named in said
