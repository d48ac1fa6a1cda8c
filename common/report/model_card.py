"""The model card (``README.md``) of a run: results, how to load the model, and settings."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from common.runtime import InputError, is_main_process, read_json, write_file

RUN_FILES = ("run.json", "eval_before.json", "eval_after.json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

CARD = """\
# {name}

{introduction}

{results}## Usage

Run this in the directory of the finetuning recipes, where `common` contains the model's code:

```python
{loading}
```

## Training

```
{command}
```

{facts}

| hyperparameter | value |
| --- | --- |
{hyperparameters}

Versions: {versions}.
"""

LOAD_MODEL = """\
import common, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({name!r}, dtype=torch.bfloat16)
processor = transformers.AutoProcessor.from_pretrained({name!r})"""

LOAD_ADAPTER = """\
import common, peft, torch, transformers
model = peft.AutoPeftModelForCausalLM.from_pretrained({name!r}, dtype=torch.bfloat16)
processor = transformers.AutoProcessor.from_pretrained({name!r})"""


def write_model_card(output_dir: str | Path, name: str | Path | None = None, licence: str = "mit") -> None:
    """Write the model card ``README.md`` on the main process, from the files in the run directory.

    Parameters
    ----------
    output_dir : str or Path
        Run directory with ``run.json``. The results are read from ``eval_before.json`` and ``eval_after.json``. With
        ``adapter_config.json``, the model is an adapter.
    name : str or Path, optional
        Name from which the model is loaded, such as its Hub id. Default: ``output_dir``.
    licence : str
        License identifier of the Hub. Default: the license of the published models.

    Raises
    ------
    InputError
        If ``run.json`` is missing.
    """
    if not is_main_process():
        return
    directory, name = Path(output_dir), str(name or output_dir)
    run, before, after = (read_json(path, "delete it") if (path := directory / file).is_file() else {} for file in RUN_FILES)
    if not run:
        raise InputError(f"{directory} has no run.json, which the model card requires; pass the --output_dir of a training run")
    is_adapter = (directory / "adapter_config.json").is_file()
    data = _front_matter(run, after, Path(name).name, is_adapter, licence)
    card = CARD.format(
        name=Path(name).name,
        introduction=_introduction(run, is_adapter),
        results=_results(before, after),
        loading=(LOAD_ADAPTER if is_adapter else LOAD_MODEL).format(name=name),
        command=run["command"],
        facts=f"{run['data']}. Run on {run['hardware']}, started {run['date']}.",
        hyperparameters="\n".join(f"| {key} | {_cell(value)} |" for key, value in run["hyperparameters"].items()),
        versions=", ".join(f"{library} {number}" for library, number in run["versions"].items()),
    )
    write_file(directory / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card}")))


def _front_matter(run: dict[str, Any], after: dict[str, Any], name: str, is_adapter: bool, licence: str) -> ModelCardData:
    datasets = run.get("datasets", [])
    results = {}
    if after:
        results["eval_results"] = [
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=datasets[0] if datasets else _slug(run["task"]),
                dataset_name=run["task"],
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in _metrics(after).items()
        ]
    return ModelCardData(
        # The Hub accepts only ids here.
        base_model=run["base_model"] if _is_hub_id(run["base_model"]) else None,
        datasets=datasets or None,
        library_name="peft" if is_adapter else "transformers",
        license=licence,
        model_name=name,
        pipeline_tag="image-text-to-text",
        tags=["phi3_v", "finetuned", _slug(run["task"]), _slug(run["method"])],
        **results,
    )


def _introduction(run: dict[str, Any], is_adapter: bool) -> str:
    base, revision = run["base_model"], run["base_revision"]
    linked = f"[{base}](https://huggingface.co/{base})" if _is_hub_id(base) else f"`{base}`"
    at = f" at revision `{revision}`" if revision else ""
    what = f"An adapter for {linked}{at}" if is_adapter else f"{linked}{at}"
    return f"{what}, finetuned on {run['task']} (method: {run['method']})."


def _results(before: dict[str, Any], after: dict[str, Any]) -> str:
    if not (before or after):
        return ""
    first, last = _metrics(before), _metrics(after)
    rows = [f"| {metric} | {_score(first, metric)} | {_score(last, metric)} |" for metric in first | last]
    samples = (after or before)["samples"]
    return "\n".join(["## Results\n", f"| {samples:,} samples | before | after |", "| --- | --- | --- |", *rows, "\n"])


def _metrics(evaluation: dict[str, Any]) -> dict[str, float]:
    """Return the finite metrics, the main metric first."""
    figures = {key: value for key, value in evaluation.items() if isinstance(value, float) and math.isfinite(value)}
    return {key: figures[key] for key in sorted(figures, key=lambda key: key != evaluation["metric"])}


def _score(figures: dict[str, float], metric: str) -> str:
    return f"{figures[metric]:.4f}" if metric in figures else "—"


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|")


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).is_dir()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
