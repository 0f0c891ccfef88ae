"""EAGLE-3: one decoder layer over (embedding of a token, feature of the position before it), run once per depth.

Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test"
(arXiv 2503.01840). Parameter names are those of the checkpoints that SGLang and vLLM load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from aurora_rl.policies.attention import KeysValues, TreeAttention
from aurora_rl.policies.drafter import Checkpoint, Drafter, Proposal, TreeShape, Unroll, log_softmax
from aurora_rl.policies.growth import grow
from aurora_rl.policies.recorded import RecordedTrees
from aurora_rl.policies.registry import register_drafter
from aurora_rl.policies.target import TargetParts, check_rope, default_feature_layers, layer_config
from aurora_rl.policies.vllm_format import from_vllm, to_vllm
from aurora_rl.trajectories import pad_rows

# Columns behind the longest context: an `extend` of ragged slots writes its padding there.
_SLACK = 64


class Eagle3Layer(nn.Module):
    """The decoder layer: attention reads [embedding, feature], the residual stream is the feature's."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = TreeAttention(config, input_size=2 * config.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def read(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """What attention reads, ``[b, T, 2H]``."""
        return torch.cat([self.input_layernorm(embedding), self.hidden_norm(hidden)], dim=-1)

    def forward(
        self, x: Tensor, hidden: Tensor, positions: Tensor, spine: KeysValues, mask: Tensor, branch: KeysValues | None
    ) -> Tensor:
        """``x`` from :meth:`read` and the residual ``hidden``, both of ``[b, T]`` positions, to ``[b, T, H]``."""
        hidden = hidden + self.self_attn(x, positions, spine, mask, branch)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


@register_drafter("eagle3")
class Eagle3Drafter(Drafter):
    """EAGLE-3 with its own KV cache at serving and a reduced draft vocabulary.

    Args:
        config: Llama-style configuration of the layer.
        embedding: ``[V, H]``, the target's, shared and frozen.
        draft_vocab: ``[Vd]`` int64, target ids of the draft head's rows.
        feature_layers: the target's layer ids, low to deep.
        fc_norm: whether each layer's feature is normalised before they are joined (EAGLE-3.1).
        norm_output: whether the next depth reads the state behind the final norm, not before it (EAGLE-3.1).

    Example:
        >>> from aurora_rl.testing import tiny_target
        >>> parts = TargetParts.of(tiny_target())
        >>> drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(16))
        >>> drafter.allocate(num_slots=1, max_length=8)
        >>> slot, pair = torch.tensor([0]), torch.zeros(1, 1, parts.config.hidden_size * len(drafter.feature_layers))
        >>> drafter.extend(slot, torch.tensor([[1, 3]]), pair, torch.tensor([1]))
        >>> drafter.propose(slot, TreeShape(depth=2)).tokens.shape
        torch.Size([1, 2])
    """

    formats: ClassVar[tuple[str, ...]] = ("sglang", "vllm", "hf")
    embedding: Tensor

    def __init__(
        self,
        config: LlamaConfig,
        *,
        embedding: Tensor,
        draft_vocab: Tensor,
        feature_layers: tuple[int, ...],
        fc_norm: bool = False,
        norm_output: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.feature_layers, self.vocab_size = config, feature_layers, config.vocab_size
        self.norm_output = norm_output
        self.options = {"fc_norm": fc_norm, "norm_output": norm_output}
        self.fc = nn.Linear(len(feature_layers) * config.hidden_size, config.hidden_size, bias=False)
        norms = (nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in feature_layers)
        self.fc_norm = nn.ModuleList(norms) if fc_norm else None
        self.midlayer = Eagle3Layer(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, len(draft_vocab), bias=False)
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("draft_vocab", draft_vocab.clone(), persistent=False)

    @classmethod
    def from_target(
        cls,
        parts: TargetParts,
        *,
        draft_vocab: Tensor,
        feature_layers: tuple[int, ...] | None = None,
        fc_norm: bool = False,
        norm_output: bool = False,
    ) -> Self:
        """A day-0 drafter in float32 whose weights start from the target's last layer, final norm and head.

        ``fc`` passes the deepest feature on; queries, keys and values read the feature as the last layer read its
        input. Pieces that the target does not have in this form start at random.
        """
        drafter = cls(
            layer_config(parts),
            embedding=parts.embedding.float(),
            draft_vocab=draft_vocab,
            feature_layers=feature_layers or default_feature_layers(parts.config.num_hidden_layers),
            fc_norm=fc_norm,
            norm_output=norm_output,
        )
        drafter._start_from(parts)
        return drafter

    @torch.no_grad()
    def _start_from(self, parts: TargetParts) -> None:
        size = self.config.hidden_size
        nn.init.normal_(self.fc.weight, std=0.02 * size**-0.5)
        self.fc.weight[:, -size:] += torch.eye(size)
        self.lm_head.weight.copy_(parts.head[self.draft_vocab])
        if parts.norm is not None:
            self.norm.weight.copy_(parts.norm)
        own = dict(self.midlayer.named_parameters())
        for name, weight in parts.last_layer.items():
            if name in own and own[name].shape == weight.shape:
                own[name].copy_(weight)
            elif name in own and own[name].shape == (weight.shape[0], 2 * size):
                own[name].zero_()
                own[name][:, size:] = weight
        if "input_layernorm.weight" in parts.last_layer:
            self.midlayer.hidden_norm.weight.copy_(parts.last_layer["input_layernorm.weight"])

    # ---- serving ----------------------------------------------------------------------------------------------------

    def allocate(self, num_slots: int, max_length: int) -> None:
        """See :meth:`Drafter.allocate`."""
        weight, attention = self.fc.weight, self.midlayer.self_attn
        shape = (num_slots, max_length + _SLACK, attention.num_key_heads, attention.head_dim)
        self._cache = (weight.new_zeros(shape), weight.new_zeros(shape))
        self._state = weight.new_zeros(num_slots, self.config.hidden_size)
        self.cached = torch.zeros(num_slots, dtype=torch.int64)

    @torch.inference_mode()
    def extend(self, slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        """See :meth:`Drafter.extend`."""
        tokens = tokens[:, 1:]
        device, width = tokens.device, tokens.shape[1]
        rows = slots.to(device)
        positions = self.cached[slots].to(device)[:, None] + torch.arange(width, device=device)
        hidden = self._fuse(features)
        x = self.midlayer.read(self._embed(tokens), hidden)
        for cache, new in zip(self._cache, self.midlayer.self_attn.keys_values(x, positions), strict=True):
            cache[rows[:, None], positions] = new
        end = int(self.cached[slots].max()) + width
        mask = torch.arange(end, device=device) <= positions[:, :, None]
        out = self.midlayer(x, hidden, positions, self._spine(slots, end), mask, None)
        last = (num_new - 1).to(device)[:, None, None].expand(-1, 1, out.shape[-1])
        self._state[rows] = self._carried(out.gather(1, last)[:, 0])
        self.cached[slots] += num_new

    def _spine(self, slots: Tensor, end: int) -> KeysValues:
        # All slots in order, the usual case, are read through a view.
        everyone = slots.tolist() == list(range(self._cache[0].shape[0]))
        rows = slots.to(self._cache[0].device)
        keys, values = (cache[:, :end] if everyone else cache[rows, :end] for cache in self._cache)
        return keys, values

    def _embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding).to(self.fc.weight.dtype)

    def _fuse(self, features: Tensor) -> Tensor:
        """Features ``[..., F]`` of the target to ``[..., H]``."""
        features = features.to(self.fc.weight.dtype)
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    def _carried(self, hidden: Tensor) -> Tensor:
        """What the next depth and the head read of the layer's output."""
        return self.norm(hidden) if self.norm_output else hidden

    def _read_by_head(self, carried: Tensor) -> Tensor:
        return carried if self.norm_output else self.norm(carried)

    def _log_probs(self, carried: Tensor) -> Tensor:
        return log_softmax(self.lm_head(self._read_by_head(carried)))

    @torch.inference_mode()
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        """See :meth:`Drafter.propose`."""
        rows = slots.to(self._state.device)
        b = len(rows)
        end = int(self.cached[slots].max())
        held = self.cached[slots].to(rows.device)
        spine, spine_mask = self._spine(slots, end), torch.arange(end, device=rows.device) < held[:, None]

        growth = grow(self.draft_vocab, shape, generator)
        branch: KeysValues | None = None
        hidden = self._state[rows, None]
        growth.add(self._log_probs(hidden))
        every = torch.arange(b, device=rows.device)[:, None]
        for depth in range(1, shape.depth):
            tokens, parent = growth.frontier()
            hidden = hidden[every, parent]  # the state that each node of the frontier was drawn from
            positions = (held + depth - 1)[:, None].expand_as(tokens)
            x = self.midlayer.read(self._embed(tokens), hidden)
            own = tuple(part[:, :, None] for part in self.midlayer.self_attn.keys_values(x, positions))
            if branch is not None:
                own = tuple(torch.cat([b[every, parent], o], dim=2) for b, o in zip(branch, own, strict=True))
            branch = (own[0], own[1])
            mask = spine_mask[:, None].expand(-1, tokens.shape[1], -1)
            hidden = self._carried(self.midlayer(x, hidden, positions, spine, mask, branch))
            growth.add(self._log_probs(hidden))
        return growth.proposal()

    # ---- training ---------------------------------------------------------------------------------------------------

    def unroll(self, batch: TensorDictBase, steps: int) -> Unroll:
        """See :meth:`Drafter.unroll`.

        Only keys and values are computed at prompt positions. Query row ``c`` sits at pair ``t = P − 2 + c``, which
        predicts completion token ``c``; at step ``j`` its anchor's pair is ``t − j`` and its feature is the hidden
        state of row ``c − 1`` at step ``j − 1``.
        """
        offset, prompt = batch["spine", "offset"], batch["spine", "prompt_length"]
        count = offset.diff() - prompt
        tokens, hidden, x, spine = self._read_spine(batch)
        pairs, width = tokens.shape[1], int(count.max())
        column = torch.arange(width, device=tokens.device)
        pair = prompt[:, None] - 2 + column
        inside = pair.clamp(0, pairs - 1)
        every = torch.arange(len(offset) - 1, device=tokens.device)[:, None]
        query_tokens = self._embed(tokens[every, inside])
        keep = column < count[:, None]

        logits, states, valid, branch = [], [], [], None
        hidden, x = hidden[every, inside], x[every, inside]
        for step in range(steps):
            if step:
                hidden = _next_row(hidden)
                x = self.midlayer.read(query_tokens, hidden)
                own = tuple(part[:, :, None] for part in self.midlayer.self_attn.keys_values(x, inside))
                if branch is not None:
                    own = tuple(torch.cat([_next_row(b), o], dim=2) for b, o in zip(branch, own, strict=True))
                branch = own
            mask = torch.arange(pairs, device=tokens.device) <= (inside - step)[:, :, None]
            hidden = self._carried(self.midlayer(x, hidden, inside, spine, mask, branch))
            states.append(self._read_by_head(hidden[keep]))
            logits.append(self.lm_head(states[-1]))
            valid.append(((column >= step) & (pair >= step))[keep])
        return Unroll(logits, torch.stack(valid), states)

    def _read_spine(self, batch: TensorDictBase) -> tuple[Tensor, Tensor, Tensor, KeysValues]:
        """Pairs of each request, padded: tokens ``[n, T]``, hidden ``[n, T, H]``, attention input, keys and values."""
        offset = batch["spine", "offset"]
        tokens = pad_rows(batch["spine", "tokens"], offset)[:, 1:]
        rows = torch.arange(len(offset), device=offset.device)
        features = pad_rows(batch["spine", "features"], offset - rows)
        hidden = self._fuse(features)
        x = self.midlayer.read(self._embed(tokens), hidden)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return tokens, hidden, x, self.midlayer.self_attn.keys_values(x, positions)

    def context_logits(self, batch: TensorDictBase, wanted: Tensor) -> Tensor:
        """See :meth:`Drafter.context_logits`. One pass for each depth, over all contexts of that depth in the batch."""
        trees, requests = RecordedTrees.of(batch), len(batch["spine", "offset"]) - 1
        _, hidden, x, spine = self._read_spine(batch)
        every = torch.arange(hidden.shape[1], device=hidden.device)
        place = torch.zeros_like(trees.depth)  # of a context among those of its depth
        states, branch, predicted, order = hidden, None, [], []
        for level in range(int(trees.depth[wanted].max()) + 1 if bool(wanted.any()) else 0):
            here = (trees.depth == level).nonzero().flatten()
            place[here] = torch.arange(len(here), device=here.device)
            request, root = trees.request[here], trees.root[here].clamp(min=0)
            # Contexts side by side by request, to share its spine.
            counts = torch.bincount(request, minlength=requests)
            offset = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            real = torch.arange(int(counts.max()), device=here.device) < counts[:, None]
            position = pad_rows(root + level, offset)
            if level == 0:
                came, read = (pad_rows(part[request, root], offset) for part in (hidden, x))
            else:
                # Each node reads the state that it was drawn from, and sees its ancestors' keys.
                above = place[trees.parent[here - trees.num_rounds]]
                came = pad_rows(states[above], offset)
                read = self.midlayer.read(
                    self._embed(pad_rows(batch["nodes", "tokens"][here - trees.num_rounds], offset)), came
                )
                own = tuple(part[:, :, None] for part in self.midlayer.self_attn.keys_values(read, position))
                if branch is not None:
                    seen = (pad_rows(part[above], offset) for part in branch)
                    own = tuple(torch.cat([s, o], dim=2) for s, o in zip(seen, own, strict=True))
                branch = (own[0][real], own[1][real])
            mask = every <= pad_rows(root, offset)[:, :, None]
            states = self._carried(self.midlayer(read, came, position, spine, mask, own if level else None)[real])
            asked = wanted[here]
            predicted.append(self.lm_head(self._read_by_head(states[asked])))
            order.append(here[asked])
        if not predicted:
            return hidden.new_zeros(0, len(self.draft_vocab))
        return torch.cat(predicted)[torch.cat(order).argsort()]

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def write(self, layout: str) -> Checkpoint:
        """See :meth:`Drafter.write`.

        "sglang" is what ``LlamaForCausalLMEagle3`` loads: ``d2t[i] = target id − i`` are offsets, ``t2d`` marks the
        target tokens that have a row, and the embedding is the target's and left out. SGLang names a captured state by
        the layer that it leaves (it adds 1 to each id and captures what enters that layer), this library by the layer
        that it enters: the ids in the file are one less than ``feature_layers``. "vllm" adds them as vLLM reads them
        (``vllm_format``). "hf" is what the authors of EAGLE-3 publish, which does not say its layers.

        Raises:
            ValueError: the layout cannot say what this drafter is.
        """
        if bool((self.draft_vocab.diff() < 0).any()):
            raise ValueError("the draft vocabulary is not rising, as EAGLE-3's files need it")
        known = torch.zeros(self.vocab_size, dtype=torch.bool)
        known[self.draft_vocab.cpu()] = True
        config: dict[str, Any] = {
            **self.config.to_dict(),
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": len(self.draft_vocab),
            "dtype": str(self.fc.weight.dtype).removeprefix("torch."),
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in self.feature_layers]},
            **{name: True for name, on in self.options.items() if on},
        }
        tensors = {**self.published(), "t2d": known}
        if layout == "vllm":
            return Checkpoint(*to_vllm(tensors, config))
        if layout == "hf":
            theirs = default_feature_layers(self.config.num_target_layers)
            if self.feature_layers != theirs:
                raise ValueError(f"the drafter reads layers {self.feature_layers}, and files in 'hf' are of {theirs}")
            del config["eagle_config"]
        return Checkpoint(tensors, config)

    @classmethod
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        """See :meth:`Drafter.recognizes`; the authors' own files name Llama, and a draft vocabulary."""
        name = (config.get("architectures") or [""])[0]
        return "Eagle3" in name or (name == "LlamaForCausalLM" and "draft_vocab_size" in config)

    @classmethod
    def read(cls, checkpoint: Checkpoint, parts: TargetParts, layout: str, **options: Any) -> Self:
        """See :meth:`Drafter.read`. Embeddings in the file are passed over: the target's are shared.

        Raises:
            ValueError: names the first entry or tensor that does not fit the target or the class.
        """
        if layout == "vllm":
            checkpoint = Checkpoint(*from_vllm(*checkpoint))
        config = checkpoint.config
        tensors = {_our_name(name): tensor for name, tensor in checkpoint.tensors.items()}
        known = tensors.pop("t2d", None)
        tensors.pop("embed_tokens.weight", None)
        for entry in _UNSUPPORTED:
            if config.get(entry) or (config.get("eagle_config") or {}).get(entry):
                raise ValueError(f"config.json: {entry} is set, which this drafter has no form for")
        # Files are often cut to the length of their training; positions are computed here, as far as the target's go.
        longest = parts.config.max_position_embeddings
        own = LlamaConfig.from_dict(
            {**config, "max_position_embeddings": longest, "num_target_layers": parts.config.num_hidden_layers}
        )
        check_rope(own, parts)
        rows = config.get("draft_vocab_size") or own.vocab_size
        if "d2t" not in tensors and rows == own.vocab_size:
            tensors["d2t"] = torch.zeros(rows, dtype=torch.int64)  # every token has a row
        if "d2t" not in tensors:
            raise ValueError(f"tensor 'd2t' is missing, and draft_vocab_size is {rows} of {own.vocab_size} tokens")
        layers = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        drafter = cls(
            own,
            embedding=parts.embedding.float(),
            draft_vocab=torch.arange(len(tensors["d2t"])),
            feature_layers=(
                tuple(layer + 1 for layer in layers)
                if layers
                else default_feature_layers(parts.config.num_hidden_layers)
            ),
            fc_norm=bool(config.get("fc_norm") or config.get("use_aux_norm")),
            norm_output=bool(config.get("norm_output")),
        )
        drafter.install(tensors)
        vocab = drafter.draft_vocab
        if len(falls := (vocab.diff() < 0).nonzero().flatten()):
            row = int(falls[0])
            raise ValueError(
                f"tensor 'd2t' is not rising: row {row} is token {int(vocab[row])}, row {row + 1} token "
                f"{int(vocab[row + 1])}; whoever reads 't2d' in its place would take the rows for other tokens"
            )
        if known is not None and not torch.equal(known.nonzero().flatten(), vocab):
            raise ValueError("tensors 't2d' and 'd2t' name different draft vocabularies")
        return drafter


# Settings of other EAGLE-3 drafters that change what is computed.
_UNSUPPORTED = ("norm_before_fc", "norm_before_residual", "bias", "attention_bias", "mlp_bias")
_OTHER_NAMES = {
    "model.": "",
    "layers.0.": "midlayer.",
    "aux_norm_low": "fc_norm.0",
    "aux_norm_mid": "fc_norm.1",
    "aux_norm_high": "fc_norm.2",
    "draft_id_to_target_id": "d2t",
}


def _our_name(name: str) -> str:
    """A tensor's name here, of those that EAGLE-3 checkpoints use."""
    for other, ours in _OTHER_NAMES.items():
        if name.startswith(other):
            name = ours + name.removeprefix(other)
    return name


def _next_row(x: Tensor) -> Tensor:
    """Rows moved on by one along dim 1, zeros first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
