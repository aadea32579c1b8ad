"""Our decoder, LoRA and probe against transformers and peft, our evaluator against lm-eval, on random checkpoints."""

import shutil

import pytest
import torch
from benchmark_rows import write_benchmarks
from conftest import edit_json, make_checkpoint, to_old_dialect
from harness import Harness, differences, metric_differences
from hub import run_python, serve
from lm_eval.api.instance import Instance
from peft import LoraConfig, PeftModel, get_peft_model
from test_lora import adapted
from test_sstoken import random_batch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from evaluate import answer, loglikelihoods, prepare, score
from lora import load_adapter, lora_layers, merge, save_adapter
from model import load_model
from paper.benchmarks import TABLE, add_groups, loader, task_names
from sstoken import AttentionProbe
from support.decoding import generate
from support.tokenizer import load_tokenizer


def theirs(folder, dtype=torch.float32, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **settings).eval()


@pytest.fixture(scope="module", params=["new", "old"])
def dialect(request, checkpoint, tmp_path_factory):
    """Each checkpoint in both config dialects, as transformers 5 and 4 write them."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("dialect") / "copy")
    if request.param == "old":
        edit_json(folder / "config.json", to_old_dialect)
    return folder


@torch.no_grad()
def test_logits(dialect):
    ids, _ = random_batch([200, 200])  # beyond the original context of the llama3 rope scaling
    ours, reference = load_model(dialect), theirs(dialect)
    assert (ours.lm_head(ours(ids)) - reference(ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_logits_of_variants(tmp_path):
    ids, _ = random_batch([60])
    default_rope = {"rope_type": "default", "rope_theta": 5e5}
    for name, family, changes in [
        ("biases everywhere", "llama", {"attention_bias": True, "mlp_bias": True}),
        ("untied, default rope", "llama", {"tie_word_embeddings": False, "rope_parameters": default_rope}),
        ("biased qwen3", "qwen3", {"attention_bias": True}),
        ("one key head", "qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ]:  # fmt: skip
        folder = make_checkpoint(tmp_path / family / name, family, **changes)
        ours, reference = load_model(folder), theirs(folder)
        assert (ours.lm_head(ours(ids)) - reference(ids).logits).abs().max() < 1e-4, name


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_theirs(checkpoint):
    ids, _ = random_batch([100])
    exact = theirs(checkpoint)(ids).logits
    ours, reference = load_model(checkpoint, torch.bfloat16), theirs(checkpoint, torch.bfloat16)
    own_error = (ours.lm_head(ours(ids)).float() - exact).abs().mean()
    their_error = (reference(ids).logits.float() - exact).abs().mean()
    assert own_error < 1.2 * their_error


@pytest.mark.parametrize("layer", [0, 1, -1])
@torch.no_grad()
def test_the_probe_equals_the_attention_that_transformers_returns(dialect, layer):
    lengths = [75, 20, 140]
    ids, response = random_batch(lengths)
    ours, reference = load_model(dialect), theirs(dialect)
    probe = AttentionProbe(ours, layer)
    ours(ids)
    scores = probe.scores(response)
    for i, length in enumerate(lengths):
        attention = reference(ids[i : i + 1, :length], output_attentions=True).attentions[layer][0].mean(0)
        expected = attention[:, ~response[i, :length]].sum(1) * response[i, :length]
        assert (scores[i, :length] - expected).abs().max() < 1e-5


@torch.no_grad()
def test_greedy_generation(checkpoint):
    prompts = [[5, 6, 7], list(range(10, 40)), [300]]
    ours, reference = load_model(checkpoint), theirs(checkpoint)
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = []
    for penalty in (1.0, 1.3):
        found = generate(ours, prompts, 40, repetition_penalty=penalty)
        for prompt, new in zip(prompts, found, strict=True):
            expected = reference.generate(torch.tensor([prompt]), repetition_penalty=penalty, **settings)
            assert expected[0, len(prompt) :].tolist() == new
        written.append(found)
    assert written[0] != written[1]


@torch.no_grad()
def test_peft_loads_what_we_save(checkpoint, tmp_path):
    ids, _ = random_batch([50])
    ours = adapted(checkpoint).eval()
    save_adapter(ours, tmp_path)
    reference = PeftModel.from_pretrained(theirs(checkpoint), tmp_path).eval()
    assert (ours.lm_head(ours(ids)) - reference(ids).logits).abs().max() < 1e-4
    with reference.disable_adapter():
        assert (ours.lm_head(ours(ids)) - reference(ids).logits).abs().max() > 1e-2  # the adapter counted


@torch.no_grad()
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear", r".*layers\.1\..*v_proj"])
def test_we_load_what_peft_saves(checkpoint, tmp_path, targets):
    ids, _ = random_batch([50])
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    reference = get_peft_model(theirs(checkpoint), config).eval()
    reference.save_pretrained(tmp_path)
    ours = load_adapter(load_model(checkpoint), tmp_path)
    assert len(lora_layers(ours)) == {"q_proj": 6, "all-linear": 21}.get(
        targets if isinstance(targets, str) else targets[0], 1
    )
    assert (ours.lm_head(ours(ids)) - reference(ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_transformers_loads_what_merge_writes(dialect, tmp_path):
    ids, _ = random_batch([50])
    ours = adapted(dialect).eval()
    expected = ours.lm_head(ours(ids))
    merge(ours, tmp_path)
    assert (theirs(tmp_path)(ids).logits - expected).abs().max() < 1e-4
    text = "Name three primary colours."
    assert (
        AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
        == AutoTokenizer.from_pretrained(dialect)(text).input_ids
    )


def test_the_tokenizer_gives_the_ids_that_transformers_gives(checkpoint, llama):
    text = "Some text with 12 numbers,\n\ttabs and \u00e9\u4e2d\U0001f44d."
    for folder in (checkpoint, llama):
        ours = load_tokenizer(folder)
        assert ours.prefix + ours.encode(text)[0] == PreTrainedTokenizerFast.from_pretrained(folder)(text).input_ids
        assert ours.decode(ours.encode(text)[0]) == text


# ------------------------------------------------------------------------------------------------------- the hub

LOAD = "import sys; from model import load_model; m = load_model(*sys.argv[1].split('@')[:1], "
LOAD += "revision=(sys.argv[1].split('@') + [None])[1]); print(sum(p.double().sum().item() for p in m.parameters()))"


@pytest.mark.slow
def test_models_from_the_hub_token_revision_cache_and_offline(checkpoint, llama, tmp_path):
    total = lambda folder: f"{sum(p.double().sum().item() for p in load_model(folder).parameters())}\n"
    (extra := tmp_path / "main").mkdir()
    shutil.copytree(checkpoint, extra, dirs_exist_ok=True)
    (extra / "original").mkdir()
    (extra / "original" / "consolidated.00.pth").write_bytes(b"large")
    repos = {("model", "who/tiny", "main"): extra, ("model", "who/tiny", "v2"): llama}
    with serve(repos, tmp_path / "cache", token="hf_secret") as (environment, requests):
        refused = run_python(LOAD, "who/tiny", environment)
        assert "UserError: who/tiny is neither a local folder nor available from the hub" in refused.stderr
        with_token = environment | {"HF_TOKEN": "hf_secret"}
        assert run_python(LOAD, "who/tiny", with_token).stdout == total(checkpoint)
        assert not any(path.endswith(".pth") for _, path, _ in requests)
        downloads = [path for method, path, _ in requests if method == "GET" and path.endswith(".safetensors")]
        assert run_python(LOAD, "who/tiny", with_token).stdout == total(checkpoint)
        again = [path for method, path, _ in requests if method == "GET" and path.endswith(".safetensors")]
        assert downloads and again == downloads  # the second time everything is in the cache
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    assert run_python(LOAD, "who/tiny", offline).stdout == total(checkpoint)
    missing = run_python(LOAD, "who/other", offline)
    assert "UserError: who/other" in missing.stderr
    with serve(repos, tmp_path / "cache 2") as (environment, _):
        assert run_python(LOAD, "who/tiny@v2", environment).stdout == total(llama)


# ------------------------------------------------------------------------------------------------ lm-eval's numbers


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder


@pytest.fixture(scope="module", params=["adds BOS", pytest.param("adds no BOS", marks=pytest.mark.slow)])
def both_evaluators(request, questions, tmp_path_factory):
    """The harness and our model, on a checkpoint that reads 512 tokens: many contexts here are longer."""
    folder = make_checkpoint(tmp_path_factory.mktemp("both"), "llama", adds_bos=request.param == "adds BOS")
    return Harness(folder, questions, batch_size=64), load_model(folder), load_tokenizer(folder)


@pytest.mark.parametrize("name", [task for _, task, _ in TABLE])
def test_requests_answers_and_metrics_are_the_harness_s(name, both_evaluators, questions):
    harness, model, tokenizer = both_evaluators
    theirs = harness.run(name)
    asked = {task: prepare(task, loader(task, questions), tokenizer) for task in task_names(name)}
    assert theirs["samples"].keys() == asked.keys()
    answers = answer(model, tokenizer, asked, 1024)
    for task in asked:
        assert not differences(task, asked[task].requests, answers[task], theirs["samples"][task])
    results = score(asked, answers)
    add_groups(results)
    assert not metric_differences(results, theirs["results"])
    assert theirs["results"].keys() >= asked.keys()


def test_limit_counts_per_task_as_the_harness_s(both_evaluators, questions, monkeypatch):
    harness, _, tokenizer = both_evaluators
    for name, nothing in {"loglikelihood": (0.0, False), "generate_until": ""}.items():  # what is asked counts here
        monkeypatch.setattr(harness.lm, name, lambda asked, *_, given=nothing, **__: [given] * len(asked))
    for limit in (1, 3, 0.5):
        theirs = harness.run("agieval", limit)["samples"]
        for task, samples in theirs.items():
            asked = prepare(task, loader(task, questions), tokenizer, limit)
            assert [request for row in asked.requests for request in row][0][0] == samples[0]["arguments"][0][0]
            assert len(asked.rows) == len(samples)


@pytest.mark.slow
def test_an_adapter_is_evaluated_as_the_harness_evaluates_it(llama, questions, tmp_path):
    model = adapted(llama)
    save_adapter(model, tmp_path)
    tokenizer, task = load_tokenizer(llama), "arc_easy"
    asked = prepare(task, loader(task, questions), tokenizer)
    theirs = Harness(llama, questions, adapter=tmp_path).run(task)["samples"][task]
    for who, same in ((model, True), (load_model(llama), False)):
        answers = answer(who, tokenizer, {task: asked}, 1024)[task]
        assert bool(differences(task, asked.requests, answers, theirs)) != same


def test_loglikelihoods_of_pairs_that_copies_get_wrong(both_evaluators):
    harness, model, tokenizer = both_evaluators
    pairs = [
        ("", "no context at all"),
        ("ends in spaces   ", "then goes on"),
        ("ends in a new line\n", " then a space"),
        ("a token across the bound", "ary of both"),
        ("a token across the bound", "ary"),
        ("<|begin_of_text|>spelled out", " by the context"),
        ("a control <|end_of_text|> token", " inside"),
        ("long " * 300, " and cut"),
        ("short", " long" * 60),
        ("日本", "語\U0001f44d"),
    ]
    instances = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    theirs = harness.lm.loglikelihood(instances)
    for batch_tokens in (1, 64, 4096):
        ours = loglikelihoods(model, tokenizer, pairs, batch_tokens)
        for pair, (log_p, greedy), (value, flag) in zip(pairs, ours, theirs, strict=True):
            assert abs(log_p - value) < 1e-3 and greedy == flag, pair
