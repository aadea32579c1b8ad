"""Requests that begin alike as trees, and trees in batches."""

import random

import pytest
import torch

from support.files import UserError
from support.packing import Scored, Tree, encode_pairs, pack, plant, shared_prefix, tree_tensors
from support.tokenizer import load_tokenizer


def test_a_tree_by_hand():
    requests = [Scored([9, 1, 2, 3, 4], [4, 5]), Scored([9, 1, 2, 6], [7]), Scored([9, 1, 2, 6], [8])]
    (tree,) = plant(requests, prefix=1, ratio=100)
    assert tree.ids == [1, 2, 3, 4, 6] and tree.parents == [-1, 0, 1, 2, 1]
    assert tree.scored == {0: [2, 3], 1: [4], 2: [4]}
    ids, positions, mask = tree_tensors([tree], 1, "cpu")
    assert ids.tolist() == [[1, 2, 3, 4, 6]] and positions.tolist() == [[1, 2, 3, 4, 3]]
    assert mask[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]


def test_without_a_prefix_a_token_sees_its_own_request_up_to_itself():
    requests = [Scored([1, 2, 3, 4, 5], [0]), Scored([1, 2, 6, 7], [0]), Scored([1, 2, 6, 8], [0])]
    (tree,), (short,) = plant(requests, 0, ratio=100), plant([Scored([9, 9], [0])], 0, ratio=100)
    ids, positions, mask = tree_tensors([tree, short], 0, "cpu")
    assert ids[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and positions[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 3]
    seen = torch.ones(8, 8).tril().bool()  # what is not in the mask is causal
    seen[-mask.shape[2] :] = mask[0, 0]
    assert [row.nonzero().flatten().tolist() for row in seen[5:]] == [[0, 1, 5], [0, 1, 5, 6], [0, 1, 5, 7]]
    assert torch.equal(seen[:5], torch.ones(5, 8).tril().bool())
    assert tree_tensors([short], 0, "cpu")[2].shape == (1, 1, 1, 2)  # of a chain, the last token alone


def test_a_continuation_may_have_as_many_tokens_as_the_model_reads(llama):
    tokenizer, pairs = load_tokenizer(llama), [("A context", " and what goes on")]
    ((inputs, targets),) = encode_pairs(tokenizer, pairs, 100)
    ((cut, same),) = encode_pairs(tokenizer, pairs, len(targets))
    assert same == targets and cut == inputs[-len(targets) :]
    with pytest.raises(UserError, match=f"a continuation of {len(targets)} tokens cannot be scored"):
        encode_pairs(tokenizer, pairs, len(targets) - 1)


def test_what_is_scored_in_one_request_is_in_no_shared_prefix():
    requests = [Scored([1, 2, 3, 4], [5]), Scored([1, 2, 3], [3, 4]), Scored([1, 2, 3, 6], [7])]
    assert shared_prefix(requests) == [1] and shared_prefix(requests[::2]) == [1, 2, 3]


def test_requests_share_a_tree_where_that_is_cheaper():
    alike = [Scored([*range(50), i], [0]) for i in range(100, 104)]
    other = Scored([*range(200, 250)], [0])
    trees = plant([*alike, other], 0, ratio=100)
    assert [len(tree.ids) for tree in trees] == [54, 50]
    halves = [Scored([*range(10), *range(n, n + 40)], [0]) for n in (100, 200)]
    assert [len(plant(halves, 0, ratio)) for ratio in (0, 1000)] == [2, 1]  # 90^2 > 2 * 50^2, 90 * 1090 < 100 * 1050


def test_batches_hold_every_tree_once_and_no_more_tokens_than_allowed():
    rng = random.Random(0)
    trees = plant([Scored([rng.randrange(1000) for _ in range(rng.randint(1, 90))], [0]) for _ in range(40)], 0, 0)
    for limit in (1, 100, 1000):
        batches = pack(trees, limit, torch.device("cpu"))
        assert sorted(map(id, sum(batches, []))) == sorted(map(id, trees))
        assert all(len(batch) == 1 or len(batch) * max(len(t.ids) for t in batch) <= limit for batch in batches)


def test_batches_are_cut_where_a_pass_costs_less_than_its_padding():
    trees = [Tree() for _ in range(3)]
    for number, (tree, length) in enumerate(zip(trees, (10, 300, 12), strict=True)):
        tree.add(number, list(range(length)), 1)
    lengths = {
        name: [[len(t.ids) for t in b] for b in pack(trees, 1024, torch.device(name))] for name in ("cpu", "cuda")
    }
    assert lengths["cpu"] == [[300], [12, 10]]  # a pass and 2 tokens of padding: 192 + 2, against 578 of padding
    assert lengths["cuda"] == [[300, 12, 10]]  # where a pass costs 1,024 tokens
