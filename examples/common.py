"""What the training scripts of this folder share: a recorded stream, and acceptance on its unseen end."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from tensordict import TensorDict
from torchrl.objectives import LossModule

from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import Request, SamplingParams, generation_processors
from aurora_rl.models.loading import default_dtype, encode_chat, load_target, stop_token_ids
from aurora_rl.models.target_head import TargetHead
from aurora_rl.policies import Drafter, Eagle3Drafter, TargetParts, TreeShape, choose_draft_vocab, token_prior
from aurora_rl.policies.formats.files import holds_drafter
from aurora_rl.serving.recorded_requests import record_requests
from aurora_rl.training.gate import replay
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.steps import train_on
from aurora_rl.workload.traffic import generate_traffic


def arguments(description: str | None, *, saves: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the options of every script. ``saves`` adds those of the folder for the trained drafter."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub id, or a folder")
    parser.add_argument("--recording", type=Path, required=True, help="folder of trajectories; filled if it is empty")
    parser.add_argument("--requests", type=int, default=120, help="of the recording; the last fifth is held out")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.set_defaults(out=None)
    if saves:
        parser.add_argument("--out", type=Path, default=Path("drafter"), help="folder of the trained drafter")
        parser.add_argument("--overwrite", action="store_true", help="replace the drafter that --out holds")
    return parser


@dataclass
class Stream:
    """A recorded stream and what learns from it."""

    drafter: Drafter
    head: TargetHead
    shape: TreeShape
    train: list[TensorDict]
    held_out: list[TensorDict]

    def acceptance(self) -> float:
        """Tokens per round that the drafter would have had on the held-out requests, drafting its likeliest nodes."""
        shape = TreeShape(self.shape.depth)
        dtype = self.held_out[0]["sequence", "features"].dtype
        return replay(self.drafter.serving_copy(dtype), self.held_out, shape).acceptance_length

    def learn(self, loss: LossModule) -> None:
        """Learn from the first part, and say what it did for the rest."""
        print(f"before: acceptance length {self.acceptance():.2f} on {len(self.held_out)} unseen requests", flush=True)
        optimizers = drafter_optimizers(self.drafter)
        autocast = self.held_out[0]["sequence", "features"].dtype == torch.bfloat16
        for seen, value, out in train_on(self.train, loss, optimizers, replay=4, autocast=autocast):
            figures = {k: round(float(v.mean()), 3) for k, v in out.items() if not k.startswith("loss_")}
            print(f"{seen} requests: loss {value:.3f} {figures}", flush=True)
        print(f"after: acceptance length {self.acceptance():.2f}")

    def save(self, folder: Path) -> None:
        """Write the drafter as engines read it."""
        self.drafter.save_pretrained(folder)
        print(f"written to {folder}")


def open_stream(
    options: argparse.Namespace, shape: TreeShape, kind: type[Drafter] = Eagle3Drafter, *, temperature: float = 0.0
) -> Stream:
    """Open the recording that the options name. If it lacks requests, an untrained drafter serves them first."""
    if options.out is not None and not options.overwrite and holds_drafter(options.out):
        raise SystemExit(f"--out {options.out} holds a drafter already; name another folder, or add --overwrite")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_target(options.model, dtype=default_dtype(device), device=device)
    parts = TargetParts.of(model)
    prompts = [encode_chat(tokenizer, p.messages) for p in generate_traffic(options.requests)]
    vocab = choose_draft_vocab(min(4096, len(parts.head)), token_prior(model, prompts[:32]))
    torch.manual_seed(0)
    drafter = kind.from_target(parts, draft_vocab=vocab).to(device)
    requests = [
        Request(i, torch.tensor(p), SamplingParams(temperature, seed=i, max_tokens=options.max_new_tokens))
        for i, p in enumerate(prompts)
    ]
    recording = TrajectoryDataset(options.recording, drafter.feature_layers)
    stop_tokens = stop_token_ids(model, tokenizer)
    processors = generation_processors(model, stop_tokens)
    record_requests(model, drafter, requests, recording, shape=shape, stop_tokens=stop_tokens, processors=processors)
    stream, held_out = list(recording), max(len(recording) // 5, 1)
    return Stream(drafter, parts.head.float(), shape, stream[:-held_out], stream[-held_out:])
