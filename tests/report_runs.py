"""Run directories like those of the training scripts, generated from a seed."""

import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

from common.report.gallery import save_gallery_images, select_gallery

CLASSES = [
    "ApplyEyeMakeup",
    "ApplyLipstick",
    "Archery",
    "BabyCrawling",
    "BalanceBeam",
    "BandMarching",
    "BasketballDunk",
    "BenchPress",
]
QUESTIONS = {
    "DocVQA": "Who signed the letter of 12 March to the board of the Northern Dairy Council?",
    "Hateful Memes": "Does this meme promote hate speech?\nAnswer yes or no.",
    "NLVR2": "The first image is on the left. Does the statement hold true?\nAnswer yes or no.",
    "UCF-101": f"Classify the video into one of the following classes: {', '.join(CLASSES)}.",
}
ANSWERS = {"DocVQA": ["M. Okafor", "Ana-Lucía Peña"], "UCF-101": CLASSES}
ANSWERS |= {f"{count} answers": [f"Item {number} of the shop's catalogue" for number in range(count)] for count in (5, 40, 400)}
TASKS = tuple(QUESTIONS)
OWN = tuple(task for task in ANSWERS if task not in TASKS)
IMAGES = {"NLVR2": 2, "UCF-101": 8}


def make_run(directory: Path, task: str, samples: int = 200, steps: int = 160, learning_rate: float = 5e-6) -> Path:
    """Write the run directory of `task` with everything that a report shows."""
    chance = random.Random(f"{task} {learning_rate}")
    before, after = (_evaluation(task, samples, skill, chance) for skill in (0.25, 0.85))
    write_json(directory / "eval_before.json", before)
    write_json(directory / "eval_after.json", after)
    write_json(directory / "trainer_state.json", _trainer_state(steps, learning_rate, chance))
    write_json(directory / "train_results.json", {"epoch": 2.0, "train_loss": 0.6123, "train_runtime": 4821.7})
    write_json(directory / "run.json", _settings(task, learning_rate))
    chosen = [key for ids in select_gallery([before["predictions"], after["predictions"]]).values() for key in ids]
    save_gallery_images(directory, lambda key: [_picture(key) for _ in range(IMAGES.get(task, 1))], chosen)
    return directory


def write_json(path: Path, contents: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents), encoding="utf-8")


def _evaluation(task: str, samples: int, skill: float, chance: random.Random) -> dict:
    answers = ANSWERS.get(task, ["No.", "Yes."])
    predictions = []
    for index in range(samples):
        label = index % len(answers)
        right, question = (
            chance.random() < skill,
            QUESTIONS.get(task, "Which item is it?") + (" Answer briefly." if index % 2 else "") * (task == "DocVQA"),
        )
        row = {"id": f"val-{index:010}", "question": question, "answers": [answers[label]], "score": float(right)}
        row["prediction"] = answers[label] if right else chance.choice([*answers[:label], *answers[label + 1 :], "a person"])
        if task == "DocVQA" and not right:
            row["prediction"], row["score"] = chance.choice([("", 0.0), ("dated 12/03/2018", 0.0), (answers[label][:-1], 0.8)])
        if task == "Hateful Memes":
            row |= {"label": label, "p_yes": 1 / (1 + math.exp((-1) ** label * 4 * skill + chance.gauss(0, 1.6)))}
        predictions.append(row)
    mean = sum(row["score"] for row in predictions) / samples
    metrics = {
        "DocVQA": {"metric": "anls", "anls": mean, "anls_case_sensitive": 0.97 * mean},
        "Hateful Memes": {"metric": "auroc", "auroc": 0.5 + skill / 2, "accuracy": mean},
        "NLVR2": {"metric": "accuracy", "accuracy": mean, "consistency": mean**2},
        "UCF-101": {"metric": "accuracy", "accuracy": mean, "accuracy_per_class": dict.fromkeys(CLASSES, mean)},
    }
    metric = metrics.get(task, {"metric": "exact", "exact": mean, "anls": mean})
    return {**metric, "samples": samples, "predictions": predictions}


def _trainer_state(steps: int, learning_rate: float, chance: random.Random) -> dict:
    log: list[dict] = []
    for step in range(1, steps + 1):
        place = {"epoch": 2 * step / steps, "step": step}
        figures = {
            "loss": 0.3 + 2.5 * math.exp(-step / 25) + abs(chance.gauss(0, 0.08)),
            "grad_norm": math.nan if step == 3 else 1 + 4 * math.exp(-step / 12) + abs(chance.gauss(0, 0.3)),
            "learning_rate": learning_rate * min(step / 50, (steps - step) / max(steps - 50, 1)),
            "images_per_second": 8.6 + chance.gauss(0, 0.15),
            "tokens_per_second": 21000 + chance.gauss(0, 400),
            "mfu": 0.41 + chance.gauss(0, 0.005),
        }
        log.append(figures | place)
        if step % (steps // 4) == 0:
            log.append({"eval_loss": 0.42 + 1.8 * math.exp(-step / 30)} | place)
    log.append({"train_runtime": 4821.7, "train_loss": 0.6123, "epoch": 2.0, "step": steps})
    return {"global_step": steps, "epoch": 2.0, "log_history": log}


def _settings(task: str, learning_rate: float) -> dict:
    return {
        "task": task,
        "command": "torchrun --nproc_per_node=8 finetune_hf_trainer_docvqa.py --full_train --bf16 --use_flash_attention "
        f"--batch_size 64 --learning_rate {learning_rate} --num_train_epochs 2 --output_dir output/docvqa",
        "date": "2026-03-14T09:26:53+00:00",
        "base_model": "microsoft/Phi-3.5-vision-instruct",
        "method": "full",
        "data": "nielsr/docvqa_1200_examples: 1,000 rows train, 200 evaluate",
        "hardware": "8 × NVIDIA A100-SXM4-80GB",
        "versions": {"python": "3.12.3", "torch": "2.13.0", "transformers": "5.23.0", "deepspeed": "0.19.0"},
        "hyperparameters": {
            "learning_rate": learning_rate,
            "batch_size": 64,
            "num_crops": 16,
            "dataloader_num_workers": 4,
            "bf16": True,
            "hub_model_id": None,
        },
    }


def _picture(key: str) -> Image.Image:
    chance = random.Random(key)
    picture = Image.new("RGB", (640, 480), tuple(chance.randint(120, 220) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y, radius = chance.randint(0, 640), chance.randint(0, 480), chance.randint(20, 160)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(chance.randint(30, 230) for _ in range(3)))
    return picture
