"""Models whose attention fused kernels have no argument for are computed as they are."""

import pytest
import torch

from trace_ray.config import ImpactConfig, LoraConfig, TrainingConfig
from trace_ray.core.impact import GoldPair
from trace_ray.core.logprobs import sequence_logps
from trace_ray.models.collate import pad_sequences
from trace_ray.models.packing import pack_exchanges
from trace_ray.models.policy_model import load_measured_model, load_policy_model
from trace_ray.models.scorer import Conflict, Scorer
from trace_ray.models.trainer import response_logits
from trace_ray.testing import tiny_adapter, tiny_model
from trace_ray.types import Category, Message

LORA = LoraConfig(r=8, alpha=16, dropout=0, targets=["q_proj", "v_proj"])
OWN = {
    "gemma2": {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 32, "sliding_window": 512},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 512},
}
EXCHANGES = [
    ([1, 40, 50, 60, 7], [80, 90, 100]),
    ([1, 40, 50, 60, 7], [20, 11]),
    ([1, 9], [30]),
]


@pytest.fixture(scope="module", params=list(OWN))
def base(request, tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tiny_model(tmp_path_factory.mktemp(request.param))  # for its tokenizer and its shape
    llama = AutoConfig.from_pretrained(folder).to_dict()
    shape = {name: llama[name] for name in llama if name.endswith(("_size", "_id", "_range"))}
    shape |= {name: llama[name] for name in ("head_dim", "tie_word_embeddings")}
    shape |= {name: llama[name] for name in llama if name.startswith("num_")}
    config = AutoConfig.for_model(request.param, **shape, **OWN[request.param])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, sinks in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.constant_(sinks, 2.0)
    model.save_pretrained(folder)
    return str(folder)


def logps(model, batch):
    with torch.no_grad():
        logits, at = response_logits(model.eval(), batch)
    return sequence_logps(logits, batch["labels"], batch["mask"], at)


def test_training_and_measuring_compute_the_models_own_attention(base, tmp_path):
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    expected = logps(own, pad_sequences(EXCHANGES))
    trained = load_policy_model(base, None, LORA, seed=0)
    for lay_out in (pack_exchanges, pad_sequences):
        torch.testing.assert_close(logps(trained, lay_out(EXCHANGES)), expected)
    adapter = tiny_adapter(tmp_path, base)
    measured = load_measured_model(base, None, str(adapter))
    with measured.disable_adapter():
        torch.testing.assert_close(logps(measured, pack_exchanges(EXCHANGES)), expected)


@pytest.mark.parametrize("base", ["gemma2"], indirect=True)  # no forward mode through experts
def test_the_engines_agree(base):
    prompt = (Message("user", "May I?"),)
    gold = [GoldPair(prompt, "No.", "Yes, do.", "gold", Category.RETAIN)]
    rows = [
        Conflict("a", prompt, "Yes, go on", "Ask first.", Category.INVERT),
        Conflict("b", prompt, "Sure", "Never!", Category.PUNISH),
    ]
    found = {}
    for method in ("jvp", "ghost", "fd"):
        config = TrainingConfig(lora=LORA, impact=ImpactConfig(method=method))
        scorer = Scorer(base, None, config)
        found[method] = torch.tensor(scorer.raw_scores(rows, scorer.direction(gold)))
    torch.testing.assert_close(found["ghost"], found["jvp"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["fd"], found["jvp"], rtol=5e-3, atol=1e-5)
