"""The model card (``README.md``) of a run: results, how to load the model, and settings."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from common.runtime.files import check_config, read_json, write_file
from common.runtime.process import InputError, is_main_process

from .run import EVALUATION_FIELDS, OPTIONAL_FIELDS, RUN_FIELDS

RUN_FILES = ("run.json", "eval_before.json", "eval_after.json")

CARD = """\
---
{{ front_matter }}
---

# {{ title }}

{{ "An adapter for " if adapter }}{{ base }}{% if run.base_revision %} at revision `{{ run.base_revision }}`{% endif -%}
, finetuned on {{ run.task }} (method: {{ run.method }}){{ ", quantized" if quantized }}.

{% if metrics %}
## Results

| {{ samples }} samples | before | after |
| --- | --- | --- |
{% for row in metrics %}
| {{ row | join(" | ") }} |
{% endfor %}

{% endif %}
## Usage

Run this in the directory of the finetuning recipes, where `common` contains the model's code:

```python
import common.phi3v, {{ "peft, " if adapter }}torch, transformers
model = {{ loader }}ForCausalLM.from_pretrained({{ name }}, dtype=torch.bfloat16)
processor = transformers.AutoProcessor.from_pretrained({{ name }})
```

## Training

```
{{ run.command }}
```

{{ run.data }}. Run on {{ run.hardware }}, started {{ run.date }}.

| hyperparameter | value |
| --- | --- |
{% for key, value in hyperparameters.items() %}
| {{ key }} | {{ value | replace("|", "\\\\|") }} |
{% endfor %}

Versions: {% for library, number in run.versions.items() %}{{ ", " if not loop.first }}{{ library }} {{ number }}{% endfor %}.
"""


def write_model_card(output_dir: str | Path, name: str | Path | None = None) -> None:
    """Write the model card ``README.md`` on the main process, from the files in the run directory.

    Parameters
    ----------
    output_dir : str or Path
        Run directory with ``run.json``. The results are read from ``eval_before.json`` and ``eval_after.json``. With
        ``adapter_config.json``, the model is an adapter.
    name : str or Path, optional
        Name from which the model is loaded, such as its Hub id. Default: ``output_dir``.

    Raises
    ------
    InputError
        If ``run.json`` is missing.
    """
    if not is_main_process():
        return
    directory, name = Path(output_dir), str(name or output_dir)
    names = (*RUN_FILES, "config.json")
    run, before, after, config = (
        read_json(path, "delete it") if (path := directory / file).is_file() else {} for file in names
    )
    if not run:
        raise InputError(f"{directory} has no run.json, which the model card requires; pass the --output_dir of a training run")
    check_config(run, RUN_FIELDS, directory / "run.json", required=True)
    check_config(run, OPTIONAL_FIELDS, directory / "run.json")
    for file, evaluation in ((RUN_FILES[1], before), (RUN_FILES[2], after)):
        check_config(evaluation, EVALUATION_FIELDS, directory / file)
    adapter, quantized = (directory / "adapter_config.json").is_file(), "quantization_config" in config
    base, datasets, hyperparameters = run["base_model"], run.get("datasets"), run["hyperparameters"]
    # A quantized model is derived from the finetuned one, if that is on the Hub.
    origin = (quantized and hyperparameters.get("hub_model_id")) or (base if _on_hub(base) else None)
    relation = "adapter" if adapter else "quantized" if quantized and origin != base else "finetune"
    task, method = (re.sub(r"[^a-z0-9]+", "-", run[key].lower()).strip("-") for key in ("task", "method"))
    first, last = (
        {key: value for key, value in evaluation.items() if isinstance(value, float) and math.isfinite(value)}
        for evaluation in (before, after)
    )
    metrics = sorted(first | last, key=lambda metric: metric != (after or before).get("metric"))
    # The Hub requires a type. Files have none, so it is the task then.
    dataset = {"dataset_type": task} | {f"dataset_{key}": value for key, value in run.get("eval_set", {}).items()}
    samples = (after or before).get("samples", 0)
    front_matter = ModelCardData(
        base_model=origin,  # the Hub accepts only ids here
        base_model_relation=relation if origin else None,
        datasets=datasets or None,
        eval_results=[
            EvalResult(
                task_type="image-text-to-text",
                dataset_name=f"{run['task']}, {samples:,} samples",
                metric_type=metric,
                metric_value=last[metric],
                **dataset,
            )
            for metric in metrics
            if metric in last
        ]
        or None,
        library_name="peft" if adapter else "transformers",
        license="mit",  # as the published models
        model_name=Path(name).name,
        pipeline_tag="image-text-to-text",
        tags=["phi3_v", "finetuned", task, method],
    )
    card = jinja2.Template(CARD, trim_blocks=True, keep_trailing_newline=True).render(
        front_matter=front_matter.to_yaml(),
        title=_escaped(Path(name).name),
        name=repr(name),
        adapter=adapter,
        loader="peft.AutoPeftModel" if adapter else "transformers.AutoModel",
        quantized=quantized,
        base=f"[{base}](https://huggingface.co/{base})" if _on_hub(base) else f"`{_escaped(base.replace('`', ''))}`",
        run=_escaped(run) | {"command": run["command"].replace("```", "")},
        samples=f"{samples:,}",
        metrics=[
            (_escaped(metric), *(f"{of[metric]:.4f}" if metric in of else "—" for of in (first, last))) for metric in metrics
        ],
        hyperparameters={
            _escaped(key): _escaped(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            for key, value in hyperparameters.items()
            if value is not None
        },
    )
    write_file(directory / "README.md", str(ModelCard(card)))


def _escaped(value: Any) -> Any:
    """Return a text that Markdown does not take for HTML or for several lines; of an object, all its texts."""
    if isinstance(value, dict):
        return {_escaped(key): _escaped(content) for key, content in value.items()}
    return " ".join(html.escape(value, quote=False).splitlines()) if isinstance(value, str) else value


def _on_hub(name: str) -> bool:
    """Whether a name is a Hub id, and not a directory."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).is_dir()
