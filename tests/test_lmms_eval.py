"""lmms-eval's figures are those of the scripts. Run by ``make lmms-test``, which installs lmms-eval beside the environment."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from statistics import fmean

import pytest
from conftest import ROOT, TINY

import finetune_hf_trainer_hateful_memes as memes
import finetune_hf_trainer_nlvr2 as nlvr2
from assets.draw_samples import draw_samples
from common.evaluation.generation import generate_answers
from common.evaluation.metrics import anls
from common.model.inference import load_for_inference

pytest.importorskip("lmms_eval", reason="make lmms-test runs it")

OPTIONS = Namespace(eval_batch_size=4, max_new_tokens=16, dataloader_num_workers=0, tqdm=False, eval_by_likelihood=True)
POST_PROMPT = "\nAnswer the question using a single word or phrase."
DOCVQA = """\
task: docvqa_local
dataset_path: json
dataset_kwargs: {data_files: {validation: data/docvqa/rows.jsonl}}
test_split: validation
output_type: generate_until
doc_to_visual: !function local.image
doc_to_text: !function local.docvqa_doc_to_text
doc_to_target: answers
generation_kwargs: {max_new_tokens: 16, temperature: 0, do_sample: false}
lmms_eval_specific_kwargs: {default: {pre_prompt: "", post_prompt: "\\nAnswer the question using a single word or phrase."}}
metric_list: [{metric: anls, aggregation: mean, higher_is_better: true}]
"""
LOCAL = """\
from lmms_eval.tasks.docvqa.utils import docvqa_doc_to_text
from PIL import Image

def image(doc):
    return [Image.open("data/docvqa/" + doc["image"]).convert("RGB")]
"""


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Run lmms-eval on drawn samples; return its results by task, and the directory of the samples."""
    folder = tmp_path_factory.mktemp("lmms")
    for task, counts in (("docvqa", (1, 4)), ("nlvr2", (1, 3)), ("hateful_memes", (8, 12))):
        draw_samples(task, folder / "data" / task, *counts)
    rows = json.loads((folder / "data/docvqa/val_v1.0_withQT.json").read_text())["data"]
    (folder / "data/docvqa/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = folder / "tasks"
    tasks.mkdir()
    for path in (ROOT / "lmms_tasks").iterdir():
        if path.is_file():
            (tasks / path.name).write_bytes(path.read_bytes())
    (tasks / "docvqa_local.yaml").write_text(DOCVQA)
    (tasks / "local.py").write_text(LOCAL)
    command = [sys.executable, "-m", "lmms_eval", "--model", "phi3v_native", "--model_args", f"pretrained={TINY}"]
    command += ["--tasks", "docvqa_local,nlvr2_dev,hateful_memes_dev_seen", "--include_path", str(tasks)]
    run = subprocess.run(
        [*command, "--batch_size", "4", "--output_path", "out"],
        cwd=folder,
        env=os.environ | {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    paths = list((folder / "out").rglob("*results.json"))
    assert run.returncode == 0 and len(paths) == 1, run.stdout[-6000:]  # it returns 0 even if the evaluation failed
    results = json.loads(paths[0].read_text())["results"]
    return {task: {key.partition(",")[0]: value for key, value in found.items()} for task, found in results.items()}, folder


@pytest.fixture(scope="module")
def model():
    return load_for_inference(TINY, "cpu")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_docvqa_with_its_own_prompt_and_metric(figures, model):
    found, folder = figures
    rows = lines(folder / "data/docvqa/rows.jsonl")
    conversations = [
        {"conversations": [{"images": [folder / "data/docvqa" / row["image"]], "user": row["question"] + POST_PROMPT}]}
        for row in rows
    ]
    answers = generate_answers(*model, conversations, OPTIONS)
    expected = fmean(anls(answer, row["answers"]) for answer, row in zip(answers, rows, strict=True))
    assert found["docvqa_local"]["anls"] == pytest.approx(expected)
    assert 0 < expected < 1, "all answers score the same, so that nothing is tested"


def test_nlvr2(figures, model):
    found, folder = figures
    data = folder / "data/nlvr2"
    rows = [nlvr2.from_official(data, "dev", row) for row in lines(data / "dev.json")]
    expected = nlvr2.evaluate(*model, rows, Namespace(**vars(OPTIONS) | {"data_dir": data}))
    assert {name: found["nlvr2_dev"][name] for name in expected.values} == pytest.approx(expected.values)
    assert nlvr2.QUESTION.format(sentence="{{sentence}}") in (ROOT / "lmms_tasks/nlvr2_dev.yaml").read_text()


def test_hateful_memes(figures, model):
    found, folder = figures
    data = folder / "data/hateful_memes"
    rows = [memes.from_official(data, row) for row in lines(data / "dev_seen.jsonl")]
    expected = memes.evaluate(*model, rows, OPTIONS)
    assert {name: found["hateful_memes_dev_seen"][name] for name in expected.values} == pytest.approx(expected.values)
    assert json.dumps(memes.QUESTION) in (ROOT / "lmms_tasks/hateful_memes_dev_seen.yaml").read_text()
