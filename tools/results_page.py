"""``results/README.md``: the published tables, and beside each figure what this repository measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "published.json"
METHOD_TITLES = {"full": "full", "frozen": "full, frozen vision", "lora": "LoRA", "qlora": "QLoRA"}
NOT_MEASURED = "not measured"

PAGE = """\
# Results

Rendered by `python -m tools.reproduce`; don't edit by hand. The columns *published* were published upstream, with the recipe
that this one follows, and were **not measured here**; they are kept as data in [published.json](published.json). The columns
*measured* hold what this repository's scripts measured, each cell with the hardware and the date, and in the file it links to
the command, the versions and all figures.

`python -m tools.reproduce nlvr2 --row full` runs a row with its hyperparameters and model on the GPUs at hand, `--all` a
task's whole table, going on where it was interrupted; `--list` prints all rows, `--dry_run` the command.

{accuracy}

## Speed

Published for DocVQA: {mean_tokens:,} tokens a sample on average, {num_crops} crops, batch {batch_size}. Peak memory is that of
one GPU. What was measured here, on other hardware, stands in [docs/performance.md](../docs/performance.md).

{speed}

## Doubts about the published figures

- **Frozen vision, speed.** The row of 31.736 images per second exceeds what 8 × A100 can compute: 106 % of their bf16 peak,
  counted with recomputation. So its backward pass can't have reached the decoder. Here a frozen tower does not cut the
  decoder off: every layer of it gets a gradient.
- **Frozen vision, accuracy.** For the same reason all accuracies of these rows are suspect.
- **Splits.** They are not the benchmarks' official ones. DocVQA: 200 test rows of `nielsr/docvqa_1200_examples`. Hateful Memes
  and NLVR2: the first 500 rows of the training data in `HuggingFaceM4/the_cauldron`.
- **Metrics.** They compare strings, and are not the benchmarks' official ones. ANLS is case-sensitive, so
  `anls_case_sensitive` stands beside it here; the benchmark's own is in each file as `anls`. For Hateful Memes it is the
  accuracy of the generated answer; the data set's own AUROC is in each file.
- **Wording.** The published recipe asks about memes in the eleven wordings of the hub's rows, the scripts here in one.
{others}{embedded}"""

OTHERS = """
## Other models, measured

With the hyperparameters of a row but another model than the published one, so they don't compare with it.

{table}
"""

EMBEDDED = """
## Embedded samples, measured

The tiny checkpoint on drawn sample data, with `--embedded`: these figures show that the course of a row runs from end to end,
and **say nothing about the real models or data sets**.

{table}
"""


def load_published() -> dict[str, Any]:
    """The published tables, as they lie in ``results/published.json``."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def render_page(records: dict[str, dict[str, Any]]) -> str:
    """Render the page.

    Parameters
    ----------
    records : dict
        What was measured, by file name, as :mod:`tools.reproduce` writes it.

    Returns
    -------
    str
        Markdown.
    """
    published = load_published()
    ours = {(record["task"], record["row"]): (name, record) for name, record in records.items() if compares(record)}
    others = {name: record for name, record in records.items() if not record["embedded"] and not compares(record)}
    embedded = {name: record for name, record in records.items() if record["embedded"]}
    speed = published["speed"]
    return PAGE.format(
        accuracy="\n\n".join(_accuracy(task, table, ours) for task, table in published["accuracy"].items()),
        speed=_speed(speed["rows"]),
        others=OTHERS.format(table=_measured_alone(others)) if others else "",
        embedded=EMBEDDED.format(table=_measured_alone(embedded)) if embedded else "",
        **{name: speed[name] for name in ("mean_tokens", "num_crops", "batch_size")},
    )


def compares(record: dict[str, Any]) -> bool:
    """Whether a measured figure may stand beside the published one: the real data, and the model that was published."""
    return not record["embedded"] and record["base_model"] == load_published()["accuracy"][record["task"]]["model"]


def percent(table: dict[str, Any], share: float) -> str:
    """A measured share as the published table writes its own: in percent, with as many decimals."""
    return f"{100 * share:.{table['decimals']}f}"


def scientific(rate: float) -> str:
    """A learning rate as people write it: ``5e-6``."""
    return f"{rate:.0e}".replace("e-0", "e-")


def _accuracy(task: str, table: dict[str, Any], ours: dict[tuple[str, str], tuple[str, dict[str, Any]]]) -> str:
    lines = []
    for name, row in table["rows"].items():
        lora = f"{row['lora_rank']} / {row['lora_alpha']}" if "lora_rank" in row else "–"
        value = f"{row['published']:.{table['decimals']}f}"
        measured = _cell(*ours[task, name], table) if (task, name) in ours else NOT_MEASURED
        cells = [f"`{name}`", METHOD_TITLES[row["method"]], row["precision"], lora, scientific(row["learning_rate"])]
        lines.append([*cells, row["num_train_epochs"], value, measured])
    lines += [["", method, "", "", "", "", "none published", NOT_MEASURED] for method in table["none_published"]]
    titles = ["`--row`", "method", "precision", "LoRA rank / α", "learning rate", "epochs"]
    metric = table["metric_title"]
    heading = f"## {table['title']}\n\nModel `{table['model']}`, batch {table['batch_size']}; {metric} in percent.\n\n"
    return heading + markdown_table([*titles, f"{metric}, published upstream", f"{metric}, measured here"], lines)


def _cell(name: str, record: dict[str, Any], table: dict[str, Any]) -> str:
    value = percent(table, record["after"][table["metric"]])
    return f"[{value}]({name}) ({record['hardware']}, {record['date'][:10]})"


def _speed(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        method = METHOD_TITLES[row["method"]] + (" + flash attention" if row["flash_attention"] else "")
        figures = [f"{row['images_per_second']:.3f}", f"~{row['peak_memory_gb']}"]
        lines.append([row["hardware"], row["nodes"], method, *figures])
    titles = ["hardware of a node", "nodes", "method", "images / s, published upstream", "peak GB, published upstream"]
    return markdown_table(titles, lines)


def _measured_alone(records: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, record in sorted(records.items()):
        metric = record["metric"]
        scores = [f"{record[when][metric]:.4f}" for when in ("before", "after")]
        where = f"{record['hardware']}, {record['date'][:10]}"
        lines.append([f"[{record['task']} {record['row']}]({name})", f"`{record['base_model']}`", metric, *scores, where])
    return markdown_table(["row", "model", "metric", "before", "after", "measured on"], lines)


def markdown_table(titles: list[str], lines: list[list[Any]]) -> str:
    """A Markdown table.

    Parameters
    ----------
    titles : list of str
    lines : list of list
        Cells of each line, written as ``str`` writes them.
    """
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
