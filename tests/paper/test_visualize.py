"""The token explorer, driven in headless Chromium: what it selects, shows, and keeps from doing."""

import base64
import json
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy
import playwright.sync_api
import pytest
import torch
from browser import find_browsers, open_browser
from conftest import make_checkpoint, write_rows
from playwright.sync_api import sync_playwright
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import sstoken
import train
from model import load_model
from paper import auto, visualize
from paper.curves import find_states, read_run, with_states
from paper.objectives import token_weights
from support import files

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
HEBREW = "\u05d1\u05d5\u05e7\u05e8 \u05d8\u05d5\u05d1"  # good morning
ROWS = [
    {"instruction": "Say <script>document.title = 'broken'</script> </script>", "output": "<b>bold</b> & </script>"},
    {"instruction": "Say good morning in Hebrew.", "output": HEBREW},
    {"instruction": "Draw.", "output": f"A family {FAMILY}, a \U0001f44d\U0001f3fd and\n\na line \x1b[31mred\x1b[0m."},
]
TURNS = [("user", "Two plus two?"), ("assistant", "Four."), ("user", "And three?"), ("assistant", "Seven, of course.")]


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A Chromium. Where there is none, a test that needs it is skipped; on a CI's machine it fails."""
    page = tmp_path_factory.mktemp("browser") / "page.html"
    page.write_text("<p>a page")
    with sync_playwright() as driver:
        found = open_browser(driver, page)
        if isinstance(found, str):
            (pytest.fail if os.environ.get("CI") else pytest.skip)(found)
        yield found
        found.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of a real run: base model, three snapshots, its end, a reference, two layers; and its flags."""
    folder = tmp_path_factory.mktemp("explorer")
    checkpoint = make_checkpoint(folder / "model", "llama", adds_bos=True)
    write_rows(folder / "rows.jsonl")
    text = "".join(json.dumps(row) + "\n" for row in ROWS) + (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(text)
    turns = [{"role": role, "content": content} for role, content in TURNS]
    (folder / "turns.jsonl").write_text(json.dumps({"messages": turns}))
    rows = f"{folder / 'turns.jsonl'},{folder / 'rows.jsonl'}"
    common = ["--model", str(checkpoint), "--data", rows, "--batch-size", "8", "--lora-rank", "4"]
    common += ["--dtype", "float32"]
    train.main([*common, "--lr", "0.02", "--out", str(folder / "run"), "--snapshot-every", "1"])
    train.main([*common, "--lr", "0.01", "--out", str(folder / "better"), "--method", "full"])
    flags = ["--model", str(checkpoint), "--data", rows, "--adapter", str(folder / "run"), "--dtype", "float32"]
    flags += ["--reference", str(folder / "better"), "--layers", "deep,0"]
    visualize.main([*flags, "--out", str(folder / "page.html")])
    return folder, flags


@pytest.fixture
def explorer(made, browser):
    """The page, open; it must ask for nothing and say nothing on the console."""
    page, noise = browser.new_page(viewport={"width": 1300, "height": 900}), []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: noise.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(f"file://{made[0] / 'page.html'}")
    yield page
    page.close()
    assert not noise


def held(folder) -> dict:
    """What the page holds, read back from its text: integers, and tokens in pieces."""
    text = re.search(r'id="content">(.*?)</script>', (folder / "page.html").read_text(encoding="utf-8"), re.DOTALL)[1]

    def numbers(value):
        raw = base64.b64decode(value)
        return torch.tensor([raw[i] + 256 * raw[i + 1] for i in range(0, len(raw), 2)])

    page = json.loads(text)
    for sample in page["samples"]:
        sample["reference"] = numbers(sample["reference"])
        sample["losses"] = [numbers(x) for x in sample["losses"]]
        sample["history"] = sample["losses"][0]
        sample["attention"] = [[numbers(x) for x in layers] for layers in sample["attention"]]
        for name in ("topEntropy", "surprise"):
            sample[name] = [torch.tensor(list(base64.b64decode(x))) for x in sample[name]]
    return page


def selected(page, side=0) -> list[bool]:
    """The tokens that the page shows as selected, in order."""
    flags = page.eval_on_selector_all(f'[data-side="{side}"] .t', "all => all.map(t => t.dataset.selected).join('')")
    return [flag == "1" for flag in flags]


def colours(page, side=0) -> str:
    """b, o or - for each piece of the response."""
    kinds = page.eval_on_selector_all(f'[data-side="{side}"] .t', "all => all.map(t => t.className)")
    return "".join("o" if "orange" in kind else "b" if "blue" in kind else "-" for kind in kinds)


def move(page, name, value):
    """Put a slider on a value and tell the page, as a hand would."""
    page.eval_on_selector(
        f"#{name}", "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
    )


def go_to(page, number):
    page.locator("#samples button").nth(number).click()


# --------------------------------------------------------------------------------------------- the same arithmetic


def test_the_page_selects_what_sstoken_selects(explorer, made):
    page = held(made[0])
    assert page["states"] == ["base model", "run, step 1", "run, step 2", "run, step 3", "run"]
    rng = random.Random(0)
    for _ in range(40):
        gamma, rho, layer = rng.choice([0, 100, rng.randint(1, 99)]), rng.randint(1, 100), rng.randint(0, 1)
        state, number = rng.randrange(5), rng.randrange(len(page["samples"]))
        move(explorer, "gamma", gamma)
        move(explorer, "rho", rho)
        explorer.select_option("#layer", str(layer))
        explorer.select_option("#state-a", str(state))
        go_to(explorer, number)
        sample = page["samples"][number]
        rel = sstoken.retrospective_excess_loss(sample["losses"][state].double(), sample["history"].double())
        scores = sstoken.score(sstoken.normalize(rel), sample["attention"][state][layer].double() / 65535, gamma / 100)
        assert selected(explorer) == sstoken.select(scores, rho / 100).tolist(), (gamma, rho, layer, state, number)


def test_other_methods_on_the_page(explorer, made):
    page, state = held(made[0]), 4
    for number in (0, 3, 9):
        go_to(explorer, number)
        sample = page["samples"][number]
        loss, base, better = (x.double() for x in (sample["losses"][state], sample["history"], sample["reference"]))
        for method, scores in {
            "RHO-1, base model": sstoken.excess_loss(base, better),
            "RHO-1, this model": sstoken.excess_loss(loss, better),
            "REL alone (gamma 1)": base - loss,
            "attention alone (gamma 0)": sample["attention"][state][0],
        }.items():
            explorer.select_option("#method-b", method)
            assert selected(explorer, 1) == sstoken.select(scores, 0.6).tolist()
        explorer.select_option("#method-b", "full")
        assert all(selected(explorer, 1))
        differs = explorer.eval_on_selector_all('[data-side="0"] .t', "all => all.map(t => t.matches('.differs'))")
        pieces = explorer.eval_on_selector_all('[data-side="0"] .t', "all => all.map(t => t.dataset.selected)")
        assert differs == ["0" in piece for piece in pieces]


def test_other_objectives_are_shown_as_shades_of_their_weights(explorer, made):
    page, state = held(made[0]), 4
    names = {"DFT": "dft", "EAFT": "eaft", "STM": "stm", "ProFit": "profit", "low loss": "low-loss"}
    names |= {"REL reversed": "rel-reversed", "surprise": "surprise"}
    for number in (0, 3, 9):
        go_to(explorer, number)
        sample = page["samples"][number]
        known = {"nll": sample["losses"][state].double() / 2000, "history_nll": sample["history"].double() / 2000}
        known |= {"entropy": known["nll"] - sample["surprise"][state].double() / 40, "spread": torch.ones(1).double()}
        known |= {"top_entropy": sample["topEntropy"][state].double() / 80, "rho": 0.6}
        known["vocabulary"] = page["vocabulary"]
        for shown, method in names.items():
            explorer.select_option("#method-b", shown)
            weights = token_weights(method, known).double()
            assert selected(explorer, 1) == (weights > 0).tolist(), shown
            pieces = explorer.eval_on_selector_all(
                '[data-side="1"] .t', "all => all.map(t => [+t.dataset.first, t.dataset.selected.length, t.className])"
            )
            for first, size, classes in pieces:
                darkest = 10 * float(weights[first : first + size].max().clamp(max=1))
                assert abs(int(re.search(r"shade(\d+)", classes)[1]) - darkest) <= 0.500001
    explorer.select_option("#method-a", "DFT")
    explorer.locator(".t").first.hover()
    assert "weight" in explorer.locator("#token").inner_text()


def test_what_is_stored_of_predictions_is_what_transformers_predicts(made):
    folder, _ = made
    examples, _ = data.load_examples(made[1][3], data.load_tokenizer(folder / "model"), 2048)
    peer = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    for example, sample in zip(examples, held(folder)["samples"], strict=True):
        log_p = peer(example.ids[None]).logits[0, :-1].log_softmax(-1)[example.response[1:]]
        entropy = -(log_p.exp() * log_p).sum(-1)
        spread = ((log_p.exp() * log_p**2).sum(-1) - entropy**2).sqrt()
        surprise = (
            (-log_p.gather(1, example.ids[1:][example.response[1:]].unsqueeze(1))[:, 0] - entropy) / spread
        ).clamp(0)
        assert (sample["surprise"][0] / 40 - surprise.clamp(max=255 / 40)).abs().max() < 0.0126
        best = log_p.topk(20).values.log_softmax(-1)
        assert (sample["topEntropy"][0] / 80 + (best.exp() * best).sum(-1)).abs().max() < 0.0064


def test_blue_and_orange_are_appendix_d_s(explorer, made):
    page = held(made[0])
    seen = ""
    for number in range(len(page["samples"])):
        go_to(explorer, number)
        sample = page["samples"][number]
        rel, att = sample["history"] - sample["losses"][4], sample["attention"][4][0].double() / 65535
        rel = (rel - rel.min()).double() / (rel.max() - rel.min())
        both, alone = sstoken.select(0.5 * rel + 0.5 * att, 0.6), sstoken.select(rel, 0.6)
        places = explorer.eval_on_selector_all(".t", "all => all.map(t => +t.dataset.first)")
        sizes = [len(x) for x in explorer.eval_on_selector_all(".t", "all => all.map(t => t.dataset.selected)")]
        expected = ""
        for first, size in zip(places, sizes, strict=True):
            chosen = [i for i in range(first, first + size) if both[i]]
            expected += "-" if not chosen else "o" if not any(alone[i] for i in chosen) else "b"
        assert colours(explorer) == expected
        seen += expected
    assert {"b", "o", "-"} == set(seen)


def test_what_is_stored_is_what_transformers_computes(made):
    folder, _ = made
    tokenizer = data.load_tokenizer(folder / "model")
    examples, _ = data.load_examples(made[1][3], tokenizer, 2048)
    peer = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64, attn_implementation="eager")
    for example, sample in zip(examples, held(folder)["samples"], strict=True):
        out = peer(example.ids[None], output_attentions=True)
        nll = -out.logits[0, :-1].log_softmax(-1).gather(1, example.ids[1:, None])[:, 0][example.response[1:]]
        assert (sample["history"] / 2000 - nll).abs().max() < 0.0005
        for stored, layer in zip(sample["attention"][0], (2, 0), strict=True):
            to_prompt = (out.attentions[layer][0] * ~example.response).sum(-1).mean(0)[example.response]
            assert (stored / 65535 - to_prompt).abs().max() < 2e-5


# ------------------------------------------------------------------------------------------------- what it shows


def test_the_text_of_every_sample_is_there_in_full(explorer, made):
    tokenizer = AutoTokenizer.from_pretrained(made[0] / "model")
    examples, _ = data.load_examples(made[1][3], data.load_tokenizer(made[0] / "model"), 2048)
    for number, example in enumerate(examples):
        go_to(explorer, number)
        text = tokenizer.decode(example.ids).replace("\x1b", "\u241b")
        assert explorer.eval_on_selector(".side .text", "text => text.textContent") == text


def test_bytes_of_one_character_are_shown_together(explorer):
    go_to(explorer, 3)
    read = "all => all.map(t => [t.textContent.trim(), t.dataset.selected.length])"
    pieces = explorer.eval_on_selector_all(".t", read)
    assert not any("\ufffd" in text for text, _ in pieces)
    sizes = dict(map(tuple, pieces))
    assert sizes[FAMILY] > 5 and sizes["\U0001f44d\U0001f3fd"] > 2  # the tokenizer has met neither as a whole
    explorer.locator(".t", has_text=FAMILY).hover()
    assert explorer.locator("#token tr").first.locator("td").count() == sizes[FAMILY]


def test_text_from_data_is_text(explorer):
    go_to(explorer, 1)
    text = explorer.locator(".side .text").inner_text()
    assert "<script>document.title = 'broken'</script> </script>" in text and "<b>bold</b> & </script>" in text
    assert explorer.title() == "ssToken: which tokens are selected"
    assert explorer.locator("b").count() == explorer.locator(".summary b").count()


def test_the_security_policy_forbids_whatever_is_not_the_page_s_own(made, browser):
    page, refused = browser.new_page(), []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(f"file://{made[0] / 'page.html'}")
    with page.expect_console_message(lambda _: len(refused) == 2):
        page.evaluate("""() => {
            const script = document.createElement('script'); script.textContent = 'document.title = "broken"';
            const image = document.createElement('img'); image.src = 'http://127.0.0.1:9/x.png';
            document.body.append(script, image);
        }""")
    assert page.title() != "broken"
    assert all("Content Security Policy" in message for message in refused)
    page.close()


# ------------------------------------------------------------------------------------------ what the reader can do


def test_the_keyboard_reaches_everything(explorer):
    explorer.locator("#gamma").focus()
    explorer.keyboard.press("ArrowRight")
    assert explorer.locator("#gamma-value").inner_text() == "0.51"
    assert explorer.locator('.t[tabindex="0"]').count() == 1  # one Tab stop, then arrows
    explorer.locator('.t[tabindex="0"]').focus()
    explorer.keyboard.press("ArrowRight")
    assert explorer.evaluate("document.activeElement.dataset.first") == "1"
    assert "2 of" in explorer.locator("#token").inner_text()
    explorer.keyboard.press("ArrowLeft")
    assert "1 of" in explorer.locator("#token").inner_text()
    explorer.keyboard.press("PageDown")
    assert explorer.locator("#samples button").nth(1).get_attribute("aria-current") == "true"
    explorer.keyboard.press("PageUp")
    assert explorer.locator("#samples button").nth(0).get_attribute("aria-current") == "true"


def test_the_numbers_of_a_token(explorer, made):
    sample = held(made[0])["samples"][7]
    go_to(explorer, 7)
    explorer.locator(".t").nth(4).hover()
    table = dict(row.split("\t") for row in explorer.locator("#token table").inner_text().splitlines())
    his, loss = sample["history"][4].item() / 2000, sample["losses"][4][4].item() / 2000
    assert (table["L_his"], table["L_theta"], table["REL"]) == (f"{his:.4f}", f"{loss:.4f}", f"{his - loss:.4f}")
    assert table["excess loss"] == f"{his - sample['reference'][4].item() / 2000:.4f}"
    assert table["AttnScore, layer 2"] == f"{sample['attention'][4][0][4].item() / 65535:.3f}"
    assert table["AttnScore, layer 0"] == f"{sample['attention'][4][1][4].item() / 65535:.3f}"


def test_steps_of_a_run_show_selection_change(explorer):
    go_to(explorer, 12)
    seen = []
    for step in range(5):
        move(explorer, "step", step)
        seen.append(tuple(selected(explorer)))
        label = explorer.locator("#step-value").inner_text()
        assert label == explorer.eval_on_selector("#state-a", "select => select.selectedOptions[0].text")
    assert len(set(seen)) > 2 and seen[3] == seen[4]  # the last snapshot is the end of this run


def test_samples_in_order_of_disagreement(explorer, made):
    explorer.select_option("#method-b", "RHO-1, base model")
    explorer.select_option("#order", "1")
    shares = []
    for sample in held(made[0])["samples"]:
        rel = sstoken.normalize((sample["history"] - sample["losses"][4]).double())
        ours = sstoken.select(0.5 * rel + 0.5 * (sample["attention"][4][0].double() / 65535), 0.6)
        theirs = sstoken.select(sample["history"] - sample["reference"], 0.6)
        shares.append((ours ^ theirs).double().mean().item())
    texts = explorer.locator("#samples small").all_inner_texts()
    shown = [float(re.search(r"([\d.]+) % differ", text)[1]) for text in texts]
    assert shown == pytest.approx([100 * share for share in sorted(shares, reverse=True)], abs=0.051)


def test_charts_have_a_mark_for_every_token(explorer, made):
    sample = held(made[0])["samples"][0]
    assert explorer.locator("#scatter circle").count() == len(sample["history"])
    picked = explorer.locator("#scatter .fill-blue, #scatter .fill-orange").count()
    assert picked == sum(selected(explorer))
    for chart in ("rel", "attention"):
        heights = explorer.eval_on_selector_all(f"#{chart} rect", "all => all.map(r => +r.getAttribute('height'))")
        assert len(heights) > 1 and all(0 < height <= 178.001 for height in heights)


@pytest.mark.parametrize("width", [320, 390, 800, 1300])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_any_width_in_light_and_dark(made, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(f"file://{made[0] / 'page.html'}")
    page.select_option("#method-b", "full")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    style = "getComputedStyle(document.body)"
    colour, ground = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
    light = [sum(map(int, re.findall(r"\d+", value)[:3])) / 765 for value in (colour, ground)]
    assert (light[0] < 0.2 and light[1] > 0.9) if scheme == "light" else (light[0] > 0.8 and light[1] < 0.2)
    page.close()


def test_right_to_left_text_is_one(explorer, made, browser):
    page = browser.new_page()
    sample = visualize.Sample([[(word, 1) for word in HEBREW.split()]], *(torch.ones(2, dtype=torch.int64),) * 4)
    sample = sample._replace(losses=torch.ones(1, 2), attention=torch.ones(1, 1, 2), reference=None)
    head = {"about": "m on d", "runs": [], "states": ["base model"], "layers": [0], "nats": 2000, "share": 65535}
    page.set_content(visualize.build_page([sample], head | {"gamma": 50, "rho": 60}))
    first, second = (page.locator(".t").nth(i).bounding_box()["x"] for i in (0, 1))
    assert first > second  # reading starts on the right
    page.close()


# ----------------------------------------------------------------------------------------- the second view: how it went


@pytest.fixture(scope="module")
def runs_made(made, tmp_path_factory):
    """Two runs with held-out losses on the way, one of them with snapshots: their page with tokens, and one without."""
    folder, model, rows = tmp_path_factory.mktemp("curves"), made[1][1], made[1][3]
    common = ["--model", model, "--data", rows, "--eval-data", rows, "--batch-size", "4", "--lora-rank", "4"]
    common += ["--dtype", "float32", "--epochs", "2"]
    train.main([*common, "--out", str(folder / "a"), "--lr", "0.02", "--snapshot-every", "4", "--eval-every", "5"])
    train.main([*common, "--out", str(folder / "b"), "--method", "full", "--max-steps", "7"])
    flags = ["--model", model, "--data", rows, "--dtype", "float32", "--layers", "deep,0"]
    flags += ["--adapter", str(folder / "a"), "--run", str(folder / "b")]
    visualize.main([*flags, "--out", str(folder / "page.html")])
    visualize.main(["--run", str(folder / "a"), "--run", str(folder / "b"), "--out", str(folder / "logs.html")])
    return folder


@pytest.fixture(params=["page", "logs"])
def curves(runs_made, browser, request):
    """The view with curves, of a page with tokens and of one of logs alone; it must ask for nothing and say nothing."""
    page, noise = browser.new_page(viewport={"width": 1300, "height": 900}), []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: noise.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(f"file://{runs_made / request.param}.html")
    if request.param == "page":
        page.locator("#see-curves").click()
    yield page
    page.close()
    assert not noise


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def plot(page, title):
    return page.locator("#plots .card", has=page.locator("h2", has_text=title))


def drawn(card, number) -> list[list[float]]:
    """The points of a run's curve, as fractions of the plot: of its steps, and from its lowest value to its highest."""
    path = card.locator(f".run{number} .curve").get_attribute("d")
    points = [list(map(float, point.split())) for point in re.findall(r"[ML]([\d.]+ [\d.]+)", path)]
    return [[(x - 8) / 324, (178 - y) / 162] for x, y in points]


def test_every_step_of_every_run_is_on_one_axis(curves, runs_made):
    logs = [log_of(runs_made / name) for name in "ab"]
    assert [len(log) for log in logs] == [12, 7]
    read = {
        "loss of what": lambda line: line["loss"],
        "share selected": lambda line: line["selected_tokens"] / line["response_tokens"],
        "learning rate": lambda line: line["lr"],
        "tokens/s": lambda line: line["tokens"] / line["seconds"],
    }
    for title, value in read.items():
        values = [[value(line) for line in log] for log in logs]
        low = min(map(min, values)) if title == "loss of what" else 0
        high = max(map(max, values))
        for number, of_run in enumerate(values):
            expected = [[step / 12, (y - low) / (high - low)] for step, y in enumerate(of_run, 1)]
            for point, wanted in zip(drawn(plot(curves, title), number), expected, strict=True):
                assert point == pytest.approx(wanted, abs=0.001)


def test_held_out_losses_are_those_of_the_log_and_of_the_record(curves, runs_made):
    log, record = log_of(runs_made / "a"), json.loads((runs_made / "a" / "run.json").read_text())
    measured = {line["step"]: line["held_out_loss"] for line in log if "held_out_loss" in line}
    assert measured.keys() == {5, 10}
    assert measured[10] < measured[5] < record["held_out_loss_before"]
    assert [round(12 * x) for x, _ in drawn(plot(curves, "held-out"), 0)] == [0, 5, 10, 12]
    assert [round(12 * x) for x, _ in drawn(plot(curves, "held-out"), 1)] == [0, 7]
    move(curves, "cursor", 6)
    first = curves.locator("#readout tr").nth(1).inner_text().split("\t")
    assert [first[i].strip() for i in (0, 2)] == ["a", "6"]
    assert first[3:5] == [f"{log[5]['loss']:.4f}", f"{measured[5]:.4f} (step 5)"]
    share = log[5]["selected_tokens"] / log[5]["response_tokens"]
    assert first[5] == f"{100 * share:.1f} %"


def test_a_point_opens_the_tokens_as_they_were_at_that_step(runs_made, browser):
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.goto(f"file://{runs_made / 'page.html'}")
    assert page.locator("#tokens").is_visible() and not page.locator("#curves").is_visible()
    page.locator("#see-curves").click()
    assert not page.locator("#tokens").is_visible()
    dots = plot(page, "loss of what").locator(".dot")
    assert [dots.nth(i).get_attribute("data-step") for i in range(dots.count())] == ["0", "4", "8", "12"]
    label = "#state-a option:checked"
    for place, state in ((1, "a, step 4"), (0, "base model"), (3, "a")):
        dots.nth(place).click()
        assert page.locator("#tokens").is_visible() and page.locator(label).inner_text() == state
        page.locator("#see-curves").click()
    move(page, "cursor", 9)  # the nearest snapshot, by its button
    page.get_by_role("button", name="tokens after step 8").first.click()
    assert page.locator(label).inner_text() == "a, step 8"
    page.close()


def test_curves_by_keyboard_alone(runs_made, browser):
    page = browser.new_page()
    page.goto(f"file://{runs_made / 'page.html'}")
    page.locator("#see-curves").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "cursor"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#cursor-value").inner_text() == "11 of 12"
    page.keyboard.press("Tab")  # the button that opens the run's tokens there
    page.keyboard.press("Tab")  # the first plot's dots, one stop for all of them
    assert page.evaluate("document.activeElement.dataset.step") == "0"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.step") == "4"
    page.keyboard.press("Enter")
    assert page.locator("#state-a option:checked").inner_text() == "a, step 4"
    assert page.evaluate("document.activeElement.matches('.t')")  # the reader stands in the text
    page.close()


def test_distributions_are_those_of_the_tokens_on_the_page(runs_made, browser):
    text = (runs_made / "page.html").read_text(encoding="utf-8")
    held_page = json.loads(re.search(r'id="content">(.*?)</script>', text, re.DOTALL)[1])

    def numbers(value):
        raw = base64.b64decode(value)
        return [raw[i] + 256 * raw[i + 1] for i in range(0, len(raw), 2)]

    quartiles = {}
    for name, unit in (("REL", 2000), ("AttnScore", 65535)):
        for state in (0, 1, 2, 4):  # the third snapshot is the end of the run
            values = []
            for sample in held_page["samples"]:
                if name == "REL":
                    history, losses = (numbers(sample["losses"][i]) for i in (0, state))
                    values += [(a - b) / unit for a, b in zip(history, losses, strict=True)]
                else:
                    values += [x / unit for x in numbers(sample["attention"][state][0])]
            quartiles[name, state] = numpy.quantile(values, [0.1, 0.5, 0.9])
    assert held_page["runs"][0]["states"] == {"0": 0, "4": 1, "8": 2, "12": 4}
    page = browser.new_page()
    page.goto(f"file://{runs_made / 'page.html'}")
    page.locator("#see-curves").click()
    for name in ("REL", "AttnScore"):
        found = [quartiles[name, state] for state in (0, 1, 2, 4)]
        low, high = min(f[0] for f in found), max(f[2] for f in found)
        shown = drawn(plot(page, name), 0)
        for (x, y), step, of_state in zip(shown, (0, 4, 8, 12), found, strict=True):
            assert [x, y] == pytest.approx([step / 12, (of_state[1] - low) / (high - low)], abs=0.001)
        assert plot(page, name).locator(".band").count() == 1
    page.close()


@pytest.mark.parametrize("width", [320, 390, 1300])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_curves_fit_any_width_in_light_and_dark(runs_made, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(f"file://{runs_made / 'page.html'}")
    page.locator("#see-curves").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    style = "getComputedStyle(document.querySelector('#plots .curve'))"
    ground = "getComputedStyle(document.querySelector('#plots .card')).backgroundColor"
    light = [sum(map(int, re.findall(r"\d+", page.evaluate(of))[:3])) / 765 for of in (f"{style}.stroke", ground)]
    assert abs(light[0] - light[1]) > 0.3
    page.close()


def test_a_run_is_shown_while_it_trains(runs_made, made, tmp_path):
    """Its log and snapshots are there, its last line half written, and no adapter yet."""
    shutil.copytree(runs_made / "a", tmp_path / "going")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "going" / name).unlink()
    log = (tmp_path / "going" / "log.jsonl").read_text()
    (tmp_path / "going" / "log.jsonl").write_text(log[:-20])
    flags = ["--model", made[1][1], "--data", made[1][3], "--dtype", "float32", "--limit", "2"]
    visualize.main([*flags, "--adapter", str(tmp_path / "going"), "--out", str(tmp_path / "page.html")])
    text = re.search(r'id="content">(.*?)</script>', (tmp_path / "page.html").read_text(encoding="utf-8"), re.DOTALL)[1]
    (run,) = json.loads(text)["runs"]
    assert run["steps"] == 11 and run["states"] == {"0": 0, "4": 1, "8": 2, "12": 3}


def test_a_long_run_is_thinned_to_means(tmp_path):
    lines = [
        {
            "step": i,
            "loss": float((i + 1) % 3),
            "lr": 1 / i,
            "tokens": 10,
            "response_tokens": 4,
            "selected_tokens": i % 2 * 4,
        }
        for i in range(1, 1501)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line | {"seconds": 2.0}) + "\n" for line in lines))
    run = read_run(tmp_path)
    assert run["every"] == 3 and run["steps"] == 1500 and len(run["points"]["step"]) == 500
    assert run["points"]["step"][:2] == [3, 6] and set(run["points"]["loss"]) == {1.0}
    assert run["points"]["share"][:2] == pytest.approx([2 / 3, 1 / 3]) and set(run["points"]["speed"]) == {5.0}
    assert run["held_out"] == []


def test_two_runs_of_one_name_are_told_apart(runs_made, tmp_path):
    shutil.copytree(runs_made / "a", tmp_path / "x" / "a")
    shown = with_states([read_run(runs_made / "a"), read_run(tmp_path / "x" / "a"), read_run(runs_made / "b")], [])
    assert [run["name"] for run in shown] == [str(runs_made / "a"), str(tmp_path / "x" / "a"), "b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no log.jsonl, or no step in it yet; inside it there are"),
        ("", "has no log.jsonl, or no step in it yet"),
        ("nothing\n{}\n", "log.jsonl, line 1: Expecting value"),
        ('{"step": 1, "loss": "high"}\n', "log.jsonl, line 1: no number loss"),
        ("[1]\n", "log.jsonl, line 1: no number step"),
    ],
)
def test_a_log_that_is_none_is_named(tmp_path, content, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "part-1").mkdir()
    (tmp_path / "part-1" / "log.jsonl").write_text("")
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(files.UserError, match=re.escape(words)):
        visualize.main(["--run", str(tmp_path)])


@pytest.mark.parametrize("flags", [[], ["--model", "m"], ["--data", "d"], ["--run", "r", "--adapter", "a"]])
def test_tokens_need_a_model_and_rows(flags):
    with pytest.raises(files.UserError, match="--model and --data are needed"):
        visualize.parse_arguments(flags)


def test_a_browser_is_looked_for_where_browsers_are(tmp_path, monkeypatch):
    """First what playwright installed, then what is on PATH, then where Windows keeps its own."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LocalAppData", str(tmp_path))
    others = find_browsers(str(tmp_path / "installed"))  # in the usual places of this machine
    places = ["installed", "google-chrome", "chromium", "msedge", "Google/Chrome/Application/chrome.exe"]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch(mode=0o755)
    found = find_browsers(str(tmp_path / "installed"))
    assert [path for path in found if path not in others] == [str(tmp_path / place) for place in places]


def test_a_browser_that_opens_no_page_is_named_and_so_is_what_to_type(tmp_path, monkeypatch):
    def launch(executable_path, **settings):
        raise playwright.sync_api.Error(f"{executable_path} has ended\nits log")

    monkeypatch.setattr("browser.find_browsers", lambda installed: [installed])
    reason = open_browser(SimpleNamespace(chromium=SimpleNamespace(executable_path="snap", launch=launch)), tmp_path)
    assert "type `python -m playwright install chromium`" in reason
    assert reason.endswith("; snap does not open a page: snap has ended")


# ------------------------------------------------------------------------------------------------- size, text, flags


@pytest.mark.slow
def test_two_hundred_samples_of_five_hundred_tokens_take_less_than_five_megabytes(browser):
    generator = torch.Generator().manual_seed(0)
    vocabulary = ["".join(random.Random(i).choices("etaoinshr lud", k=1 + i % 9)) for i in range(5000)]

    def draw(*shape):
        return torch.randint(0, 65536, shape, generator=generator)

    samples = []
    for _ in range(200):
        words = [(vocabulary[i], 1) for i in torch.randint(0, 5000, (500,), generator=generator).tolist()]
        numbers = draw(500), draw(3, 500), draw(3, 1, 500), draw(500), *(draw(2, 3, 500) % 256)
        samples.append(visualize.Sample(["<|user|>\n" + "a question " * 20, words], *numbers, noise=draw(500) < 9000))
    head = {
        "about": "m on d",
        "runs": [],
        "states": ["base model", "a", "b"],
        "layers": [0],
        "nats": 2000,
        "share": 65535,
    }
    text = visualize.build_page(samples, head | {"gamma": 50, "rho": 60})
    assert len(text.encode()) < 5e6
    page = browser.new_page()
    page.set_content(text)
    assert page.locator(".t").count() == 500
    page.close()


SAME = {"instruction": "Say a colour.", "output": "green"}
TURNING = "".join(map(chr, [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
FEW = {
    "one row": [{"instruction": "Say a colour.", "output": "red, \u202eneerg\u202c, blue"}],
    "one token": [{"instruction": "Say a colour.", "output": ""}],
    "one conversation": [{"messages": [{"role": role, "content": text} for role, text in TURNS]}],
    "one prompt": [SAME, SAME | {"output": "blue"}, SAME],
    "nearly one prompt": [SAME, SAME | {"output": "blue"}, {"instruction": "Say a number.", "output": "4"}],
    "two prompts": [SAME, SAME, SAME | {"instruction": "Say a number."}, SAME | {"instruction": "Say a number."}],
}


@pytest.mark.parametrize("rows", FEW.values(), ids=FEW)
def test_few_rows_or_prompts_that_are_alike_are_shown(rows, made, browser, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(made[0] / "model"), "--data", str(tmp_path / "rows.jsonl"), "--dtype", "float32"]
    visualize.main([*flags, "--out", str(tmp_path / "page.html")])
    page, noise = browser.new_page(), []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.goto(f"file://{tmp_path / 'page.html'}")
    assert page.locator("#samples button").count() == len(rows)
    for number in range(len(rows)):
        go_to(page, number)
        found = []
        for method in ("surprise", "rho auto"):  # of few answers nothing can be told: all belong to their prompt
            page.select_option("#method-a", method)
            found.append(selected(page))
        assert found[0] == found[1] and any(found[0]) == (len(found[0]) > 1)  # of an end token alone none is taken
    page.close()
    assert not noise


def test_what_turns_a_text_is_shown_and_not_obeyed(made, browser, tmp_path):
    turned = f"a{TURNING}b"
    folder = tmp_path / f"r{TURNING}\x1b"
    folder.mkdir()
    row = {"instruction": turned, "output": f"{HEBREW} {turned} 5 \u200c\u200d"}
    (folder / f"{TURNING}.jsonl").write_text(json.dumps(row) + "\n")
    shutil.copytree(made[0] / "run" / "step-00000001", folder / "run")
    flags = ["--model", str(made[0] / "model"), "--data", str(folder / f"{TURNING}.jsonl"), "--dtype", "float32"]
    flags += ["--adapter", str(folder / "run"), "--run", str(made[0] / "run")]
    visualize.main([*flags, "--out", str(tmp_path / "page.html")])
    shown = "a" + "".join(f"\\u{ord(c):04x}" for c in TURNING) + "b"
    page = browser.new_page()
    page.goto(f"file://{tmp_path / 'page.html'}")
    text = page.eval_on_selector(".side .text", "text => text.textContent")
    assert text.count(shown) == 2 and f"{HEBREW} {shown} 5" in text and "\u200c\u200d" in text
    assert shown in page.locator("#samples button").inner_text()
    page.close()
    assert not set(TURNING) & set((tmp_path / "page.html").read_text())  # nor in names, nor where no script runs


def test_models_of_one_folder_name_are_told_apart(made, tmp_path):
    for name in "ab":
        shutil.copytree(made[0] / "run" / "step-00000001", tmp_path / name / "last")
    model = load_model(made[0] / "model")
    adapters = [str(tmp_path / "a" / "last"), str(tmp_path / "b" / "last"), str(made[0] / "better")]
    assert [state.label for state in find_states(adapters, model)] == ["base model", "a/last", "b/last", "better"]


def test_noise_that_cannot_be_is_none_and_much_of_it_takes_no_longer():
    tokenizer = data.load_tokenizer(Path(__file__).parents[2] / "demo" / "model")
    text, generator = "hot, cold, up and down " * 200, random.Random(0)
    example = data.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": text}], tokenizer, 10**5)
    ids = example.ids[example.response].tolist()
    places = [*tokenizer.places(text.strip()), (tokenizer.eos_id, len(text) - 1, len(text))]
    assert [token for token, _, _ in places] == ids
    for size in (1, 3, 40):
        wrong = [(start := generator.randrange(-5, len(text)), start + generator.randrange(-3, 9)) for _ in range(size)]
        (found,) = visualize.marked([{"output": text.strip(), "noise": wrong}], [example], tokenizer)
        spans = [(end - len(text[start:end].lstrip() or " "), end) for _, start, end in places]
        assert found.tolist() == [any(start < b and a < end for a, b in wrong) for start, end in spans]
    (found,) = visualize.marked([{"output": text.strip(), "noise": [[0, 10**400]] * 10**5}], [example], tokenizer)
    assert found.all() and len(found) == len(ids)
    for wrong in ([[float("inf"), 1]], [[float("nan"), 1]], [[1]], 5, "ab", {"a": 1}, [None], [["x", "y"]]):
        assert visualize.marked([{"output": text.strip(), "noise": wrong}], [example], tokenizer) == [None]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layers", "3"], "--layers '3'"),
        (["--layers", "deepest"], "--layers 'deepest'"),
        (["--layers", "9" * 5000], "--layers '999"),
        (["--gamma", "1.5"], "--gamma is 1.5"),
        (["--gamma", "0.333"], "hundredths"),
        (["--rho", "0"], "--rho is 0"),
        (["--limit", "0"], "--limit"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--out", "rows.jsonl/page.html"], "rows.jsonl/page.html cannot be written (File exists)"),
        (["--out", "."], ". cannot be written (Is a directory)"),
        (["--adapter", "half"], "half/adapter_model.safetensors: 6 of 42 tensors are missing"),
        (["--reference", "half"], "half/adapter_model.safetensors: 6 of 42 tensors are missing"),
        (["--reference", "nowhere"], "nowhere is neither a local folder nor available"),
    ],
)
def test_mistakes_are_named(made, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "half").mkdir()
    shutil.copy(made[0] / "better" / "adapter_config.json", tmp_path / "half")
    tensors = load_file(made[0] / "better" / "adapter_model.safetensors")
    part = {name: tensor for name, tensor in tensors.items() if "up_proj" not in name}
    save_file(part, tmp_path / "half" / "adapter_model.safetensors")
    monkeypatch.setattr(visualize, "signals", lambda *given: pytest.fail("work before the mistake was seen"))
    with pytest.raises(files.UserError, match=re.escape(words)):
        visualize.main([*made[1], *flags])


def test_noise_that_the_data_marks_is_underlined_and_rho_auto_leaves_answers_out(browser, tmp_path, monkeypatch):
    demo = Path(__file__).parents[2] / "demo"
    belong = [number % 3 > 0 for number in range(30)]
    chosen = auto.AnswerFilter(torch.tensor(belong))
    monkeypatch.setattr(auto, "separate_answers", lambda gains, chance: chosen if len(gains) == 30 else None)
    flags = ["--model", str(demo / "model"), "--data", str(demo / "sft.jsonl"), "--limit", "30", "--dtype", "float32"]
    visualize.main([*flags, "--out", str(tmp_path / "page.html")])
    rows = [json.loads(line) for line in (demo / "sft.jsonl").read_text().splitlines()[:30]]
    page = browser.new_page()
    page.goto(f"file://{tmp_path / 'page.html'}")
    page.select_option("#method-a", "surprise")
    taken, all_noise, accounted = 0, 0, []
    for number, row in enumerate(rows):
        go_to(page, number)
        shown = page.eval_on_selector_all(".t", "all => all.map(t => [t.textContent, t.matches('.noise')])")
        text, spans = "", []
        for piece, noise in shown:
            if noise:
                spans.append((len(text) + len(piece) - len(piece.lstrip() or piece), len(text) + len(piece)))
            text += piece
        assert text == row["output"] + "<|end|>"
        wrong = [text[start:end] for start, end in row["noise"]]  # the end token is one character there
        assert (
            "".join(text[start:end] for start, end in spans)
            .replace(" ", "")
            .startswith("".join(wrong).replace(" ", ""))
        )
        assert bool(spans) == bool(row["noise"])
        accounted.append(selected(page))
        noisy = page.eval_on_selector_all(".t", "all => all.map(t => t.matches('.noise'))")
        taken += sum(a and b for a, b in zip(accounted[-1], noisy, strict=True))
        all_noise += sum(noisy)
    assert f"of the marked noise on this page {100 * taken / all_noise:.1f} %" in page.locator(".summary").inner_text()
    page.select_option("#method-a", "rho auto")
    for number, mask in enumerate(accounted):
        go_to(page, number)
        assert selected(page) == (mask if belong[number] else [False] * len(mask))
    page.close()
