"""Conversations: through a chat template or as plain text, turn after turn, clipped."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fakes import Letters
from forerun import workload
from forerun.config import WorkloadConfig
from forerun.types import UserError

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Now shorter.", "And now?"]},
    {"question_id": 95, "category": "math", "turns": ["What is 2 + 2?"]},
]


class Chatty(Letters):
    """Letters with a chat template that marks who speaks and has no place for a system's message."""

    chat_template = "there is one"

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        assert not tokenize
        if messages[0]["role"] == "system":
            raise ValueError("no system\nhere")
        assert [one["role"] for one in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
        return "".join(f"<{one['role'][0]}>{one['content']}" for one in messages) + "<a>"


def prompts(tokenizer: Any, **config: Any) -> list[workload.Prompt]:
    return workload.load(WorkloadConfig(**config), tokenizer, 97, 10**6)


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


def test_turns_through_the_chat_template(tmp_path: Path) -> None:
    config = WorkloadConfig(kind="mt-bench", path=write(tmp_path / "q.jsonl", *QUESTIONS), turns="all")
    tokenizer: Any = Chatty()
    first, other = workload.load(config, tokenizer, 97, 100)
    assert (first.text, first.turns) == ("<u>Write.<a>", ("Now shorter.", "And now?"))
    assert first.tokens == tuple(tokenizer(first.text)["input_ids"])
    second = workload.follow(first, "Text.", config, tokenizer)
    assert second is not None
    assert (second.id, second.category, second.turns) == ("81/2", "writing", ("And now?",))
    assert second.text == "<u>Write.<a>Text.<u>Now shorter.<a>"
    third = workload.follow(second, "T.", config, tokenizer)
    assert third is not None
    assert (third.id, third.text) == ("81/3", "<u>Write.<a>Text.<u>Now shorter.<a>T.<u>And now?<a>")
    assert workload.follow(third, "", config, tokenizer) is None
    assert workload.follow(other, "4", config, tokenizer) is None
    only = config.model_copy(update={"turns": "first"})
    assert workload.load(only, tokenizer, 97, 100)[0].turns == ()


def test_turns_without_a_template_are_lines_of_plain_text(tmp_path: Path) -> None:
    config = WorkloadConfig(kind="spec-bench", path=write(tmp_path / "q.jsonl", *QUESTIONS), turns="all")
    for tokenizer, asked in ((Letters(), config), (Chatty(), config.model_copy(update={"chat": False}))):
        first = workload.load(asked, tokenizer, 97, 100)[0]  # type: ignore[arg-type]
        assert first.text == "Write."
        second = workload.follow(first, "Text.", asked, tokenizer)  # type: ignore[arg-type]
        assert second is not None
        assert second.text == "Write.\nText.\nNow shorter."


def test_what_goes_through_a_template(tmp_path: Path) -> None:
    said = [("user", "hi"), ("assistant", "yes?"), ("user", "bye")]
    messages = [{"role": role, "content": words} for role, words in said]
    path = write(tmp_path / "a.jsonl", {"prompt": "tell"}, {"turns": ["say", "more"]}, {"messages": messages})
    found = prompts(Chatty(), kind="jsonl", path=path, turns="all")
    assert [(one.text, one.turns) for one in found] == [("tell", ()), ("<u>say<a>", ("more",)), ("<u>hi<a>", ("bye",))]
    assert prompts(Chatty(), kind="jsonl", path=path, chat=True)[0].text == "<u>tell<a>"
    assert prompts(Chatty(), kind="demo", limit=1)[0].text == prompts(Letters(), kind="demo", limit=1)[0].text
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        prompts(Letters(), kind="jsonl", path=path, chat=True)
    system = write(tmp_path / "s.jsonl", {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]})
    assert prompts(Letters(), kind="jsonl", path=system)[0].text == "be\nhi"
    with pytest.raises(UserError, match=r"refuses a conversation: no system; set workload.chat=false"):
        prompts(Chatty(), kind="jsonl", path=system)


def test_a_long_conversation_loses_its_oldest_turns_and_a_template_stays_whole(tmp_path: Path) -> None:
    record = {"category": "c", "turns": ["a" * 30, "b" * 40, "c" * 5]}
    config = WorkloadConfig(kind="mt-bench", path=write(tmp_path / "q.jsonl", record), turns="all", max_prompt_tokens=26)
    tokenizer: Any = Chatty()
    (first,) = workload.load(config, tokenizer, 97, 26)
    assert first.text is not None
    assert re.fullmatch("<u>a{15,20}<a>", first.text)
    assert len(first.tokens) == len(first.text) <= 26
    second = workload.follow(first, "Text.", config, tokenizer)
    assert second is not None
    assert re.fullmatch("<u>b{15,20}<a>", str(second.text))
    third = workload.follow(second, "Text.", config, tokenizer)
    assert third is not None
    assert third.text == "<u>ccccc<a>"
    wide = config.model_copy(update={"max_prompt_tokens": 66})
    two = workload.follow(workload.load(wide, tokenizer, 97, 66)[0], "Text.", wide, tokenizer)
    assert two is not None
    assert len(two.messages) == 3
    assert two.text == f"<u>{'b' * 40}<a>"
    three = workload.follow(two, "Text.", wide, tokenizer)
    assert three is not None
    assert three.text == f"<u>{'b' * 40}<a>Text.<u>ccccc<a>"
    plain = config.model_copy(update={"chat": False})
    assert workload.load(plain, tokenizer, 97, 26)[0].tokens == tuple(tokenizer("a" * 26)["input_ids"])
    with pytest.raises(UserError, match="max_prompt_tokens=5: the chat template alone is longer"):
        workload.load(config.model_copy(update={"max_prompt_tokens": 5}), tokenizer, 97, 26)


def test_a_template_writes_its_own_special_tokens(tmp_path: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    from forerun.model import ASSETS

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "target")
    begin = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.eos_token_id)]
    )
    tokenizer.chat_template = begin + "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    path = write(tmp_path / "q.jsonl", QUESTIONS[1])
    for chat in (True, False):
        (found,) = prompts(tokenizer, kind="mt-bench", path=path, chat=chat)
        assert found.tokens.count(tokenizer.eos_token_id) == 1
        assert found.tokens[0] == tokenizer.eos_token_id
