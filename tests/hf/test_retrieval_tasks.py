"""Questions of the retrieval suite: what is hidden stands there once, and can be answered."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import byte_pair_tokenizer, sentence_piece_tokenizer

pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch.hf.model_folder import tokenize
from dilated_attention_pytorch.hf.retrieval import TASKS, Sample, build_task

IN_TEXT = ("needle", "keys", "values", "queries", "variables", "code")
HAYSTACK_WORD = "q"
BYTES = byte_pair_tokenizer("", 256)


def haystack(tokenizer: Any, length: int = 3000) -> Tensor:
    """Text of one letter, in which nothing else can be found."""
    return tokenize(tokenizer, HAYSTACK_WORD * length)[:length]


def build(name: str, seed: int = 0, length: int = 1500) -> tuple[Sample, str, str]:
    """A sample of bytes, and the texts of its prompt and of its answer."""
    sample = build_task(name, BYTES, haystack(BYTES), length, seed)
    prompt, answer = (BYTES.decode(x.tolist()) for x in (sample.prompt, sample.answer))
    return sample, prompt, answer


def facts(prompt: str) -> list[tuple[str, str]]:
    return re.findall(r"secret number of (\w+) is (\d+)\.", prompt)


@pytest.mark.parametrize("name", TASKS)
def test_samples_fill_the_length_and_are_the_same_for_the_same_seed(name: str) -> None:
    for length in (1200, 1500, 2500):
        sample, prompt, _ = build(name, 3, length)
        whole = len(sample.prompt) + sample.new_tokens
        assert whole == length if name in IN_TEXT else 0.9 * length < whole <= length
        again, _, _ = build(name, 3, length)
        assert torch.equal(sample.prompt, again.prompt)
        assert torch.equal(sample.answer, again.answer)
        assert sample.expected == again.expected
        other, words, _ = build(name, 4, length)
        assert other.expected != sample.expected
        assert words != prompt
        assert sample.new_tokens >= len(sample.answer) + 8


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", ["bytes", "merges", "sentence piece"])
def test_any_tokenizer_will_do(name: str, kind: str) -> None:
    """Prompt and answer together have the tokens that the text has."""
    merges = "The secret number of kalomi is 12345. def VAR question answer words above are\n" * 2
    tokenizer = {
        "bytes": BYTES,
        "merges": byte_pair_tokenizer(merges, 330),
        "sentence piece": sentence_piece_tokenizer(),
    }[kind]
    sample = build_task(name, tokenizer, haystack(tokenizer), 1600, 1)
    assert len(sample.prompt) + sample.new_tokens <= 1600
    assert sample.prompt.dtype == sample.answer.dtype == torch.int32
    decoded = tokenizer.decode(sample.answer.tolist(), clean_up_tokenization_spaces=False)
    for words in sample.expected:
        assert words in decoded
    whole = tokenizer.decode(torch.cat((sample.prompt, sample.answer)).tolist())
    assert whole.endswith(decoded.strip())


@pytest.mark.parametrize("name", ["noise", "needle", "keys", "needles"])
def test_one_fact_stands_there_and_its_answer_nowhere_else(name: str) -> None:
    places, texts = [], set()
    for seed in range(8):
        sample, prompt, answer = build(name, seed)
        (number,) = sample.expected
        assert answer == f" {number}"
        asked = re.search(r"\nThe secret number of (\w+) is$", prompt)
        assert asked is not None
        known = facts(prompt)
        assert dict(known)[asked[1]] == number
        assert prompt.count(number) == 1
        assert len({key for key, _ in known}) == len({value for _, value in known}) == len(known)
        assert len(known) == {"keys": 8, "needle": 1, "noise": 1}.get(name, len(known))
        places.append(prompt.index(number) / len(prompt))
        texts.add(re.sub(r"\n?The secret number of \w+ is( \d+\.\n?)?", "", prompt).strip("q\n"))
    assert min(places) < 0.4 < 0.6 < max(places)
    if name == "noise":
        assert all("Rain falls on the roof.\nThe river" in text for text in texts)
    else:
        # Nothing but the text and such facts.
        assert texts == {""}
    if name == "needles":
        assert len(known) > 30


def test_all_values_of_a_name_are_asked_in_their_order() -> None:
    sample, prompt, answer = build("values")
    found = re.findall(r"One secret number of (\w+) is (\d+)\.\n", prompt)
    assert len({name for name, _ in found}) == 1
    assert tuple(number for _, number in found) == sample.expected
    assert prompt.endswith(f"numbers of {found[0][0]}, in their order, are")
    first, second, third, fourth = sample.expected
    assert answer == f" {first}, {second}, {third} and {fourth}"


def test_four_of_eight_names_are_asked() -> None:
    sample, prompt, answer = build("queries")
    known = dict(facts(prompt))
    assert len(known) == 8
    asked = re.search(r"numbers of (.*), in this order, are$", prompt)
    assert asked is not None
    names = re.split(r", | and ", asked[1])
    assert tuple(known[name] for name in names) == sample.expected
    assert re.split(r", | and ", answer.strip()) == list(sample.expected)


def test_variables_hold_what_the_chain_says() -> None:
    sample, prompt, answer = build("variables")
    held: dict[str, str] = {}
    for name, other, number in re.findall(r"\nVAR (\w+) = (?:VAR (\w+)|(\d+))\n", prompt):
        # A variable is read only after it is written.
        held[name] = held[other] if other else number
    assert len(held) == 10
    asked = re.search(r"Which five variables hold (\d+),", prompt)
    assert asked is not None
    assert {name for name in held if held[name] == asked[1]} == set(sample.expected)
    assert prompt.endswith(f"Answer: {asked[1]} is held by VAR")
    assert answer == f" {', VAR '.join(sample.expected)}"


def test_common_and_frequent_words_are_those_that_are_counted() -> None:
    for name, few in (("common", 5), ("frequent", 3)):
        sample, prompt, answer = build(name)
        counts = Counter(prompt.rpartition("\n")[0].split())
        top = [word for word, _ in counts.most_common(few)]
        assert set(top) == set(sample.expected)
        ordered = sorted(counts.values(), reverse=True)
        assert ordered[few - 1] > ordered[few]
        if name == "common":
            assert set(ordered[:5]) == {ordered[0]}
            assert set(ordered[5:]) == {3}
            assert sample.expected == tuple(sorted(top))
        else:
            assert tuple(top) == sample.expected
            assert ordered[0] / len(prompt.rpartition("\n")[0].split()) == pytest.approx(
                0.608, abs=0.01
            )
        assert re.split(r", | and ", answer.strip()) == list(sample.expected)


def test_a_line_of_a_table_is_looked_up() -> None:
    sample, prompt, answer = build("lookup")
    table = dict(re.findall(r'"([0-9a-f]{8})": "([0-9a-f]{8})",', prompt))
    assert len(table) > 40
    key = prompt.rpartition("\n")[2]
    assert (table[key.strip('":')],) == sample.expected
    assert answer == f' "{sample.expected[0]}"'


def test_a_function_from_the_start_is_asked_for_at_the_end() -> None:
    for seed in range(5):
        _, prompt, answer = build("code", seed)
        head = prompt.rpartition("\n")[2]
        assert re.fullmatch(r"def \w+\(\w+, \w+\):", head)
        assert prompt.count(head) == 2
        assert prompt.index(head) < len(prompt) / 8
        assert f"{head}{answer}\n" in prompt
        exec(head + answer, {})
        assert answer.count("\n") == 3


def test_facts_are_hidden_in_the_text_that_is_given() -> None:
    text = tokenize(BYTES, "abcdefghij" * 300)
    _, first, _ = build("needle")
    sample = build_task("needle", BYTES, text, 1500, 0)
    second = BYTES.decode(sample.prompt.tolist())
    assert first != second
    assert "abcdefghijabc" in second
    # Tasks with contexts of their own read none.
    assert len(build_task("noise", BYTES, text[:0], 1000, 0).prompt) > 900


def test_a_token_of_beginning_comes_first_where_the_tokenizer_has_one() -> None:
    class Begins:
        bos_token_id = 255

        def __call__(self, texts: list[str], add_special_tokens: bool = True, **_: Any) -> Any:
            encoded = BYTES(texts)["input_ids"]
            return {"input_ids": [[255] * add_special_tokens + tokens for tokens in encoded]}

    sample = build_task("needle", Begins(), haystack(BYTES), 500, 0)
    plain = build_task("needle", BYTES, haystack(BYTES), 500, 0)
    assert sample.prompt.tolist().count(255) == 1
    assert sample.prompt[0] == 255
    assert len(sample.prompt) == len(plain.prompt)


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tasks must be among noise, needle, .*, got 'hay'\."):
        build_task("hay", BYTES, haystack(BYTES), 500, 0)
    with pytest.raises(ValueError, match="haystack must hold at least 500 tokens, got 499"):
        build_task("needle", BYTES, haystack(BYTES, 499), 500, 0)
    for name in TASKS:
        with pytest.raises(ValueError, match=f"for the task '{name}' .*, got 30;") as caught:
            build_task(name, BYTES, haystack(BYTES), 30, 0)
        words = re.search(r"length must be at least (\d+) ", str(caught.value))
        assert words is not None
        # Names depend on the length, not the tokens that they take.
        least = int(words[1])
        sample = build_task(name, BYTES, haystack(BYTES), least, 0)
        assert len(sample.prompt) + sample.new_tokens <= least
        with pytest.raises(ValueError, match=f"length must be at least {least}"):
            build_task(name, BYTES, haystack(BYTES), least - 1, 0)

    def silent(pieces: list[str], **_: Any) -> Any:
        return {"input_ids": [[] for _ in pieces]}

    with pytest.raises(ValueError, match="tokenizer makes no tokens of the question 'The secret"):
        build_task("needle", silent, haystack(BYTES), 500, 0)
