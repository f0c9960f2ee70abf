"""The pieces of an answer are its text: no character is cut, no stop string or part of one gets out."""

import pytest
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from molora.serve.engine.detokenise import BROKEN, Detokeniser
from tests import tiny

TEXTS = [
    "the quick brown fox",
    "über größe naïve café",
    "日本語のテキスト",
    "emoji 🙂🚀 and 👩‍👩‍👧",
    "a.b, c! d? don't",
]


def byte_level():
    """Return a tokenizer as GPT-2's: a character may take several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(TEXTS, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=core)


def sentencepiece_like():
    """Return a tokenizer as Llama's: spaces are part of words, unknown characters are bytes."""
    pieces = ["▁", "▁the", "▁quick", "fox", "ü", "ber", "a", "e", "s", "t", "o", "n", ".", "é", "'", "▁d"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def word_pieces():
    """Return a tokenizer as BERT's, whose pieces are joined."""
    names = ["[UNK]", "the", "play", "##ing", "##er", "fox", "##es", ",", "."]
    core = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


TOKENIZERS = {
    "bytes": byte_level(),
    "pieces": sentencepiece_like(),
    "words": tiny.tiny_tokenizer(),
    "wp": word_pieces(),
}


def pieces_of(tokenizer, ids, stops=()):
    """Return the pieces of text, and whether a stop string ended it."""
    text = Detokeniser(tokenizer, stops)
    pieces = []
    for id in ids:
        pieces.append(text.feed(id))
        if text.stopped:
            return pieces, True
    return [*pieces, text.flush()], text.stopped


@pytest.mark.parametrize("name", ["bytes", "pieces"])
@given(text=st.text(max_size=25).filter(lambda text: BROKEN not in text))
@settings(max_examples=150, deadline=None)
def test_pieces_add_up_to_the_text(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces, _ = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert all(BROKEN not in piece for piece in pieces)


@pytest.mark.parametrize("name", ["words", "wp"])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_tokens_add_up_to_the_text(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    pieces, _ = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@given(ids=st.lists(st.integers(0, 299), max_size=20))
@settings(max_examples=150, deadline=None)
def test_bytes_that_are_no_text_lose_nothing(ids):
    tokenizer = TOKENIZERS["bytes"]
    pieces, _ = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_text_comes_as_soon_as_it_is_certain():
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("fox 🙂 x", add_special_tokens=False).input_ids
    pieces, _ = pieces_of(tokenizer, ids)
    for count in range(len(ids) + 1):
        known = "".join(pieces[:count])
        assert known == tokenizer.decode(ids[:count]).rstrip(BROKEN)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_stop_string_ends_the_text_wherever_tokens_end(data):
    tokenizer = TOKENIZERS["bytes"]
    text = data.draw(st.text("abc d🙂é", min_size=1, max_size=20))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    stops = data.draw(st.lists(st.text("abc d🙂é", min_size=1, max_size=4), min_size=1, max_size=3))
    expected, stopped = text, False
    for count in range(len(ids) + 1):  # the plain way: look for a stop in all that is there
        sofar = tokenizer.decode(ids[:count]).rstrip(BROKEN)
        found = [sofar.find(stop) for stop in stops if stop in sofar]
        if found:
            expected, stopped = sofar[: min(found)], True
            break
    pieces, told = pieces_of(tokenizer, ids, stops)
    assert ("".join(pieces), told) == (expected, stopped)


def test_what_may_become_a_stop_string_is_held_back():
    tokenizer = tiny.tiny_tokenizer()
    ids = tokenizer("the good film was good", add_special_tokens=False).input_ids
    assert pieces_of(tokenizer, ids, ["good movie"]) == (["the", " ", "good film", " was", " ", "good"], False)
    text = Detokeniser(tokenizer, ["good"])
    assert [text.feed(id, may_stop=place > 2) for place, id in enumerate(ids)][:4] == ["the", " good", " film", " was"]
    assert text.stopped and text.feed(ids[0]) == "" and text.flush() == ""
