"""Draft trees: from drafting's candidates to what verification reads, and the greedy verdict on them.

A tree of `N` nodes has the last committed token as node 0. SGLang links it by each node's first child
(`next_token`) and next sibling, -1 where there is none. Results are written into tensors that the caller has made.
Some arguments are spelled `retrive_*` because SGLang passes them under those names.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# The value of SGLang's TreeMaskMode that it uses on a CPU: of each tree only its own N x N, without the prefix.
_QLEN_ONLY = 1


def build_tree_kernel_efficient_cpu(
    parent_list: Tensor,
    selected_index: Tensor,
    verified_seq_len: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Link the candidates that were kept, and say which of them see which.

    Drafting expands nodes in turn, the root first, each into `topk` candidates; candidate c thus belongs to
    expansion `c // topk`, and `parent_list[:, e]` is the candidate that expansion e started from.

    Args:
        parent_list: `[b, expansions]`, no columns where only the root was expanded. Column 0 is not read.
        selected_index: `[b, N - 1]` rising ids of the candidates kept, which become nodes 1 to N - 1.
        verified_seq_len: `[b]` tokens before node 0.
        tree_mask: Output, flat `[b, N, N]`: which nodes (columns) a node sees, its ancestors and itself.
        positions: Output, flat `[b, N]`.
        retrive_index: Output, `[b, N]`: row of each node among those of all requests.
        retrive_next_token: Output, `[b, N]`: first child.
        retrive_next_sibling: Output, `[b, N]`: next child of the same parent.
        topk: Candidates for each expansion.
        depth: Steps of drafting; implied by the shapes.
        draft_token_num: N.
        tree_mask_mode: SGLang's QLEN_ONLY; other modes are refused.
    """
    if int(tree_mask_mode) != _QLEN_ONLY:
        raise NotImplementedError(
            f"tree masks of mode {int(tree_mask_mode)}; the CPU stand-in writes {_QLEN_ONLY} only"
        )
    shape = (len(verified_seq_len), draft_token_num)
    trees = [_parents(*lists, topk) for lists in zip(selected_index.tolist(), parent_list.tolist(), strict=True)]
    links = [_links(parents) for parents in trees]
    paths = [_paths(parents) for parents in trees]
    mask = torch.zeros(*shape, draft_token_num, dtype=torch.bool)
    for tree, nodes in enumerate(paths):
        for node, path in enumerate(nodes):
            mask[tree, node, path] = True
    tree_mask.copy_(mask.view(-1))
    depths = torch.tensor([[len(path) - 1 for path in nodes] for nodes in paths])
    positions.copy_((verified_seq_len[:, None] + depths).view(-1))
    retrive_index.copy_(torch.arange(shape[0] * shape[1]).view(shape))
    retrive_next_token.copy_(torch.tensor([children for children, _ in links]))
    retrive_next_sibling.copy_(torch.tensor([siblings for _, siblings in links]))


def _parents(selected: Sequence[int], expanded: Sequence[int], topk: int) -> list[int | None]:
    """Parent of each node; None at the root, and where the parent was not kept.

    The latter happens when scores tie: a child whose probability rounds to 1 scores as much as its parent.
    """
    node_of = {candidate: node for node, candidate in enumerate(selected, start=1)}
    parents: list[int | None] = [None]
    for candidate in selected:
        expansion = candidate // topk
        parents.append(0 if expansion == 0 else node_of.get(expanded[expansion]))
    return parents


def _links(parents: Sequence[int | None]) -> tuple[list[int], list[int]]:
    """First child and next sibling of each node. Nothing leads to a node without parent: it is never accepted."""
    children, siblings = [-1] * len(parents), [-1] * len(parents)
    for node in reversed(range(1, len(parents))):
        if (parent := parents[node]) is not None:
            siblings[node], children[parent] = children[parent], node
    return children, siblings


def _paths(parents: Sequence[int | None]) -> list[list[int]]:
    """The nodes from the root to each node. Parents may stand after their children, as ties can order them so."""

    def path(node: int) -> list[int]:
        if node == 0:
            return [0]
        parent = parents[node]
        return [*path(0 if parent is None else parent), node]

    return [path(node) for node in range(len(parents))]


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Walk each tree from its root along the children that the target would have said itself.

    Args:
        predicts: Output, flat `[b * N]`: at each accepted node's row the target's token after it, the last of which
            is the bonus token. Other rows are left alone.
        accept_index: Output, `[b, longest path]`: rows of the accepted nodes, the root first; the rest is left alone.
        accept_token_num: Output, `[b]`: drafts accepted, the root not counted.
        candidates: `[b, N]` tokens of the nodes.
        retrive_index: `[b, N]` row of each node.
        retrive_next_token: `[b, N]` first child.
        retrive_next_sibling: `[b, N]` next sibling.
        target_predict: `[b, N]` the target's most likely token after each node.
    """
    lists = (candidates, retrive_index, retrive_next_token, retrive_next_sibling, target_predict)
    trees = zip(*(tensor.tolist() for tensor in lists), strict=True)
    for tree, (tokens, row, child, sibling, wanted) in enumerate(trees):
        path = [0]
        while len(path) < accept_index.shape[1]:
            node = child[path[-1]]
            while node != -1 and tokens[node] != wanted[path[-1]]:
                node = sibling[node]
            if node == -1:
                break
            path.append(node)
        rows = torch.tensor([row[node] for node in path])
        accept_index[tree, : len(path)] = rows.to(accept_index.dtype)
        predicts[rows] = torch.tensor([wanted[node] for node in path], dtype=predicts.dtype)
        accept_token_num[tree] = len(path) - 1


def fill_bonus_tokens_cpu(accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, accept_stride: int) -> None:
    """Pick each request's last accepted token out of its `accept_stride` places; `accept_lens` count the bonus."""
    last = accept_stride * torch.arange(len(accept_lens)) + accept_lens - 1
    bonus_tokens.copy_(accept_tokens.view(-1)[last])


def fill_accept_out_cache_loc_cpu(accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor) -> None:
    """Join the slots of all accepted nodes, in order, at the beginning of `accept_out_cache_loc`; -1 is no node."""
    accepted = accept_index[accept_index >= 0]
    accept_out_cache_loc[: len(accepted)] = out_cache_loc[accepted]
