"""Greedy decoding: with a cache as without one, with guesses as without them."""

import json

import pytest
import torch
from test_evaluate import PAIRS

from model import load_model
from support.decoding import Row, generate, generation_settings
from support.files import UserError
from support.tokenizer import load_tokenizer


def test_a_row_guesses_what_came_next_where_its_last_tokens_stood_before():
    def guess(ids, most=4):
        row = Row(0, ids)
        row.look_up(most)
        return row.guess

    assert guess([1, 2, 3, 4]) == []
    assert guess([1, 2, 3, 4, 5, 6, 9, 3]) == [4, 5, 6, 9]
    assert guess([1, 2, 3, 4, 7, 2, 3, 5, 8, 1, 2, 3], 2) == [4, 7]  # three tokens alike count before two
    assert guess([3, 4, 8, 3, 5, 8, 3], 2) == [5, 8]  # the place that is nearest
    assert guess([9, 1, 2, 1, 2]) == [1, 2, 1, 2] and guess([7, 7]) == [7, 7, 7, 7]  # a repetition goes on
    assert guess([1, 2, 1], 0) == []


@torch.no_grad()
def test_guesses_save_steps_and_change_nothing(llama):
    model = load_model(llama)
    prompts, passes = [[5, 6, 7], list(range(10, 40))], []
    handle = model.register_forward_hook(lambda *given: passes.append(1))
    produced = generate(model, prompts, 60)
    assert len(passes) < 40  # of 62 without
    handle.remove()
    for prompt, new in zip(prompts, produced, strict=True):
        ids = torch.tensor([prompt + new])
        assert model.lm_head(model(ids))[0].argmax(-1).tolist()[len(prompt) - 1 : -1] == new
        assert generate(model, [prompt], 60, stop=lambda ids: len(ids) == 41) == [new[:41]]


def test_generation_with_the_cache_equals_generation_without(checkpoint):
    model = load_model(checkpoint)
    prompts = [[5, 6, 7], list(range(10, 40)), [300, 301], list(range(40, 67)), list(range(70, 102))]
    produced = generate(model, prompts, max_new_tokens=12)
    for prompt, new in zip(prompts, produced, strict=True):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model.lm_head(model(torch.tensor([ids]))[0, -1]).argmax()))
        assert new == ids[len(prompt) :]
    passes, model.gradient_checkpointing = [], True  # which is about a backward pass alone
    handle = model.register_forward_hook(lambda *given: passes.append(1))
    assert generate(model, prompts, 2) == [new[:2] for new in produced]
    assert len(passes) == 3  # the three long prompts are read at once, so are the two short ones; all go on together
    handle.remove()
    stop = produced[1][4]
    assert generate(model, prompts, 12, stop_ids=[stop])[1] == produced[1][: produced[1].index(stop)]


def test_generation_with_a_small_cache_writes_what_a_large_one_writes(llama):
    model, tokenizer = load_model(llama), load_tokenizer(llama)
    prompts = tokenizer.encode_prompts([context for context, _ in PAIRS])
    plain, rows = generate(model, prompts, 20), []
    model.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
    for batch_tokens, cache_tokens in ((1, 1), (40, 150), (10**6, 300)):
        done = []
        found = generate(model, prompts, 20, batch_tokens=batch_tokens, cache_tokens=cache_tokens, ended=done.append)
        assert found == plain and sorted(done) == list(range(len(prompts)))
    assert all(b * n <= max(10**6, n) for b, n in rows) and (1, 1) in rows
    stops = [ids[7] for ids in plain]

    def stop(ids):
        return ids[-1] in stops

    stopped = generate(model, prompts, 20, stop=stop, cache_tokens=200)
    for ids, whole in zip(stopped, plain, strict=True):
        end = next(n for n, token in enumerate(whole) if token in stops)
        assert ids == whole[: end + 1]


# what generation_config.json may say, and whether it changes what greedy decoding writes
SETTINGS = {
    "num_beams": (4, 1),
    "no_repeat_ngram_size": (2, 0),
    "min_new_tokens": (5, None),
    "max_new_tokens": (5, None),
    "suppress_tokens": ([3], []),
    "bad_words_ids": ([[3]], None),
    "sequence_bias": ([[[3], 1.0]], None),
    "forced_eos_token_id": (3, None),
    "stop_strings": (["a"], None),
    "guidance_scale": (1.5, 1.0),
    "encoder_repetition_penalty": (1.2, 1.0),
    "exponential_decay_length_penalty": ([3, 1.1], None),
    "cache_implementation": ("quantized", "static"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_would_change_what_is_written_is_refused_by_name(llama, tmp_path, name):
    model, tokenizer = load_model(llama), load_tokenizer(llama)
    model.folder, (changes, neutral) = tmp_path, SETTINGS[name]
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}  # lm-eval switches that off
    (tmp_path / "generation_config.json").write_text(json.dumps(sampling | {name: neutral}))
    assert generation_settings(model, tokenizer)["repetition_penalty"] == 1
    (tmp_path / "generation_config.json").write_text(json.dumps(sampling | {name: changes}))
    with pytest.raises(UserError, match=f"generation_config.json: {name} .* is not implemented; take it out"):
        generation_settings(model, tokenizer)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("wrong", [{"repetition_penalty": 0}, {"eos_token_id": True}, {"eos_token_id": [1, "2"]}])
def test_a_setting_that_means_nothing_is_refused_with_the_file_that_holds_it(llama, tmp_path, name, wrong):
    model, tokenizer = load_model(llama), load_tokenizer(llama)
    model.folder = tmp_path
    if name == "config.json":
        model.config.raw.update(wrong)
    else:
        (tmp_path / name).write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=f"{tmp_path}/{name}: {next(iter(wrong))} is "):
        generation_settings(model, tokenizer)
