"""vLLM answers as this repository does. Run by ``make serving-test``, which installs vLLM in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from conftest import ROOT
from PIL import ExifTags, Image, ImageDraw
from runs import free_port

from common.data.conversations import pictures, prompt_text
from common.model.inference import load_for_inference
from common.phi3v.processing import control_token_ids, stop_token_ids
from serving.checkpoint import IMAGE_TOKEN, write_model
from tools.merge_lora import merge

PYTHON = os.environ.get("SERVING_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="make serving-test runs it, in vLLM's environment")

CLOSE = 1e-3
QUESTION = "What is the total?"
NEW_TOKENS = 16
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory) -> dict[str, Path]:
    """A full finetune, an adapter on it, and both merged."""
    directory = tmp_path_factory.mktemp("artefacts")
    full = write_model(directory / "full")
    adapter = save_adapter(directory / "adapter", "--use_lora", base=full)
    merge(str(adapter), directory / "merged", torch.float32)
    return {"full finetune": full, "LoRA, merged": directory / "merged", "LoRA, adapter": adapter}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> list[dict[str, Any]]:
    """One picture of one crop, one of two, both, none, and one that is transparent and lies on its side."""
    directory, paths = tmp_path_factory.mktemp("pictures"), []
    sideways = Image.Exif()
    sideways[ExifTags.Base.Orientation] = 6
    kinds: list[tuple[str, tuple[int, int], str, Image.Exif | None]] = [
        ("RGB", (300, 300), "white", None),
        ("RGB", (640, 300), "white", None),
        ("RGBA", (640, 300), "#0000", sideways),
    ]
    for number, (mode, size, background, exif) in enumerate(kinds):
        picture = Image.new(mode, size, background)
        ImageDraw.Draw(picture).text((20, 20), f"TOTAL {number}7.50", fill="black", font_size=60)
        paths.append(str(directory / f"{number}.png"))
        picture.save(paths[-1], exif=exif)
    groups = (paths[:1], paths[1:2], paths[:2], [], paths[2:])
    return [{"conversations": [{"images": group, "user": QUESTION, "assistant": "?"}]} for group in groups]


@pytest.fixture(scope="module")
def expected(artefacts, conversations):
    """What this repository computes for an artefact: tokens, log-probabilities, answers."""
    found: dict[str, list[dict[str, Any]]] = {}

    @torch.no_grad()
    def compute(artefact: str) -> list[dict[str, Any]]:
        if artefact not in found:
            model, processor = load_for_inference(artefacts[artefact], "cpu")
            control, rows = control_token_ids(processor), []
            for conversation in conversations:
                text = prompt_text(conversation, processor)
                inputs = processor(text, [Image.open(path) for path in pictures(conversation)])
                # The vision tower takes nearly all of the time, so it runs once per prompt.
                output = model(**inputs, use_cache=True)
                logits, answer_ids = [output.logits[0]], []
                while len(answer_ids) < NEW_TOKENS and not (answer_ids and answer_ids[-1] in stop_token_ids(processor)):
                    answer_ids.append(int(logits[-1][-1].argmax()))
                    last = torch.tensor([answer_ids[-1:]])
                    logits.append(model(last, past_key_values=output.past_key_values, use_cache=True).logits[0])
                rows.append(
                    {
                        "text": text,
                        "prompt_ids": inputs["input_ids"][0].tolist(),
                        "answer_ids": answer_ids,
                        "answer": processor.tokenizer.decode([token for token in answer_ids if token not in control]),
                        "log_probabilities": torch.cat(logits).log_softmax(-1),
                    }
                )
            found[artefact] = rows
        return found[artefact]

    return compute


def largest_difference(expected: list[dict[str, Any]], answers: list[dict[str, Any]]) -> float:
    """Check tokens and answers, and return the largest difference of a log-probability."""
    differences = []
    for reference, found in zip(expected, answers, strict=True):
        assert found["prompt_ids"] == [IMAGE_TOKEN if token < 0 else token for token in reference["prompt_ids"]]
        assert found["answer_ids"] == reference["answer_ids"]
        # vLLM decodes prompt and answer together, and so keeps the space before the answer's first word.
        assert found["text"].removeprefix(" ") == reference["answer"]
        # After the last token of the answer, only the reference has log-probabilities.
        for values, top in zip(reference["log_probabilities"][:-1], found["log_probabilities"], strict=True):
            assert len(top) >= 20
            tokens = torch.tensor([int(token) for token in top])
            differences.append((values[tokens] - torch.tensor(list(top.values()))).abs().max())
    return torch.stack(differences).max().item()  # NaN if any of them is NaN


def record(client: str, artefact: str, difference: float) -> None:
    """Print a line of the table in docs/serving.md."""
    print(f"| {client} | {artefact} | {difference:.1e} |")


def answer(
    script: str, artefact: Path, rows: list[dict[str, Any]], images: list[list[str]], directory: Path, **options: Any
) -> subprocess.CompletedProcess:
    """Run a script of this folder in vLLM's environment."""
    requests = [{"prompt": row["text"], "images": paths} for row, paths in zip(rows, images, strict=True)]
    (directory / "requests.json").write_text(json.dumps(requests))
    files = [str(artefact), directory / "requests.json", directory / "answers.json", json.dumps(options)]
    return subprocess.run(
        [PYTHON, str(ROOT / "tests/serving" / script), *map(str, files)],
        cwd=directory,  # not the repository's root: the plugin has to be installed
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    ("client", "script", "artefact"),
    [
        ("vLLM, offline, a batch", "answer_with_vllm.py", "full finetune"),
        ("vLLM, offline, a batch", "answer_with_vllm.py", "LoRA, merged"),
        ("transformers of vLLM's environment", "answer_with_transformers.py", "LoRA, merged"),
    ],
)
def test_a_client_gives_our_log_probabilities_and_answers(
    client, script, artefact, artefacts, conversations, expected, tmp_path
):
    rows = expected(artefact)
    run = answer(script, artefacts[artefact], rows, [pictures(row) for row in conversations], tmp_path)
    assert run.returncode == 0, run.stdout[-6000:]
    difference = largest_difference(rows, json.loads((tmp_path / "answers.json").read_text()))
    record(client, artefact, difference)
    assert difference < CLOSE
    first, second = rows[0]["log_probabilities"][-1], rows[1]["log_probabilities"][-1]
    assert (first - second).abs().max() > 100 * CLOSE, "the picture changes nothing, so that nothing is tested"


def test_vllm_says_that_it_cannot_load_the_adapter(artefacts, tmp_path):
    run = answer("answer_with_vllm.py", artefacts["full finetune"], [], [], tmp_path, enable_lora=True)
    assert run.returncode != 0
    assert "does not support LoRA" in run.stdout, run.stdout[-3000:]


def test_the_server_answers_an_openai_client(artefacts, conversations, expected, tmp_path):
    """What `vllm serve` runs: its command line fails in the CPU build, which has no package called vllm."""
    rows, port = expected("LoRA, merged"), free_port()
    command = [
        PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--port",
        str(port),
        "--model",
        str(artefacts["LoRA, merged"]),
    ]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--max-num-batched-tokens", "2048", "--max-num-seqs", "2"]
    command += ["--enforce-eager", "--skip-mm-profiling", "--limit-mm-per-prompt", '{"image": 2}']
    # A random model would fill the answer with the white space that JSON allows.
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        requests = [{"images": pictures(row), "question": QUESTION} for row in conversations]
        (tmp_path / "requests.json").write_text(json.dumps(requests))
        script = [PYTHON, str(ROOT / "tests/serving/ask_server.py"), f"http://127.0.0.1:{port}/v1"]
        run = subprocess.run(
            [*script, str(artefacts["LoRA, merged"]), str(tmp_path / "requests.json"), str(tmp_path / "answers.json")],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert run.returncode == 0, run.stdout[-3000:] + (tmp_path / "log").read_text()[-3000:]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, 15)
            server.wait(60)
    answers = json.loads((tmp_path / "answers.json").read_text())
    difference = largest_difference(rows, answers["chat"])
    record("vLLM's server, OpenAI client", "LoRA, merged", difference)
    assert difference < CLOSE
    assert json.loads(answers["structured"])["total"].isdigit()


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-6000:]
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no answer from {url}\n{log.read_text()[-3000:]}")
