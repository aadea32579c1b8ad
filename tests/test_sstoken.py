"""Every equation of the paper against a naive float64 loop or a case worked by hand, and the probe."""

import copy
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from hypothesis import assume, given, settings, strategies
from memory import peak_allocated
from torch.utils.checkpoint import checkpoint as recompute

from lora import add_lora, lora_layers
from model import apply_rope, rope_table
from paper.objectives import probability_gain
from sstoken import (
    AttentionProbe,
    attention_score,
    ema_update,
    excess_loss,
    normalize,
    retrospective_excess_loss,
    score,
    select,
    selected_loss,
    sft_loss,
    share_of,
)


def random_losses(n=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator) * 8, torch.rand(n, generator=generator) * 8


def test_eq_01_sft_loss_is_the_mean_over_supervised_tokens():
    probabilities = [0.5, 0.25, 0.125]  # -log p: log 2, 2 log 2, 3 log 2; their mean is 2 log 2
    nll = torch.tensor([-math.log(p) for p in probabilities])
    assert sft_loss(nll).item() == pytest.approx(2 * math.log(2))


def test_eq_02_excess_loss_is_the_log_ratio_of_reference_to_current():
    p_current, p_reference = 0.2, 0.6
    el = excess_loss(torch.tensor([-math.log(p_current)]), torch.tensor([-math.log(p_reference)]))
    assert el.item() == pytest.approx(math.log(p_reference / p_current))


def test_eq_03_rel_is_the_log_ratio_of_current_to_history():
    p_current, p_history = 0.6, 0.2
    rel = retrospective_excess_loss(torch.tensor([-math.log(p_current)]), torch.tensor([-math.log(p_history)]))
    assert rel.item() == pytest.approx(math.log(p_current / p_history))


def test_eq_04_ema_in_place_against_the_closed_form():
    alpha, steps = 0.9, 20
    history = [torch.full((3,), 2.0), torch.full((2, 2), -1.0)]
    kept = list(history)
    for _ in range(steps):
        ema_update(history, [torch.full((3,), 5.0), torch.full((2, 2), 1.0)], alpha)
    assert all(a is b for a, b in zip(history, kept, strict=True))
    left = alpha**steps  # theta_his^t = alpha^t theta^0 + (1 - alpha^t) theta for a constant theta
    assert torch.allclose(history[0], torch.tensor(left * 2.0 + (1 - left) * 5.0))
    assert torch.allclose(history[1], torch.tensor(left * -1.0 + (1 - left) * 1.0))


def naive_attention_score(q, k, response):
    """Eqs. 5-7 written out, one head, one query and one key at a time, in Python's own floats."""
    q, k, length = q.double().tolist(), k.double().tolist(), len(response)
    scores = []
    for i in range(length):
        if not response[i]:
            continue
        total = 0.0
        for h in range(len(q)):
            keys = k[h * len(k) // len(q)]  # consecutive query heads share a key head
            logits = [sum(a * b for a, b in zip(q[h][i], keys[j], strict=True)) for j in range(i + 1)]  # causal
            weights = [math.exp(x / math.sqrt(len(q[h][i]))) for x in logits]
            total += sum(w for j, w in enumerate(weights) if not response[j]) / sum(weights)
        scores.append(total / len(q))
    return torch.tensor(scores)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_eq_05_06_07_attention_score_against_a_naive_loop(heads, kv_heads):
    generator = torch.Generator().manual_seed(heads)
    q = torch.randn(heads, 70, 8, generator=generator)
    k = torch.randn(kv_heads, 70, 8, generator=generator)
    response = torch.zeros(70, dtype=torch.bool)
    response[10:20] = response[25:67] = True  # two turns; the second is longer than one chunk of queries
    result = attention_score(q, k, response)
    assert result.dtype == torch.float32 and result.shape == (52,)
    assert (result - naive_attention_score(q, k, response)).abs().max() < 1e-6
    with_bf16 = attention_score(q.bfloat16(), k.bfloat16(), response)
    assert with_bf16.dtype == torch.float32 and with_bf16.min() >= 0 and with_bf16.max() <= 1


def test_eq_07_equals_sdpa_with_the_prompts_indicator_as_the_values():
    q, k = torch.randn(6, 40, 16), torch.randn(2, 40, 16)
    response = torch.rand(40) < 0.6
    response[0] = False
    indicator = (~response).float()[None, :, None].expand(2, 40, 1)
    attended = F.scaled_dot_product_attention(q[None], k[None], indicator[None], is_causal=True, enable_gqa=True)
    assert (attention_score(q, k, response) - attended[0].mean(0)[response, 0]).abs().max() < 1e-6


def test_eq_07_never_passes_one_by_rounding():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1200, 4), torch.randn(1, 1200, 4)
    q[..., 0], k[..., 0] = 1, torch.where(torch.arange(1200) < 1000, 0, -1000)  # the response gets no attention
    result = attention_score(q, k, torch.arange(1200) >= 1000)
    assert result.max() == 1 and result.min() > 1 - 1e-6


@pytest.mark.parametrize("scale", [0.1, 3, 100])
def test_eq_07_of_bfloat16_lies_within_0_and_1(scale):
    torch.manual_seed(0)
    q, k = (scale * torch.randn(heads, 300, 16) for heads in (6, 2))
    response = torch.arange(300) % 90 > 50
    result = attention_score(q.bfloat16(), k.bfloat16(), response)
    assert result.dtype == torch.float32 and result.min() >= 0 and result.max() <= 1
    assert torch.equal(result, attention_score(q.bfloat16().float(), k.bfloat16().float(), response))


def test_eq_07_of_identical_tokens_is_the_prompt_s_share_of_what_is_visible():
    response = torch.arange(64) >= 20
    q, k = torch.ones(4, 64, 8), torch.ones(2, 64, 8)
    assert torch.allclose(attention_score(q, k, response), 20 / torch.arange(21.0, 65))


def test_eq_07_hand_worked():
    # One head, d = 1, q = 0: every visible key gets the same weight, so the score is the prompt's share of them.
    response = torch.tensor([False, False, True, True, False, True])
    result = attention_score(torch.zeros(1, 6, 1), torch.randn(1, 6, 1), response)
    assert torch.allclose(result, torch.tensor([2 / 3, 2 / 4, 3 / 6]))
    everything = torch.ones(3, dtype=torch.bool)  # no prompt at all
    assert attention_score(torch.zeros(1, 3, 1), torch.randn(1, 3, 1), everything).tolist() == [0, 0, 0]


def test_eq_08_normalize():
    assert normalize(torch.tensor([-3.0, 1.0, 5.0, -1.0])).tolist() == [0.0, 0.5, 1.0, 0.25]
    assert normalize(torch.full((4,), 0.7)).tolist() == [0, 0, 0, 0]
    assert normalize(torch.tensor([2.0])).tolist() == [0]


def test_eq_09_score():
    rel, attention = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0.8, 0.4, 0.0])
    assert torch.allclose(score(rel, attention, 0.25), torch.tensor([0.6, 0.55, 0.125]))
    assert torch.equal(score(rel, attention, 1.0), rel)
    assert torch.equal(score(rel, attention, 0.0), attention)


def test_eq_10_loss_over_selected_tokens_and_its_gradient():
    nll = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    loss = selected_loss(nll, torch.tensor([True, False, True]))
    loss.backward()
    assert loss.item() == 3.5
    assert nll.grad.tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize("rho, n, k", [(0.1, 30, 3), (0.55, 100, 55), (0.6, 5, 3), (0.6, 1, 1), (0.6, 4, 3), (1, 7, 7)])
def test_eq_11_select_takes_exactly_the_top_share(rho, n, k):
    values = random_losses(n)[0]
    selected = select(values, rho)
    assert selected.dtype == torch.bool and int(selected.sum()) == k == share_of(rho, n)
    assert k == n or values[selected].min() > values[~selected].max()


def test_eq_11_ties_go_to_the_lowest_index_and_one_token_is_always_selected():
    assert select(torch.zeros(5), 0.6).tolist() == [True, True, True, False, False]
    assert select(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]), 0.6).tolist() == [True, True, False, True, False]
    assert select(torch.zeros(4000), 0.6).tolist() == [True] * 2400 + [False] * 1600
    assert select(torch.tensor([0.1, 0.9]), 0.001).tolist() == [False, True]
    for rho in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match="rho"):
            select(torch.zeros(3), rho)


# ------------------------------------------------------------------- what holds for any numbers that Eqs. 3-11 get

NUMBERS = strategies.integers(0, 2**12).map(lambda n: n / 64)
RHOS = strategies.decimals("0.01", 1, places=2).map(float)
GAMMAS = strategies.floats(0, 1)


@strategies.composite
def samples(draw):
    """Losses of a sample's tokens, those of its history model, and the attention that they pay.

    Binary fractions that float32 adds and subtracts exactly, so that what ought to be equal is equal, of so many
    values that few or many are.
    """
    n, values = draw(strategies.integers(1, 40)), 2 ** draw(strategies.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(strategies.integers(0, 2**32 - 1)))
    losses, history, attention = torch.randint(values, (3, n), generator=generator)
    return losses / 64, history / 64, attention / values


def select_by_algorithm_1(losses, history, attention, gamma, rho):
    return select(score(normalize(retrospective_excess_loss(losses, history)), attention, gamma), rho)


def holds_for_any(**arguments):
    return lambda test: settings(deadline=None, derandomize=True, max_examples=200)(given(**arguments)(test))


@holds_for_any(sample=samples(), gamma=GAMMAS, rho=RHOS, seed=strategies.integers(0, 2**32))
def test_permuting_the_tokens_permutes_the_selection(sample, gamma, rho, seed):
    losses, history, attention = sample
    scores = score(normalize(history - losses), attention, gamma)
    assume(len(scores.unique()) == len(scores))  # ties go to the first
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(seed))
    permuted = select_by_algorithm_1(losses[order], history[order], attention[order], gamma, rho)
    assert torch.equal(permuted, select_by_algorithm_1(*sample, gamma, rho)[order])


@holds_for_any(sample=samples(), gamma=GAMMAS, rho=RHOS, constant=NUMBERS)
def test_adding_a_constant_to_all_losses_changes_nothing(sample, gamma, rho, constant):
    losses, history, attention = sample
    expected = select_by_algorithm_1(*sample, gamma, rho)
    assert torch.equal(select_by_algorithm_1(losses + constant, history + constant, attention, gamma, rho), expected)
    # nor does one that is added to either model's, since Eq. 8 takes the least of them off
    assert torch.equal(select_by_algorithm_1(losses + constant, history, attention, gamma, rho), expected)
    assert torch.equal(select_by_algorithm_1(losses, history + constant, attention, gamma, rho), expected)


@holds_for_any(sample=samples(), rho=RHOS)
def test_gamma_0_is_attention_alone_and_gamma_1_is_rel_alone(sample, rho):
    losses, history, attention = sample
    count = math.ceil(Fraction(str(rho)) * len(losses))
    for gamma, key in ((0.0, attention), (1.0, history - losses)):
        best = sorted(range(len(losses)), key=lambda i: -float(key[i]))[:count]  # stable: the first of equals
        assert select_by_algorithm_1(*sample, gamma, rho).nonzero().flatten().tolist() == sorted(best)


@holds_for_any(sample=samples(), gamma=GAMMAS, rhos=strategies.tuples(RHOS, RHOS).map(sorted))
def test_the_selection_grows_with_rho_to_the_whole(sample, gamma, rhos):
    smaller, larger = (select_by_algorithm_1(*sample, gamma, rho) for rho in rhos)
    assert not (smaller & ~larger).any() and 1 <= smaller.sum() <= larger.sum()
    assert select_by_algorithm_1(*sample, gamma, 1.0).all()


@holds_for_any(sample=samples(), gamma=GAMMAS)
def test_a_score_lies_within_0_and_1(sample, gamma):
    losses, history, attention = sample
    scores = score(normalize(history - losses), attention, gamma)
    assert scores.min() >= 0 and scores.max() <= 1 + 1e-6


@holds_for_any(percent=strategies.integers(1, 100), n=strategies.integers(1, 500))
def test_a_share_that_is_an_integer_up_to_rounding_is_that_integer(percent, n):
    assert share_of(percent / 100, 100 * n) == percent * n


# -------------------------------------------------------------------------------------------------- the probe


def random_batch(lengths, vocab=400, seed=0):
    """Right-padded random ids and a response mask with several turns a row."""
    generator = torch.Generator().manual_seed(seed)
    ids, response = torch.zeros(len(lengths), max(lengths), dtype=torch.long), None
    response = torch.zeros(ids.shape, dtype=torch.bool)
    for i, length in enumerate(lengths):
        ids[i, :length] = torch.randint(2, vocab, (length,), generator=generator)
        response[i, length // 3 : length // 2] = response[i, 2 * length // 3 : length] = True
    return ids, response


def test_the_probe_draws_no_random_number_and_sees_adapters_without_dropout(tmp_path):
    model = add_lora(make_model(tmp_path, "llama"), rank=4, alpha=8, dropout=0.5)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    ids, response = random_batch([30, 41])
    probe = AttentionProbe(model, 0)  # nothing before layer 0 has dropout, so both modes must agree
    model.eval()
    model(ids)
    expected = probe.scores(response)
    assert not any(layer.training for layer in model.model.layers)  # as they were
    model.train()
    model(ids)
    state = torch.get_rng_state()
    assert torch.equal(probe.scores(response), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.training for layer in lora_layers(model).values())
    for layer in lora_layers(model).values():
        layer.lora_B.data.zero_()
    model(ids)
    assert not torch.equal(probe.scores(response), expected)  # the adapters counted


def test_the_probe_is_not_fired_by_a_recomputed_layer(tmp_path):
    model = make_model(tmp_path, "llama")
    ids, response = random_batch([25, 33])
    probe = AttentionProbe(model, 1)
    model(ids)
    kept = probe.hidden
    assert not kept.requires_grad
    layer = model.model.layers[1]
    x = torch.randn(1, 5, 48, requires_grad=True)
    rope = (torch.ones(5, 16), torch.zeros(5, 16))
    recompute(layer, x, rope, use_reentrant=False).sum().backward()  # runs the layer twice more
    assert probe.hidden is kept
    probe.remove()
    model(ids + 1)
    assert probe.hidden is kept


def test_a_layer_that_does_not_exist_is_refused(tmp_path):
    model = make_model(tmp_path, "llama")
    for layer in (3, -4):
        with pytest.raises(ValueError, match=f"layer {layer}"):
            AttentionProbe(model, layer)


@pytest.mark.slow  # the arithmetic of a 3B model's layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probes_memory_stays_under_a_quarter_of_the_attention_matrix(tmp_path, dtype):
    sizes = {"hidden_size": 3072, "intermediate_size": 64, "num_hidden_layers": 1}  # Llama-3.2-3B's attention
    heads = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096}
    model = make_model(tmp_path, "llama", **sizes, **heads).to(dtype)
    response = torch.zeros(1, 2048, dtype=torch.bool)
    response[:, 100:] = True
    probe = AttentionProbe(model)
    probe.hidden = torch.randn(1, 2048, 3072, dtype=dtype)  # what it keeps of a pass
    probe.rope = rope_table(model.config, torch.arange(2048), dtype)
    kept = probe.hidden.numel() * probe.hidden.element_size()
    assert kept + peak_allocated(lambda: probe.scores(response)) < 24 * 2048 * 2048  # of four bytes each
    q, k = torch.randn(24, 2048, 128, dtype=dtype), torch.randn(8, 2048, 128, dtype=dtype)
    assert peak_allocated(lambda: attention_score(q, k, response[0])) < 64 * 2**20


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_scores_are_zero_off_the_response_and_rows_do_not_see_each_other(tmp_path, family):
    model = make_model(tmp_path, family)
    ids, response = random_batch([17, 90, 44])
    response[0] = False  # a row of a batch may have nothing to score
    probe = AttentionProbe(model)
    model(ids)
    together = copy.deepcopy(probe.scores(response))
    assert together[~response].eq(0).all() and together[response].gt(0).all()
    for i, length in enumerate([17, 90, 44]):
        model(ids[i : i + 1, :length])
        alone = probe.scores(response[i : i + 1, :length])
        assert (alone[0] - together[i, :length]).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_probe_s_scores_are_eqs_5_to_7_of_the_layer_s_own_queries_and_keys(tmp_path, family):
    """Each sequence projected by itself, against the probe, which projects the tokens of all by chunks."""
    model = make_model(tmp_path, family)
    probe = AttentionProbe(model, 1)
    ids, response = random_batch([90, 61])
    with torch.no_grad():
        model(ids)
        scores, layer = probe.scores(response), model.model.layers[1]
        for row, length in enumerate((90, 61)):
            x = layer.input_layernorm(probe.hidden[row : row + 1, :length])
            rope = rope_table(model.config, torch.arange(length), x.dtype)
            parts = layer.self_attn
            q, k = (part(x).unflatten(-1, (-1, parts.head_dim)) for part in (parts.q_proj, parts.k_proj))
            q, k = (apply_rope(heads.transpose(1, 2), rope)[0] for heads in (parts.q_norm(q), parts.k_norm(k)))
            expected = attention_score(q, k, response[row, :length])
            assert torch.allclose(scores[row][response[row]], expected, atol=1e-6)
            assert expected.min() > 0 and expected.max() < 0.999  # neither nothing nor all is prompt


def test_the_gain_in_probability_by_hand():
    p_current, p_history = torch.tensor([0.6, 0.25]), torch.tensor([0.2, 0.5])
    gain = probability_gain(-p_current.log(), -p_history.log())
    assert gain.tolist() == pytest.approx([0.4, -0.25])
