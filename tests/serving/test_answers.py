"""What a run answered, one line for each completion."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from aurora_rl.envs import Completion, SamplingParams
from aurora_rl.serving.answers import Answers
from aurora_rl.serving.requests import RequestQueue
from aurora_rl.workload.traffic import Prompt


def test_an_answer_that_ends_at_eos_shows_none(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    requests = RequestQueue(
        [Prompt("p", "chat", ({"role": "user", "content": "Hi"},))],
        tokenizer,
        vocab_size=len(tokenizer),
        max_length=256,
        sampling=SamplingParams(max_tokens=10),
    )
    request = requests()
    assert request is not None
    tokens = [*tokenizer("Yes.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(tokens) != "Yes."
    answers = Answers(tmp_path / "answers.jsonl", requests, tokenizer)
    assert answers.completed(Completion(request, torch.tensor(tokens), True, None)) == "chat"
    (line,) = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "request": 0,
        "prompt": "p",
        "domain": "chat",
        "turn": 1,
        "text": "Yes.",
        "finish_reason": "stop",
        "tokens": len(tokens),
    }
