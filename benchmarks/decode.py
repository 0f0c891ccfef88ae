"""Plain decoding: TransformersEngine against `transformers.generate`, alone and with prompt lookup, prompt by prompt.

One request at a time, greedy, with the same prompts and the same number of new tokens. The three take turns at every
prompt, so that a machine whose speed drifts treats them alike. Both sides include prefill.
"""

from __future__ import annotations

import statistics
import time

import torch
from common import arguments, parse, prompts, write_result

from aurora_rl import LLM, SamplingParams
from aurora_rl.models.loading import default_dtype, encode_chat, load_target


def main() -> None:
    options = parse(arguments(__doc__))
    torch.set_num_threads(options.threads)
    dtype = default_dtype(options.device)
    model, tokenizer = load_target("smollm2", dtype=dtype, device=options.device)
    llm = LLM("smollm2", dtype=dtype, device=options.device, num_slots=1, max_length=1024)
    sampling = SamplingParams(max_tokens=options.max_new_tokens)

    def embedded(prompt: torch.Tensor) -> int:
        (completion,) = llm.generate(prompt, sampling)
        return len(completion.tokens)

    def transformers(prompt: torch.Tensor, **kwargs: int) -> int:
        ids = prompt[None].to(options.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=options.max_new_tokens, **kwargs
        )
        return out.shape[1] - ids.shape[1]

    ways = {
        "transformers_engine": embedded,
        "transformers_generate": transformers,
        "transformers_prompt_lookup": lambda p: transformers(p, prompt_lookup_num_tokens=8),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    ids = [torch.tensor(encode_chat(tokenizer, p.messages)) for p in prompts(options)]
    for way in ways.values():
        way(ids[0])
    for prompt in ids:
        for name, way in ways.items():
            began = time.perf_counter()
            tokens = way(prompt)
            rates[name].append(tokens / (time.perf_counter() - began))
    reference = rates["transformers_generate"]
    write_result(
        __file__,
        options,
        {
            "threads": options.threads,
            "dtype": str(dtype),
            "prompts": len(ids),
            "tokens_per_second_median": {name: statistics.median(r) for name, r in rates.items()},
            "ratio_to_generate_median": {
                name: statistics.median(a / b for a, b in zip(r, reference, strict=True)) for name, r in rates.items()
            },
        },
    )


if __name__ == "__main__":
    main()
