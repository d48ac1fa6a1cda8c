"""The demo page: what it loads, its answers, and its use in a browser without the internet."""

import json
import re
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import gradio
import httpx
import numpy as np
import pytest
import torch
from adapters import logits, save_adapter
from browser import chromium, low_contrast, overflow, watched
from conftest import ROOT, TINY
from forked import running_demo
from playwright.sync_api import expect

import tools.demo
from assets.samples.docvqa import draw_split
from common.model.inference import load_full
from common.phi3v import Phi3VProcessor
from tools.demo import Model, example_question, load_models, stream_answer

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> list[tuple[str, str]]:
    """Images of documents, each with a question."""
    directory = tmp_path_factory.mktemp("documents")
    draw_split(directory, "val", 2, np.random.default_rng(0), questions_each=1)
    rows = json.loads((directory / "val_v1.0_withQT.json").read_text())["data"]
    return [(str(directory / row["image"]), f"{row['question']}\nAnswer briefly.") for row in rows]


def test_tokens_that_users_have_added_are_shown():
    processor = Phi3VProcessor.from_pretrained(TINY, num_crops=1)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<loc_1>"]})
    ids = processor.tokenizer("<loc_1>12<|end|>", add_special_tokens=False, return_tensors="pt").input_ids[0]

    def generate(streamer, input_ids, **_):
        for value in (input_ids, *ids[:, None]):
            streamer.put(value)
        streamer.end()

    network = SimpleNamespace(device="cpu", generate=generate)
    assert list(stream_answer(Model("", "", network), processor, "What?", [], 9))[-1] == "<loc_1>12"


def test_long_questions_and_many_images_are_refused():
    page = tools.demo.build_page([Model("Finetuned", "a", None)], None, NEW_TOKENS)
    assert page._queue.max_size == 16
    [answer] = [entry.fn for entry in page.fns.values() if entry.fn]
    for pictures, question in (([], "a" * 20_001), ([("a.png", None)] * 33, "What?")):
        with pytest.raises(gradio.Error, match="at most 20,000 characters and 32 images"):
            next(answer(pictures, question))


@pytest.fixture(scope="module")
def answers(lora, documents) -> list[str]:
    """The answers of the adapter and its base about both images."""
    models, processor = load_models(str(lora))
    pictures = [picture for picture, _ in documents]
    return [list(stream_answer(model, processor, documents[0][1], pictures, NEW_TOKENS))[-1] for model in models]


@pytest.fixture(scope="module")
def internet():
    """A proxy for all requests to the internet, which must not receive any."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        yield f"http://127.0.0.1:{proxy.getsockname()[1]}"
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


@pytest.fixture(scope="module")
def address(lora, internet, tmp_path_factory):
    """The demo of an adapter and its base."""
    uploads = tmp_path_factory.mktemp("uploads")
    environment = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), internet)
    environment |= {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost", "GRADIO_TEMP_DIR": str(uploads)}
    words = ["--model", str(lora), "--max_new_tokens", str(NEW_TOKENS)]
    with running_demo(*words, folder=ROOT, log=uploads / "log", **environment) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def ask(page, question: str, pictures: list[str]) -> None:
    if pictures:
        page.set_input_files("input[type=file]", pictures)
        expect(page.locator(".gallery-container img, .grid-container img, .thumbnails img")).to_have_count(len(pictures))
    page.get_by_label("Question").fill(question)


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1400, "dark")])
def test_the_page_is_readable(browser, address, documents, width, scheme):
    with watched(browser, width, scheme, allowed=address) as page:
        page.goto(address)
        expect(page.get_by_role("heading", name="Ask a finetuned model")).to_be_visible()
        ask(page, documents[0][1], [documents[0][0]])
        assert overflow(page) == 0
        assert low_contrast(page, enough=8) == []


def test_both_models_answer_about_several_images_by_keyboard(browser, address, documents, lora, answers):
    assert answers[0] != answers[1]
    with watched(browser, 1400, allowed=address) as page:
        page.goto(address)
        ask(page, documents[0][1], [picture for picture, _ in documents])
        finetuned, before = page.get_by_label(f"Finetuned: {lora}"), page.get_by_label("Before finetuning:")
        left, right = finetuned.bounding_box(), before.bounding_box()
        assert left["x"] + left["width"] <= right["x"] and abs(left["y"] - right["y"]) < 30, "they stand side by side"
        finetuned.evaluate("""area => {
          window.seen = new Set();
          setInterval(() => window.seen.add(area.value), 1);
        }""")
        page.get_by_label("Question").focus()
        page.keyboard.press("Tab")
        button = page.get_by_role("button", name="Ask", exact=True)
        expect(button).to_be_focused()
        assert button.evaluate("button => getComputedStyle(button).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        expect(before).to_have_value(answers[1], timeout=30_000)
        expect(finetuned).to_have_value(answers[0])
        streamed = page.evaluate("[...window.seen]")
        assert len(streamed) > 1, "the answer did not stream in"
        assert all(answers[0].startswith(piece) for piece in streamed)


def test_errors_are_shown_on_the_page(browser, address, documents, tmp_path):
    (tmp_path / "torn.png").write_bytes(Path(documents[0][0]).read_bytes()[:300])
    with watched(browser, 1400, allowed=address) as page:
        page.goto(address)
        button = page.get_by_role("button", name="Ask", exact=True)
        expect(button).to_be_visible()
        button.click()
        expect(page.get_by_text("Enter a question first.")).to_be_visible()
        ask(page, "What does <|image_2|> show?", [documents[0][0]])
        button.click()
        expect(page.get_by_text("do not match its 1 image")).to_be_visible(timeout=30_000)
    with watched(browser, 1400, allowed=address) as page:
        page.goto(address)
        ask(page, "What?", [str(tmp_path / "torn.png")])
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.get_by_text(re.compile(r"torn\.png cannot be"))).to_be_visible(timeout=30_000)


def test_the_server_listens_only_on_localhost(address):
    port = int(address.rsplit(":", 1)[1])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):  # 0.0.0.0 would take it
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_only_uploaded_files_are_served_and_read(address, documents):
    api = f"{address}/gradio_api"
    assert httpx.get(f"{api}/file={ROOT / 'README.md'}").status_code == 403
    upload = [("files", ("large.png", bytes(21 * 10**6)))]
    assert httpx.post(f"{api}/upload", files=upload, timeout=60).status_code == 413
    outside = [{"image": {"path": documents[0][0], "meta": {"_type": "gradio.FileData"}}, "caption": None}]
    request = {"data": [outside, "What?"], "fn_index": 0, "session_hash": "test"}
    assert httpx.post(f"{api}/queue/join", json=request).status_code == 200
    events = httpx.get(f"{api}/queue/data", params={"session_hash": "test"}, timeout=60).text
    completed = [line for line in events.splitlines() if '"process_completed"' in line]
    assert completed and '"success":false' in completed[0].replace(" ", ""), events


def test_a_full_model_is_compared_with_the_base_named_in_its_run(tmp_path, documents, monkeypatch):
    model = shutil.copytree(TINY, tmp_path / "model")
    picture, question = documents[1]
    (model / "run.json").write_text(json.dumps({"base_model": str(TINY), "question": question}))
    models, processor = load_models(str(model))
    assert example_question(models[0].name) == question and example_question(str(TINY)) == ""
    assert [(model.title, model.name) for model in models] == [("Finetuned", str(model)), ("Before finetuning", str(TINY))]
    streams = [list(stream_answer(model, processor, question, [picture], 4)) for model in models]
    assert streams[0] == streams[1]
    assert streams[0][-1]
    assert len(load_models(str(model), "none")[0]) == 1
    (model / "run.json").write_text(json.dumps({"base_model": str(tmp_path / "moved")}))
    with pytest.raises(ValueError, match=r"moved: set --base to its directory, or omit it with --base none"):
        load_models(str(model))
    (model / "run.json").write_text(json.dumps({"base_model": 5}))
    with pytest.raises(
        ValueError, match=r"run.json: base_model must be a name, a path or null, got '5': delete it, or set --base"
    ):
        load_models(str(model))
    (model / "run.json").write_text(json.dumps({"base_model": "someone/phi", "base_revision": "0123abc"}))
    asked = []
    monkeypatch.setattr(tools.demo, "load_full", lambda base, device, revision: asked.append((base, revision)))
    load_models(str(model))
    load_models(str(model), base=str(TINY))
    assert asked == [("someone/phi", "0123abc"), (str(TINY), None)]


@pytest.mark.parametrize("how", ["gaussian", "pissa"])
def test_an_adapter_is_compared_with_the_base_it_was_trained_on(how, tmp_path, documents):
    """Also if the initialization changed the base's weights, so that disabling the adapter does not restore them."""
    adapter = save_adapter(tmp_path, "--use_lora", "--init_lora_weights", how)
    (_, before), processor = load_models(str(adapter))
    assert (before.title, before.name) == ("Before finetuning", str(TINY))
    pages = [picture for picture, _ in documents]
    with before.context():
        found = logits(before.network, processor, pages)
    torch.testing.assert_close(found, logits(load_full(str(TINY), "cpu"), processor, pages), rtol=0, atol=1e-4)


def test_a_closed_stream_stops_the_generation(lora, documents):
    models, processor = load_models(str(lora))
    picture, question = documents[0]
    answer = stream_answer(models[0], processor, question, [picture], 4000)
    next(answer)
    answer.close()  # a whole answer would take minutes
    assert list(stream_answer(models[1], processor, question, [picture], 4))


def test_a_missing_model_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["demo", "--model", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match=r"error: .*nothing: no such directory"):
        tools.demo.main(tools.demo.parse_args())
