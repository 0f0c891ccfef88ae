"""Decode prompts with vLLM's engine in this process, and write down what each round drafted and said.

Run by the Python of vLLM's own environment, which has nothing of this library. Arguments: a JSON file that says what
to do, and the one to write.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Read when vLLM is imported.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise threads are bound to the cores that it finds, all of them
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where its rounds can be watched
    "VLLM_NO_USAGE_STATS": "1",
}


def decode(task: dict[str, Any]) -> dict[str, Any]:
    """Texts of the prompts, the rounds of each, and the layers whose states the drafter was given."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    llm = LLM(
        task["target"],
        speculative_config=task["speculative"],
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,  # nothing is compiled, which would take a minute
        async_scheduling=False,  # otherwise the scheduler has placeholders where drafted tokens will be
        distributed_executor_backend="uni",
        skip_tokenizer_init=True,
    )
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    rounds: dict[str, list[dict[str, list[int]]]] = {}
    propose = runner.propose_draft_token_ids

    def watch(scheduled: Any, sampled: Any, *rest: Any) -> Any:
        """Called at the end of each round: with its drafts, and with what was accepted and said of it."""
        for request, tokens in zip(runner.input_batch.req_ids, sampled, strict=True):
            drafted = scheduled.scheduled_spec_decode_tokens.get(request, [])
            said = [int(token) for token in tokens if token >= 0]  # -1 stands for what was rejected
            rounds.setdefault(request, []).append({"drafted": drafted, "said": said})
        return propose(scheduled, sampled, *rest)

    runner.propose_draft_token_ids = watch
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in task["prompts"]],
        SamplingParams(temperature=0.0, max_tokens=task["max_new_tokens"], ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    return {
        "texts": [list(answer.outputs[0].token_ids) for answer in answers],
        "rounds": [rounds[request] for request in sorted(rounds, key=lambda name: int(name.split("-")[0]))],
        "layers": list(runner.get_model().model.aux_hidden_state_layers),
    }


if __name__ == "__main__":
    task, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(decode(json.loads(task.read_text()))))
