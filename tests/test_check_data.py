"""tools.check_data, run as its users run it."""

import base64
import io
import json
import os
import re
import resource
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from transformers import AutoProcessor

import common.phi3v  # noqa: F401  registers the processor
from common.data.conversations import encode_conversation
from tools import check_data
from tools.check_data import Report, compare_looks
from tools.checker import CheckedImage, CheckedRow


@pytest.fixture
def check(parse, capsys):
    """Runs the tool in this process, which spares the imports; gives its exit code and all that it says."""

    def run(*flags, model=("--model_name_or_path", TINY)):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            check_data.main(parse(check_data, *model, *flags))
        said = capsys.readouterr()
        return ending.value.code, said.out + said.err

    return run


def problems(output):
    """The problems of a report, as (kind, message)."""
    kinds = "invalid row|unusable image|row too long|duplicate row|row in two files|(?:similar )?images in two files|empty file"
    return re.findall(rf"^  ({kinds}): (.+)$", output, re.MULTILINE)


def row(images, *turns, **fields):
    """A row whose first turn has the pictures."""
    conversations = [{"user": user, "assistant": assistant} for user, assistant in turns]
    if images is not None:
        conversations[0]["images"] = images
    return {**fields, "conversations": conversations}


def write(path, rows):
    path.write_text("".join(item if isinstance(item, str) else json.dumps(item) + "\n" for item in rows), "utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures: two whole ones, one cut short, one that is none."""
    Image.effect_noise((400, 300), 50).convert("RGB").save(tmp_path / "wide.jpg")
    Image.new("RGB", (200, 500), "blue").save(tmp_path / "tall.png")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "wide.jpg").read_bytes()[:3000])
    (tmp_path / "text.jpg").write_text("no picture")
    return tmp_path


GOOD_ROWS = [
    row(["wide.jpg"], ("What is it?", "Noise.")),
    row(["wide.jpg", "tall.png"], ("Same?", "No."), ("And now?", "Still not."), id="2"),
    row(None, ("Hello", "Hello.")),
    row([], ("Good bye", "Good bye.")),
]


def test_counts_the_tokens_of_training(folder, check):
    rows = [*GOOD_ROWS, *(row(None, ("word " * length, "Yes.")) for length in range(1, 97))]
    data = write(folder / "data.jsonl", [*rows, "\n"])
    code, output = check("--data_file", data, "--num_crops", 9)
    assert code == 0, output
    assert f"{data} (general format, one JSON object per line): 100 rows\n2 images in 100 rows\n" in output
    assert "Rows by number of images: 98 with 0, 1 with 1, 1 with 2\n" in output
    assert "Sizes: 200 × 500 (tall.png) to 400 × 300 pixels\n" in output
    assert "Most frequent of 5 distinct answers: 'Yes.' in 96 rows, 96.0%: a model" in output
    assert "No problems." in output
    assert "Checking data: 100%, " in output  # no terminal: plain lines

    processor = AutoProcessor.from_pretrained(TINY, num_crops=9)
    lengths = []
    for item in rows:
        turns = [{**turn, "images": [folder / name for name in turn.get("images", [])]} for turn in item["conversations"]]
        lengths.append(len(encode_conversation({"conversations": turns}, processor)["input_ids"]))
    lengths.sort()
    assert f"minimum {lengths[0]:,}, mean {sum(lengths) / 100:,.1f}, " in output
    assert f"maximum {lengths[-1]:,}\n" in output
    assert lengths[94] <= int(re.search(r"95 % ([\d,]+)", output)[1].replace(",", "")) <= lengths[95]

    bars = re.findall(r"^ +([\d,]+) to +([\d,]+)  #* +([\d,]+)$", output, re.MULTILINE)
    bars = [tuple(int(number.replace(",", "")) for number in bar) for bar in bars]
    assert [sum(low <= length <= high for length in lengths) for low, high, _ in bars] == [count for *_, count in bars]
    assert sum(count for *_, count in bars) == 100


def test_all_problems_in_one_report(folder, check):
    data = write(
        folder / "data.jsonl",
        [
            GOOD_ROWS[0],  # 1
            "{broken\n",
            {"id": "no turns"},
            row(None, ("", "No question.")),
            row(["wide.jpg"], ("<|image_2|> is not there", "Yes.")),  # 5
            row([3], ("A number?", "Yes.")),
            row(["gone.jpg", "wide.jpg", "text.jpg"], ("Two wrong", "Yes.")),
            row(["cut.jpg"], ("Cut short", "Yes.")),
            row(None, ("word " * 3000, "Too long.")),
            {**GOOD_ROWS[0], "id": "other"},  # 10
            '{"conversations": [{"user": "\\ud800", "assistant": "half a character"}]}\n',
            {**row(None, ("Not an", "Id.")), "id": [7]},
            {"conversations": [{"images": ["gone.jpg"], "user": "", "assistant": "One."}, {"user": "Two?"}], "id": 3},
        ],
    )
    code, output = check("--data_file", data, "--max_length", 2000)
    assert code == 1
    found = problems(output)
    expected = [
        ("invalid row", "line 2: invalid JSON"),
        ("invalid row", 'line 3: "conversations" must be a list'),
        ("invalid row", 'line 4, turn 1: "user" must be'),
        ("invalid row", "line 5: the text's image tags"),
        ("invalid row", 'line 6, turn 1: "images" must be a list of file names'),
        ("unusable image", "line 7: image", "gone.jpg is missing"),
        ("unusable image", "line 7: image", "text.jpg cannot be read"),
        ("unusable image", "line 8: image"),
        ("row too long", "line 9: 15,0"),
        ("invalid row", "line 11: invalid JSON"),
        ("invalid row", 'line 12: "id" must be a string or an integer'),
        ("invalid row", 'line 13, turn 1: "user" must be'),
        ("invalid row", 'line 13, turn 2: "assistant" must be'),
        ("unusable image", "line 13: image", "gone.jpg is missing"),
        ("duplicate row", f"line 10: same images and texts as {data}, line 1"),
    ]
    assert [kind for kind, _ in found] == [kind for kind, *_ in expected]
    for (_, message), (_, start, *rest) in zip(found, expected, strict=True):
        assert message.startswith(f"{data}, {start}")
        assert all(text in message for text in rest)  # long folders are shortened
    assert "14 problems: invalid row 9, unusable image 4, row too long 1" in output
    assert "1 warning: duplicate row 1" in output

    (folder / "data.csv").write_text("image,question,answer\n,What, now?,a\n,What?,\n")
    _, output = check("--data_file", folder / "data.csv")
    assert [message.partition(", ")[2][:30] for _, message in problems(output)] == [
        "line 2: 4 fields, but the head",
        'line 3, turn 1: "assistant" mu',
    ]


def test_quick_checks_pictures_as_a_run_does(folder, check):
    noise = bytearray((folder / "wide.jpg").read_bytes())
    noise[len(noise) // 2 : len(noise) // 2 + 2] = b"\xff\xc0"
    (folder / "damaged.jpg").write_bytes(noise)
    names = ("cut.jpg", "gone.jpg", "text.jpg", "damaged.jpg")
    data = write(folder / "data.jsonl", [row([name], ("What is it?", "Noise.")) for name in names])
    code, output = check("--data_file", data, "--quick")
    assert code == 1
    assert [kind for kind, _ in problems(output)] == ["unusable image"] * 3
    assert "damaged.jpg cannot" not in output


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_rows_and_pictures_that_occur_twice_are_warnings(folder, quick, check):
    """However a picture is named; its copies too, except with --quick."""
    (folder / "a").mkdir()
    (folder / "a/copy.png").write_bytes((folder / "tall.png").read_bytes())
    train = write(folder / "train.jsonl", [*GOOD_ROWS, GOOD_ROWS[2]])
    other = row(["a/../wide.jpg"], ("What is it?", "A picture."))
    same = {**row([f"{folder}/wide.jpg", "tall.png"], ("Same?", "No."), ("And now?", "Still not.")), "id": "99"}
    val = write(folder / "val.jsonl", [other, same, row(["a/copy.png"], ("New", "Yes."))])
    code, output = check("--data_file", train, val, "--image_dir", folder, *quick)
    assert code == 0, output
    assert "No problems." in output
    assert problems(output) == [
        ("duplicate row", f"{train}, line 5: same images and texts as {train}, line 3"),
        ("row in two files", f"{val}, line 2: same images and texts as {train}, line 2"),
        ("images in two files", f"2 images of {val} are also in {train}, for example {val}, line 1: a/../wide.jpg"),
    ]
    assert f"{train} (general format, one JSON object per line): 5 rows" in output
    assert f"{val} (general format, one JSON object per line): 3 rows" in output


def test_what_a_person_would_notice(folder, check):
    """Copies of other sizes and compression, small and elongated images, long answers; and what the model sees."""
    blocks = np.random.default_rng(0).integers(0, 255, (14, 18), dtype=np.uint8)
    Image.fromarray(blocks).resize((1800, 1400)).convert("RGB").save(folder / "page.png")
    with Image.open(folder / "page.png") as page:
        page.resize((600, 467)).save(folder / "page.jpg", quality=60)
    colours = ("red", "green", "blue", "#f00010")
    for number, colour in enumerate(colours):
        Image.new("RGB", (60 + number, 50), colour).save(folder / f"{number}.png")
    Image.new("L", (900, 100)).save(folder / "line.png")
    rows = [row([name], ("What?", "Yes.")) for name in ("page.png", "line.png", *(f"{number}.png" for number in range(3)))]
    train = write(folder / "train.jsonl", rows)
    val = write(folder / "val.jsonl", [row([name], (f"<b>{name}?", "word " * 20)) for name in ("page.jpg", "3.png")])
    flags = ("--max_new_tokens", 9, "--num_crops", 4, "--contact_sheet", folder / "sheet.html")
    code, output = check("--data_file", train, val, *flags)
    assert code == 0, output
    assert "7 images in 7 rows\nRows by number of images: 7 with 1\nSizes: 60 × 50 (0.png) to 1,800 × 1,400 pixels\n" in output
    assert "  4 images smaller than a crop (336 × 336 pixels): enlarged for the model\n" in output
    assert "  1 image longer than 4 times the other side, most of all line.png, 900 × 100\n" in output
    assert "Most frequent of 2 distinct answers: 'Yes.' in 5 rows, 71.4%" in output
    assert f", {val}, line 1\n" in re.search(r"Longest answer: .*\n", output)[0]
    assert "Near-duplicates: 1 pair of images that look alike, for example page.png and page.jpg\n" in output
    similar = f"1 pair in {val} and {train}, for example {val}, line 1: page.jpg like page.png"
    assert problems(output) == [("similar images in two files", similar)]
    assert f"long answers: 2 answers longer than --max_new_tokens 9, for example {val}, line 1\n" in output
    page = (folder / "sheet.html").read_text("utf-8")
    assert page.count("<img ") == 7 and "<b>page.png</b> (largest): 1,800 × 1,400 pixels, 672 × 672 for\nthe model" in page
    assert "&lt;b&gt;page.jpg?" in page and "<b>page.jpg?" not in page and "://" not in page
    shown = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])))
    assert shown.width % 336 == 0 and shown.height % 336 == 0


def test_thousands_of_images_that_look_alike_need_no_memory():
    images = [CheckedImage("", str(number), (9, 9), 1, None, bytes(35)) for number in range(2000)]
    files = (Path("a.jsonl"), Path("b.jsonl"))
    report = Report(
        images={image.identity: ("", image, files[number >= 1500], CheckedRow("")) for number, image in enumerate(images)}
    )
    tracemalloc.start()
    [(_, warning)] = compare_looks(report)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.num_alike == 1999 * 1000 and "750,000 pairs in b.jsonl and a.jsonl" in warning
    assert peak < 150e6


def test_many_rows_keep_their_order(folder, check):
    """More rows than the workers get at once."""
    rows = [row(None, (f"Question {number}", "Yes.")) for number in range(3000)]
    rows[1500] = rows[7]
    rows[2999] = {}
    data = write(folder / "data.jsonl", rows)
    code, output = check("--data_file", data)
    assert code == 1
    assert problems(output) == [
        ("invalid row", f'{data}, line 3000: "conversations" must be a list of at least one turn'),
        ("duplicate row", f"{data}, line 1501: same images and texts as {data}, line 8"),
    ]


def test_unusable_flags(folder, check):
    data = write(folder / "data.jsonl", GOOD_ROWS)
    empty = write(folder / "empty.jsonl", ["\n"])
    broken = write(folder / "broken.json", ["[{}, {]"])
    assert f"1 problem: empty file 1\n  empty file: {empty}: no rows\nNo warnings.\n" in check("--data_file", empty)[1]

    def refused(*flags, **model):
        code, said = check(*flags, **model)
        assert code == 1
        return said.splitlines()[-1]

    message = refused("--data_file", data, "--model_name_or_path", folder)
    assert message.startswith(f"error: --model_name_or_path {folder} is missing config.json")
    # without a model named, it is the published one, which is out of reach here
    message = refused("--data_file", data, model=())
    assert message.startswith("error: --model_name_or_path microsoft/Phi-3.5-vision-instruct")
    assert refused("--data_file", broken).startswith(f"error: {broken}: invalid JSON")
    assert "argument --num_crops" in refused("--data_file", data, "--num_crops", 17)
    assert "same file twice" in refused("--data_file", data, folder / "." / data.name)


@pytest.mark.parametrize("flags, bar", [((), True), (("--no-tqdm",), False)])
def test_progress_on_a_terminal(folder, flags, bar, check, monkeypatch):
    data = write(folder / "data.jsonl", GOOD_ROWS)
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True
    code, printed = check("--data_file", data, *flags)
    assert code == 0 and "Checking" not in printed
    assert ("bytes/s" in terminal.getvalue()) == bar
    assert ("Checking data: 100%, " in terminal.getvalue()) != bar


@pytest.mark.slow
def test_many_rows_in_seconds(folder, check):
    for number in range(1000):
        os.link(folder / "wide.jpg", folder / f"{number}.jpg")
    rows = [row([f"{number % 1000}.jpg"], (f"What is to be seen in picture {number}?", "Noise.")) for number in range(10_000)]
    data = write(folder / "data.jsonl", rows)

    def seconds():
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    before = seconds()
    code, said = check("--data_file", data, "--quick")
    assert code == 0, said
    # A minute per 100,000 rows for two cores that do nothing else, however busy this machine is.
    assert seconds() - before < 2 * 6
