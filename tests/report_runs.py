"""Run directories as the training scripts leave them, one of each task, made up from a seed."""

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
TASKS = ("DocVQA", "Hateful Memes", "NLVR2", "UCF-101")


def make_run(directory: Path, task: str, samples: int = 200, steps: int = 160, learning_rate: float = 5e-6) -> Path:
    """Write the run directory of `task` with everything that a report shows."""
    chance = random.Random(f"{task} {learning_rate}")
    rows = [_row(task, index, chance) for index in range(samples)]
    before = _evaluation(task, rows, 0.25, chance)
    after = _evaluation(task, rows, 0.85, chance)
    write_json(directory / "eval_before.json", before)
    write_json(directory / "eval_after.json", after)
    write_json(directory / "trainer_state.json", _trainer_state(steps, learning_rate, chance))
    write_json(directory / "train_results.json", {"epoch": 2.0, "train_loss": 0.6123, "train_runtime": 4821.7})
    write_json(directory / "run.json", _settings(task, learning_rate))
    numbers = {row["id"]: number for number, row in enumerate(rows)}
    chosen = [key for ids in select_gallery(before, after).values() for key in ids]
    save_gallery_images(directory, lambda key: _pictures(task, numbers[key]), chosen)
    return directory


def write_json(path: Path, contents: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents), encoding="utf-8")


def _row(task: str, index: int, chance: random.Random) -> dict:
    if task == "DocVQA":
        total = f"{chance.randint(1, 2000)}.{chance.randint(0, 99):02}"
        return (
            {
                "id": str(49153 + index),
                "question": "What is the total amount on the receipt?",
                "answers": [total, f"RM {total}"],
            }
            if index % 2
            else {
                "id": str(49153 + index),
                "question": "Who signed the letter of 12 March to the board of the Northern Dairy Council?",
                "answers": [chance.choice(["M. Okafor", "Ana-Lucía Peña", "J. R. Whitfield", "Wei Zhang"])],
            }
        )
    if task == "UCF-101":
        label = CLASSES[index % len(CLASSES)]
        question = f"Classify the video into one of the following classes: {', '.join(CLASSES)}."
        return {"id": f"val-{index:010}", "question": question, "answers": [label]}
    label = index % 2
    question = "Does this meme promote hate speech?\nAnswer yes or no."
    if task == "NLVR2":
        question = (
            "The first image is the image on the left, the second image is the image on the right. Given the left and right "
            'images, does the statement "There are exactly two dogs lying on grass." hold true? Answer yes or no.'
        )
    return {"id": f"dev-{index}-0-1", "question": question, "answers": ["Yes." if label else "No."], "label": label}


def _evaluation(task: str, rows: list[dict], skill: float, chance: random.Random) -> dict:
    predictions = [_prediction(task, row, skill, chance) for row in rows]
    mean = sum(row["score"] for row in predictions) / len(predictions)
    evaluation = {"metric": "accuracy", "accuracy": mean}
    if task == "DocVQA":
        evaluation = {"metric": "anls", "anls": mean, "anls_case_sensitive": 0.97 * mean}
    if task == "Hateful Memes":
        evaluation = {"metric": "auroc", "auroc": 0.5 + skill / 2, "accuracy": mean}
    if task == "NLVR2":
        evaluation["consistency"] = mean**2
    if task == "UCF-101":
        of_class = {label: [row["score"] for row in predictions if row["answers"][0] == label] for label in CLASSES}
        evaluation["accuracy_per_class"] = {label: sum(scores) / len(scores) for label, scores in of_class.items()}
    return {**evaluation, "samples": len(rows), "predictions": predictions}


def _prediction(task: str, row: dict, skill: float, chance: random.Random) -> dict:
    right = chance.random() < skill
    answer, score = row["answers"][0], 1.0
    if task == "DocVQA":
        if not right:
            answer, score = chance.choice([("", 0.0), ("the receipt is dated 12/03/2018", 0.0), (answer[:-1], 0.8)])
        return {**row, "prediction": answer, "score": score}
    if task == "UCF-101":
        answer = answer if right else chance.choice([*CLASSES, "a person"])
        return {**row, "prediction": answer, "score": float(answer == row["answers"][0])}
    answer = answer if right else {"Yes.": "No.", "No.": "Yes."}[answer]
    row = {**row, "prediction": answer, "score": float(right)}
    if task == "NLVR2":
        del row["label"]
        return row
    leaning = (1 if row["label"] else -1) * (4 * skill) + chance.gauss(0, 1.6)
    return {**row, "p_yes": 1 / (1 + math.exp(-leaning))}


def _trainer_state(steps: int, learning_rate: float, chance: random.Random) -> dict:
    log = []
    for step in range(1, steps + 1):
        log.append(
            {
                "loss": 0.3 + 2.5 * math.exp(-step / 25) + abs(chance.gauss(0, 0.08)),
                "grad_norm": math.nan if step == 3 else 1 + 4 * math.exp(-step / 12) + abs(chance.gauss(0, 0.3)),
                "learning_rate": learning_rate * min(step / 50, (steps - step) / max(steps - 50, 1)),
                "images_per_second": 8.6 + chance.gauss(0, 0.15),
                "tokens_per_second": 21000 + chance.gauss(0, 400),
                "mfu": 0.41 + chance.gauss(0, 0.005),
                "epoch": 2 * step / steps,
                "step": step,
            }
        )
        if step % (steps // 4) == 0:
            log.append({"eval_loss": 0.42 + 1.8 * math.exp(-step / 30), "epoch": 2 * step / steps, "step": step})
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
            "wd": 0.0,
            "bf16": True,
        },
    }


def _pictures(task: str, number: int) -> list[Image.Image]:
    chance = random.Random(number)
    size, count = {
        "DocVQA": ((850, 1100), 1),
        "Hateful Memes": ((550, 400), 1),
        "NLVR2": ((640, 480), 2),
        "UCF-101": ((320, 240), 8),
    }[task]
    return [_picture(size, chance, page=task == "DocVQA") for _ in range(count)]


def _picture(size: tuple[int, int], chance: random.Random, page: bool) -> Image.Image:
    width, height = size
    if page:
        picture = Image.new("L", size, 250)
        draw = ImageDraw.Draw(picture)
        for line in range(60, height - 60, 34):
            draw.line((70, line, 70 + chance.randint(100, width - 140), line), fill=chance.randint(20, 110), width=9)
        return picture
    picture = Image.new("RGB", size, tuple(chance.randint(120, 220) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y, radius = chance.randint(0, width), chance.randint(0, height), chance.randint(20, height // 3)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(chance.randint(30, 230) for _ in range(3)))
    return picture
