import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_ray.core import logprobs
from trace_ray.models import attention
from trace_ray.models.attention import BLOCKWISE, attention_blocks
from trace_ray.models.collate import BucketSampler, pad_sequences
from trace_ray.models.packing import build_trie, pack_exchanges
from trace_ray.models.trainer import response_logits
from trace_ray.testing import tiny_model

LAYOUTS = (pack_exchanges, pad_sequences)
TOKENS = st.lists(st.integers(10, 14), min_size=1, max_size=6)


@pytest.fixture(
    scope="module",
    params=[(f, a) for f in ("llama", "qwen2", "gemma3_text") for a in (BLOCKWISE, "sdpa")],
    ids="-".join,
)
def model(request, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    family, attention = request.param
    folder = tiny_model(tmp_path_factory.mktemp(family), family)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation=attention
    ).eval()


def _logps(model, batch):
    logits, at = response_logits(model, batch)
    return logprobs.sequence_logps(logits, batch["labels"], batch["mask"], at)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=5))
def test_packed_equals_padded(model, exchanges):
    with torch.no_grad():
        packed, padded = (_logps(model, lay_out(exchanges)) for lay_out in LAYOUTS)
    torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kept", [0, attention.KEPT], ids=["computed again", "kept"])
def test_packed_gradients_equal_padded_ones(model, kept, monkeypatch):
    monkeypatch.setattr(attention, "KEPT", kept)
    exchanges = [([1, 11, 12], [13, 14]), ([1, 11, 12], [15, 16, 17]), ([1, 11, 16], [17])]
    weights = [p for name, p in model.named_parameters() if "_proj" in name]
    found = [
        torch.autograd.grad(_logps(model, lay_out(exchanges)).square().sum(), weights)
        for lay_out in LAYOUTS
    ]
    # The models' norms work in float32 whatever the weights are.
    for packed, padded in zip(*found, strict=True):
        assert float((packed - padded).norm() / padded.norm()) < 1e-5


@given(st.lists(TOKENS, min_size=1, max_size=8))
def test_a_trie_holds_each_prefix_once(sequences):
    trie = build_trie(sequences)
    prefixes = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert trie.input_ids.shape[1] == len(prefixes)
    for sequence, path in zip(sequences, trie.paths, strict=True):
        assert trie.input_ids[0, path].tolist() == sequence
        assert trie.position_ids[0, path].tolist() == list(range(len(sequence)))
        visible = (trie.attention_mask[0, 0, path[-1]] == 0).nonzero().squeeze(1).tolist()
        assert visible == sorted(path)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 5))
def test_sampler_gives_each_row_once_and_depends_on_seed_and_epoch_alone(lengths, size, epoch):
    sampler = BucketSampler(lengths, size, seed=3)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    again = BucketSampler(lengths, size, seed=3)
    again.set_epoch(epoch)
    assert list(again) == order


def test_blocks_cover_the_row_and_see_all_that_a_token_may_see():
    batch = pack_exchanges([([1, 2, 3], [4, 5]), ([1, 2, 6], [7]), ([1, 2, 3], [4, 8])])
    mask = batch["attention_mask"]
    blocks = attention_blocks(mask, batch["bounds"])
    # [1 2 3 4 5 8] [6 7]: the second prompt's block sees 1 and 2 of the first.
    assert [(block.start, block.end) for block in blocks] == [(0, 6), (6, 8)]
    assert [block.outer.tolist() for block in blocks] == [[], [0, 1]]
    for block in blocks:
        rows = mask[0, 0, block.start : block.end]
        assert (rows == 0).sum() == (block.mask == 0).sum()
