"""Incremental text: exact UTF-8, stop strings over token borders, and resuming."""

import random
import time
from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cluster.engine.text import TextStream
from cluster.errors import InvalidRequestError
from cluster.rpc.prompt import PromptEncoder

TEXT = "def grüße(name: str) -> str:\n    return f'héllo 你好 🎉🏳️‍🌈 {name}'  # ← naïve\n"
END = "<|endoftext|>"


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges: most characters beyond ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def return self str name hello world"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with ▁, unknown characters fall back to byte tokens."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = list("▁abcdefghijklmnopqrstuvwxyz()':.")
    vocab = {word: index for index, word in enumerate(words + letters)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer()


def stream_text(
    tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int], stop: Sequence[str] = ()
) -> tuple[list[str], int]:
    """The deltas (the last is what `finish` gave), and how many tokens were taken."""
    stream = TextStream(tokenizer, stop)
    deltas = []
    num_taken = 0
    for token_id in token_ids:
        text, stopped = stream.push(token_id)
        deltas.append(text)
        num_taken += 1
        if stopped:
            break
    deltas.append(stream.finish())
    return deltas, num_taken


@pytest.mark.parametrize("make", [small_tokenizer, sentencepiece_tokenizer])
def test_nothing_stands_between_special_tokens(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    """So that ``spaces_between_special_tokens: false`` asks for nothing."""
    tokenizer = make()
    stream = TextStream(tokenizer, skip_special_tokens=False)
    texts = [stream.push(tokenizer.eos_token_id).text for _ in range(3)]
    assert "".join([*texts, stream.finish()]) == tokenizer.eos_token * 3


async def test_of_a_truncated_prompt_special_tokens_stay() -> None:
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.eos_token_id)]
    )
    encoder = PromptEncoder(tokenizer, 600)
    for text in (TEXT, TEXT * 50):  # encoded in the event loop, and beside it
        whole = tokenizer.encode(text)
        assert await encoder.encode(text) == tuple(whole)
        assert await encoder.encode(text, max_tokens=9) == (whole[0], *whole[-8:])
        assert await encoder.encode(text, max_tokens=10_000) == tuple(whole)
        assert await encoder.encode(text, max_tokens=1) == (whole[0],)
        plain = await encoder.encode(text, max_tokens=9, add_special_tokens=False)
        assert plain == tuple(whole[-9:])
    too_long = TEXT * 10_000
    with pytest.raises(InvalidRequestError):
        await encoder.encode(too_long)
    assert (await encoder.encode(too_long, max_tokens=9))[1:] == tuple(tokenizer.encode(TEXT)[-8:])


@pytest.mark.parametrize("make", [small_tokenizer, sentencepiece_tokenizer])
def test_never_half_a_character(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    text = TEXT if make is small_tokenizer else "hello (你好) caf\u00e9 🎉 bye"
    ids = tokenizer.encode(text)
    deltas, _ = stream_text(tokenizer, ids)
    assert "".join(deltas) == tokenizer.decode(ids)
    assert not any("\ufffd" in delta for delta in deltas)
    assert deltas[-1] == ""
    assert len(ids) > len(text)  # or nothing was split


def test_random_tokens_join_to_the_decoding(tokenizer: PreTrainedTokenizerFast) -> None:
    chance = random.Random(0)
    for _ in range(300):
        ids = [chance.randrange(len(tokenizer)) for _ in range(chance.randrange(1, 60))]
        deltas, _ = stream_text(tokenizer, ids)
        assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=True)


def test_unfinished_character_comes_with_finish(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("a🎉")[:-1]
    deltas, _ = stream_text(tokenizer, ids)
    assert "".join(deltas[:-1]) == "a"
    assert set(deltas[-1]) == {"\ufffd"}


def test_stop_string_over_token_borders(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("x = 好の🎉END and more")
    for stop, text in [("🎉E", "x = 好の"), ("D a", "x = 好の🎉EN"), ("x", ""), ("の", "x = 好")]:
        deltas, num_taken = stream_text(tokenizer, ids, ["never there", stop])
        assert "".join(deltas) == text
        # Cut at the very token that completes it.
        assert stop in tokenizer.decode(ids[:num_taken])
        assert stop not in tokenizer.decode(ids[: num_taken - 1])


def test_possible_beginning_of_a_stop_string_is_held_back(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    stream = TextStream(tokenizer, ["abcabd", "\n\n"])
    ids = [tokenizer.convert_tokens_to_ids(c) for c in "abcabcabd"]
    out = [stream.push(token_id) for token_id in ids]
    assert [delta.text for delta in out] == ["", "", "", "", "", "abc", "", "", ""]
    assert [delta.stopped for delta in out] == [False] * 8 + [True]
    assert stream.stopped
    assert stream.push(ids[0]) == ("", True)
    assert stream.finish() == ""

    deltas, _ = stream_text(tokenizer, tokenizer.encode("abcab"), ["abcabd"])
    assert deltas[-1].endswith("ab")
    assert "".join(deltas) == "abcab"


def test_first_of_several_stop_strings_wins(tokenizer: PreTrainedTokenizerFast) -> None:
    deltas, _ = stream_text(tokenizer, tokenizer.encode("one two three"), ["three", "two", "wo"])
    assert "".join(deltas) == "one "


def test_a_stop_string_can_be_part_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("x = 好の🎉END and more")
    for stop in (["🎉E"], ["D a", "END a"], ["END"]):
        stream = TextStream(tokenizer, stop, include_stop=True)
        text = "".join(stream.push(token_id).text for token_id in ids) + stream.finish()
        assert stream.stopped
        assert text.endswith(stop[-1])
        assert "x = 好の🎉END and more".startswith(text)


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*tokenizer.encode("hello"), tokenizer.eos_token_id]
    deltas, _ = stream_text(tokenizer, ids)
    assert "".join(deltas) == "hello"
    stream = TextStream(tokenizer, skip_special_tokens=False)
    assert "".join(stream.push(token_id).text for token_id in ids) == "hello" + END


def test_tokens_outside_the_vocabulary_have_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model's logits are often padded beyond the tokenizer's last entry."""
    ids = [*tokenizer.encode("hel"), 100_000, *tokenizer.encode("lo")]
    assert "".join(stream_text(tokenizer, ids)[0]) == "hello"


def test_resumed_stream_goes_on_where_the_broken_one_stood(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tokenizer.encode(TEXT)
    whole = [TextStream(tokenizer, ["naïve\nX", "🎉🎉"]) for _ in range(len(ids) + 1)]
    for num_resumed, stream in enumerate(whole):
        broken = TextStream(tokenizer, ["naïve\nX", "🎉🎉"])
        sent = "".join(broken.push(token_id).text for token_id in ids[:num_resumed])
        for token_id in ids[:num_resumed]:
            stream.push(token_id)
        rest = "".join(stream.push(token_id).text for token_id in ids[num_resumed:])
        assert sent + rest + stream.finish() == TEXT


def test_stray_bytes_do_not_make_tokens_dearer(tokenizer: PreTrainedTokenizerFast) -> None:
    stray = tokenizer.convert_tokens_to_ids("ÿ")  # byte 0xFF
    assert tokenizer.decode([stray]) == "\ufffd"
    stream = TextStream(tokenizer, ["\ufffd" * 200])
    texts = [stream.push(stray).text for _ in range(150)]
    assert set(texts) == {""}
    stream = TextStream(tokenizer)
    started = time.perf_counter()
    num_chars = sum(len(stream.push(stray).text) for _ in range(10_000))
    assert time.perf_counter() - started < 5
    assert num_chars + len(stream.finish()) == 10_000
    assert stream.push(tokenizer.convert_tokens_to_ids("a")).text == "a"
