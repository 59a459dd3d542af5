"""``trace-ray score`` against plain peft, transformers and autograd, and on bad files."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.models.adapters import META, write_meta
from trace_ray.models.references import model_digest
from trace_ray.testing import tiny_adapter, tiny_model

BETA, GAMMA = 0.3, 2.0
WORDS = ["reset", "billing", "shared folder", "invoice", "export", "login"]
TRIAGED = [
    {
        "pair_id": f"row-{i}",
        "prompt": word if i % 2 else [{"role": "user", "content": word}],
        "chosen": f"Sure, {word} now",
        "rejected": f"No {word} for you",
        "category": ("invert", "punish", "INVERT", "retain")[i % 4],
    }
    for i, word in enumerate(WORDS)
]
GOLD = [
    {"prompt": word, "chosen": f"Please ask about {word}", "rejected": f"Just {word}"}
    for word in ("refund", "sync", "draft")
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "triaged.jsonl", TRIAGED)
    write(tmp_path / "gold.jsonl", GOLD)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def score(base, files, *more, adapter=None):
    words = ["score", "--model", base, "--triaged", files / "triaged.jsonl"]
    words += ["--gold", files / "gold.jsonl", "--out", files / "scores.jsonl"]
    words += ["--beta", BETA, "--gamma", GAMMA, "--seed", 3]
    words += ["--lora-targets", "q_proj,v_proj", "--lora-r", 8, "--lora-alpha", 8]
    if adapter is not None:
        words += ["--adapter", adapter]
    return CliRunner().invoke(app, [*map(str, words), *map(str, more)])


def scores(files):
    return [json.loads(line) for line in (files / "scores.jsonl").read_text().splitlines()]


def independent(base, adapter):
    """Raw scores by a backward pass per loss: peft, transformers and torch alone."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    if adapter is None:
        shape = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(model, shape)
    else:
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.eval()
    trained = [p for p in model.parameters() if p.requires_grad]

    def logp(prompt, response):
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        head = tokenizer(text, add_special_tokens=False).input_ids
        tail = tokenizer(response + "<|im_end|>", add_special_tokens=False).input_ids
        logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        return logits.log_softmax(-1)[torch.arange(len(tail)), torch.tensor(tail)].sum()

    def ratio(row, side):
        value = logp(row["prompt"], row[side])
        return value - value.detach()  # the reference is the model itself

    def grad(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]).double()

    def dpo(margin):
        return -F.logsigmoid(BETA * margin)

    direction = grad(sum(dpo(ratio(g, "chosen") - ratio(g, "rejected")) for g in GOLD) / len(GOLD))
    found = {}
    for row in TRIAGED:
        r_w, r_l = ratio(row, "chosen"), ratio(row, "rejected")
        if row["category"].lower() == "invert":
            loss = dpo(r_l - r_w)
        elif row["category"] == "punish":
            loss = -F.logsigmoid(-BETA * r_w) - F.logsigmoid(-BETA * r_l)
        else:
            continue
        found[row["pair_id"]] = float(direction @ grad(loss)) / GAMMA
    return found


@pytest.mark.parametrize("deployed", [False, True], ids=["fresh", "deployed"])
def test_scores_are_those_of_an_independent_computation(base, files, deployed):
    import ray

    adapter = tiny_adapter(files / "adapter", base, seed=1) if deployed else None
    expected = independent(base, adapter)
    for method, bound in (("jvp", 1e-4), ("ghost", 1e-4), ("auto", 1e-4), ("fd", 5e-3)):
        done = score(base, files, "--method", method, adapter=adapter)
        assert done.exit_code == 0, done.output
        got = scores(files)
        assert [row["pair_id"] for row in got] == list(expected)  # the order of the file
        a = torch.tensor([row["raw_score"] for row in got])
        b = torch.tensor(list(expected.values()))
        assert float((a - b).norm() / b.norm()) <= bound, method
        clamped = a.clamp(min=0)
        weights = torch.tensor([row["weight"] for row in got])
        torch.testing.assert_close(weights, clamped / clamped.mean(), rtol=1e-4, atol=1e-6)
    assert "5 scores" in done.output
    assert "1 retain rows have no score" in done.output
    # alpha 16 of the adapter against 8 asked for: said, and the adapter's is used.
    assert ("has its own shape (r 8, alpha 16" in done.output) == deployed
    assert not ray.is_initialized()


def test_l1_weights_sum_to_1_and_adam_changes_the_scores(base, files):
    assert score(base, files).exit_code == 0
    plain = scores(files)
    assert score(base, files, "--weights", "l1", "--preconditioner", "adam").exit_code == 0
    adam = scores(files)
    assert sum(row["weight"] for row in adam) == pytest.approx(1)
    assert [row["raw_score"] for row in adam] != [row["raw_score"] for row in plain]


def test_all_linear_is_every_linear_layer(base, files):
    layers = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    assert score(base, files, "--lora-targets", layers).exit_code == 0
    named = scores(files)
    done = score(base, files, "--lora-targets", "all-linear")
    assert done.exit_code == 0, done.output
    assert scores(files) == named


def test_all_scores_clamped_gives_uniform_weights_and_says_so(base, files):
    assert score(base, files).exit_code == 0
    worst = min(scores(files), key=lambda row: row["raw_score"])
    assert worst["raw_score"] < 0
    write(files / "triaged.jsonl", [r for r in TRIAGED if r["pair_id"] == worst["pair_id"]])
    done = score(base, files)
    assert done.exit_code == 0
    assert scores(files)[0]["weight"] == 1
    assert "uniform fallback" in done.output


def test_no_conflicts_is_not_an_error(base, files):
    write(files / "triaged.jsonl", [row for row in TRIAGED if row["category"] == "retain"])
    done = score(base, files)
    assert done.exit_code == 0
    assert "0 scores" in done.output
    assert scores(files) == []


def test_cut_responses_are_counted(base, files):
    rows = [TRIAGED[0], {**TRIAGED[1], "chosen": "far too long " * 20}]
    write(files / "triaged.jsonl", rows)
    done = score(base, files, "--max-length", 96)
    assert done.exit_code == 0, done.output
    assert "1 responses cut to --max-length 96" in done.output
    assert all(math.isfinite(row["raw_score"]) for row in scores(files))


def test_a_response_whose_prompt_is_cut_for_the_other_ones_sake_is_counted(base, files):
    row = {**TRIAGED[0], "prompt": "a longer question " * 3, "chosen": "far too long " * 20}
    write(files / "triaged.jsonl", [row])
    assert "1 responses cut" in score(base, files, "--max-length", 192).output
    assert "2 responses cut to --max-length 96" in score(base, files, "--max-length", 96).output


def cut_alike(row):
    return row | {side: "far too long " * 20 + side for side in ("chosen", "rejected")}


def test_conflicts_whose_sides_are_cut_alike_are_counted(base, files):
    write(files / "triaged.jsonl", [cut_alike(TRIAGED[0]), TRIAGED[1], cut_alike(TRIAGED[2])])
    done = score(base, files, "--max-length", 96)
    assert done.exit_code == 0, done.output
    assert "of 2 conflicts both sides are the same tokens within --max-length 96" in done.output
    assert scores(files)[0]["raw_score"] == 0
    assert "both sides" not in score(base, files).output


@pytest.mark.parametrize("packs", [True, False])
def test_gold_pairs_that_are_all_cut_alike_are_refused(base, files, monkeypatch, packs):
    monkeypatch.setattr("trace_ray.models.scorer.can_pack", lambda *_: packs)
    write(files / "gold.jsonl", [cut_alike(row) for row in GOLD])
    done = score(base, files, "--max-length", 96)
    assert done.exit_code == 2
    assert "the gold batch's gradient is exactly zero" in done.output
    assert "3 of its 3 pairs" in done.output
    assert "--max-length) 96; raise it" in done.output
    assert not (files / "scores.jsonl").exists()
    write(files / "gold.jsonl", [GOLD[0], cut_alike(GOLD[1])])
    assert score(base, files, "--max-length", 96).exit_code == 0


def test_a_gradient_of_zero_is_refused(base, files):
    adapter = tiny_adapter(files / "adapter", base, seed=1)
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path)
    done = score(base, files, adapter=adapter)
    assert done.exit_code == 2
    assert "is exactly zero" in done.output
    assert "the deployed adapter's weights are all zero" in done.output


def test_damaged_weights_are_named_not_scored(base, files):
    adapter = tiny_adapter(files / "adapter", base, seed=1)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if "lora_B" in key)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    done = score(base, files, adapter=adapter)
    assert done.exit_code == 2
    assert "NaN or infinite" in done.output
    assert not (files / "scores.jsonl").exists()


def test_an_adapter_of_another_base_is_refused(base, files):
    adapter = tiny_adapter(files / "adapter", base, seed=1)
    write_meta(adapter, model_digest(base, files / "cache"))
    assert score(base, files, adapter=adapter).exit_code == 0
    # The same shape: only the digest tells.
    other = tiny_model(files / "other", seed=5)
    refused = score(other, files, adapter=adapter)
    assert refused.exit_code == 2
    assert f"{adapter}: was trained on another base than --model {other}" in refused.output
    # Nothing says what it was trained on, and its matrices have other sizes.
    (adapter / META).unlink()
    path = adapter / "adapter_model.safetensors"
    save_file({name: t.repeat(2, 2) for name, t in load_file(path).items()}, path)
    refused = score(base, files, adapter=adapter)
    assert refused.exit_code == 2
    assert f"{adapter}: doesn't fit the base {base}" in refused.output
    assert "size mismatch" in refused.output


BAD_ROWS = [
    ({**TRIAGED[0], "category": "maybe"}, "triaged.jsonl:2: category: must be one of"),
    ({**TRIAGED[0], "chosen": ""}, "triaged.jsonl:2: chosen: is empty"),
    ({**TRIAGED[0], "rejected": None}, "triaged.jsonl:2: rejected: missing"),
    ({**TRIAGED[0], "pair_id": 3}, "triaged.jsonl:2: pair_id: must be text"),
    (TRIAGED[1], "triaged.jsonl: pair_id: 1 ids stand in several rows, e.g. 'row-1'"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_rows_are_named(base, files, row, message):
    write(files / "triaged.jsonl", [TRIAGED[1], row])
    done = score(base, files)
    assert done.exit_code == 2
    assert message in done.output


def test_bad_gold_is_named(base, files):
    write(files / "gold.jsonl", [{"prompt": "a", "chosen": "b"}])
    done = score(base, files)
    assert done.exit_code == 2
    assert "gold.jsonl:1: rejected: missing" in done.output
    write(files / "gold.jsonl", [])
    done = score(base, files)
    assert done.exit_code == 2
    assert "holds no gold pair; put in pairs" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--beta", -1], "trace-ray score: beta"),
        (["--beta", "inf"], "trace-ray score: beta"),
        (["--gamma", "inf"], "trace-ray score: impact.gamma"),
        (["--lora-alpha", "inf"], "trace-ray score: lora.alpha"),
        (["--seed", 2**70], "trace-ray score: seed"),
        (["--seed", -1], "trace-ray score: seed"),
        (["--method", "guess"], "trace-ray score: impact.method"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--model", "nowhere"], "nowhere"),
        (["--max-length", 1025], "--max-length: 1025 tokens are more than"),
        (["--lora-targets", "q_proj,,v_proj"], "(--lora-targets): ''"),
        (["--lora-targets", "q_proj,foo"], "(--lora-targets): 'foo'"),
        (["--lora-targets", ""], "(--lora-targets): ''"),
        (["--out", "nowhere/scores.jsonl"], "nowhere/scores.jsonl: can't be written: there is no"),
    ],
)
def test_bad_options_are_named(base, files, words, message):
    done = score(base, files, *words)
    assert done.exit_code == 2
    assert message in done.output
