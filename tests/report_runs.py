"""Run directories like those of the training scripts, generated from a seed."""

import json
import math
import random
from pathlib import Path
from zlib import crc32

from PIL import Image

from common.report.gallery import in_gallery, save_thumbnails
from common.report.run import read_run

CLASSES = ["ApplyEyeMakeup", "ApplyLipstick", "Archery", "BabyCrawling", "BalanceBeam", "BandMarching", "BenchPress"]


def make_run(directory: Path, task: str, samples: int = 60, steps: int = 80, learning_rate: float = 5e-6) -> Path:
    """Write the run directory of a task, DocVQA or UCF-101, with everything that a report shows."""
    chance = random.Random(f"{task} {learning_rate}")
    evaluations = [_evaluation(task, samples, skill, chance) for skill in (0.25, 0.85)]
    for when, evaluation in zip(("before", "after"), evaluations, strict=True):
        write_json(directory / f"eval_{when}.json", evaluation)
    write_json(directory / "train_results.json", {"epoch": 2.0, "train_loss": 0.6123, "train_runtime": 4821.7})
    log = [
        {
            "step": step,
            "loss": 0.3 + 2.5 * math.exp(-step / 25) + abs(chance.gauss(0, 0.08)),
            "eval_loss": 0.42 + 1.8 * math.exp(-step / 30),
            "grad_norm": math.nan if step == 3 else 1 + 4 * math.exp(-step / 12) + abs(chance.gauss(0, 0.3)),
            "learning_rate": learning_rate * (1 - step / steps),
            "images_per_second": 8.6 + chance.gauss(0, 0.15),
            "tokens_per_second": 21000 + chance.gauss(0, 400),
            "mfu": 0.41 + chance.gauss(0, 0.005),
        }
        for step in range(steps)
    ]
    write_json(directory / "trainer_state.json", {"global_step": steps, "epoch": 2.0, "log_history": log})
    settings = {
        "task": task,
        "command": "torchrun --nproc_per_node=8 finetune_hf_trainer_docvqa.py --full_train --bf16 --use_flash_attention "
        f"--batch_size 64 --learning_rate {learning_rate} --num_train_epochs 2 --output_dir output/docvqa",
        "date": "2026-03-14T09:26:53+00:00",
        "base_model": "microsoft/Phi-3.5-vision-instruct",
        "method": "full",
        "data": "nielsr/docvqa_1200_examples: 1,000 rows train, 200 evaluate",
        "hardware": "8 × NVIDIA A100-SXM4-80GB",
        "versions": {"python": "3.12.3", "torch": "2.13.0", "transformers": "5.23.0", "deepspeed": "0.19.0"},
    }
    flags = {"learning_rate": learning_rate, "batch_size": 64, "num_crops": 16, "bf16": True, "hub_model_id": None}
    write_json(directory / "run.json", settings | {"hyperparameters": flags})
    save_thumbnails(
        directory,
        lambda key: (8 if task == "UCF-101" else 1) * [Image.new("RGB", (640, 480), f"#{crc32(key.encode()) % 2**24:06x}")],
        in_gallery(read_run(directory)),
    )
    return directory


def write_json(path: Path, contents: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents), encoding="utf-8")


def _evaluation(task: str, samples: int, skill: float, chance: random.Random) -> dict:
    predictions = []
    for index in range(samples):
        right = chance.random() < skill
        if task == "UCF-101":
            question, answers = f"Which of these is it: {', '.join(CLASSES)}?\nAnswer briefly.", CLASSES
            wrong = [("a person", 0.0), (CLASSES[(index + 1) % len(CLASSES)], 0.0)]
        else:
            question = "Who signed the letter of 12 March to the board of the Northern Dairy Council?" + " Briefly." * (
                index % 2
            )
            answers = ["M. Okafor", "Ana-Lucía Peña"]
            wrong = [("", 0.0), ("dated 12/03/2018", 0.0), ("Ana-Lucía Peñ", 0.8)]
        answer = answers[index % len(answers)]
        prediction, score = (answer, 1.0) if right else chance.choice(wrong)
        row = {"id": f"val-{index:010}", "question": question, "answers": [answer], "prediction": prediction, "score": score}
        predictions.append(row)
    mean = sum(row["score"] for row in predictions) / samples
    if task == "UCF-101":
        values = {"metric": "accuracy", "accuracy": mean, "accuracy_per_class": dict.fromkeys(CLASSES, mean)}
    else:
        values = {"metric": "anls", "anls": mean, "anls_case_sensitive": 0.97 * mean}
    return {**values, "samples": samples, "predictions": predictions}
