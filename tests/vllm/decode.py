"""Decode prompts with vLLM's engine and write down every round of drafting and verification.

Run by the Python of vLLM's own environment, which has nothing of this repository: one JSON document of arguments in,
one JSON document out.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # binding needs core lists that containers often hide
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, where its rounds can be watched
    VLLM_NO_USAGE_STATS="1",
)

from vllm import LLM, SamplingParams  # noqa: E402 - reads the environment when it is imported


def main(task: dict[str, Any]) -> dict[str, Any]:
    llm = LLM(
        task["target"],
        speculative_config={"model": task["drafter"], "method": task["method"], "num_speculative_tokens": task["depth"]},
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,  # no compilation, which takes minutes and is not what is tested
        async_scheduling=False,  # otherwise the scheduler knows places of drafted tokens, not the tokens
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        skip_tokenizer_init=True,
    )
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    rounds: dict[str, list[dict[str, list[int]]]] = {}
    propose = runner.propose_draft_token_ids

    def watch(scheduler_output: Any, sampled: Any, *rest: Any) -> Any:
        drafted = scheduler_output.scheduled_spec_decode_tokens
        for request, said in zip(runner.input_batch.req_ids, sampled, strict=True):
            tokens = [int(token) for token in said if token >= 0]  # what was rejected is -1
            rounds.setdefault(request, []).append({"drafted": drafted.get(request, []), "said": tokens})
        return propose(scheduler_output, sampled, *rest)

    runner.propose_draft_token_ids = watch
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in task["prompts"]],
        SamplingParams(temperature=0.0, max_tokens=task["max_new_tokens"], ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    return {
        "texts": [list(answer.outputs[0].token_ids) for answer in answers],
        "rounds": list(rounds.values()),
        "layers": list(getattr(runner.get_model().model, "aux_hidden_state_layers", ())),
    }


if __name__ == "__main__":
    task, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(main(json.loads(task.read_text()))))
