"""Files in the general format: reading, caching, and messages for invalid rows."""

import json
import os
import re

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.data import sources
from common.data.checks import check_rows
from common.data.rows import Rows
from common.data.shards import stream_hub
from common.data.sources import load_conversations, load_hub
from common.data.streaming import Stream, StreamedData
from common.runtime.process import InputError

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def image_dir(tmp_path):
    folder = tmp_path / "images"
    for name in ("a/left.png", "a/right.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), "red").save(folder / name)
    return folder


def turn(user="What?", assistant="That.", **fields):
    return {"user": user, "assistant": assistant, **fields}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_are_read_as_written(tmp_path, image_dir):
    path = write(
        tmp_path / "data.jsonl",
        {"id": "1", "source": "mine", "conversations": [turn(images=["a/left.png", "a/right.jpg"], assistant="2020-01-01")]},
        "",
        {"conversations": [turn(), turn("“Ünï”?\n", "3.50", images=["a/left.png"])], "system": "Be brief."},
        {"id": 7, "conversations": [turn("<|image_1|> so?", images=["a/left.png"])], "metadata": {"a": [1]}},
    )
    left, right = str(image_dir / "a/left.png"), str(image_dir / "a/right.jpg")
    rows = load_conversations(path, image_dir)
    assert list(rows) == [
        {"id": "1", "system": None, "conversations": [turn(images=[left, right], assistant="2020-01-01")]},
        {"id": None, "system": "Be brief.", "conversations": [turn(images=[]), turn("“Ünï”?\n", "3.50", images=[left])]},
        {"id": "7", "system": None, "conversations": [turn("<|image_1|> so?", images=[left])]},
    ]
    assert [rows.place(index) for index in range(3)] == [f"{path}, line {line}" for line in (1, 3, 4)]
    assert list(load_conversations(path, image_dir, limit=1)) == list(rows)[:1]


def test_an_invalid_json_array_is_named(tmp_path, image_dir):
    path = write(tmp_path / "a.json", json.dumps([{"conversations": [turn()]}, {"conversations": []}], indent=1))
    with pytest.raises(InputError, match=r"a\.json, entry 2: .conversations. must be a list"):
        load_conversations(path, image_dir)
    write(path, '[{"image": "a/left.png", "image": "a/right.jpg"}]')
    with pytest.raises(InputError, match=r'a\.json: invalid JSON .duplicate key "image"'):
        load_conversations(path, image_dir)


def test_a_changed_file_is_read_again_and_a_truncated_one_in_the_cache_is_written_again(tmp_path, image_dir, own_cache):
    path = write(tmp_path / "data.jsonl", {"conversations": [turn()]})
    assert len(load_conversations(path, image_dir)) == 1
    [first] = (own_cache / "conversations").glob("*.arrow")
    write(path, *[{"conversations": [turn(f"What {number}?")]} for number in range(100)])
    rows = list(load_conversations(path, image_dir))
    prepared = set((own_cache / "conversations").glob("*.arrow"))
    assert len(rows) == 100 and len(prepared) == 2 and all(re.fullmatch(r"[0-9a-f]{32}\.arrow", file.name) for file in prepared)
    [second] = prepared - {first}
    second.write_bytes(second.read_bytes()[:-500])
    assert list(load_conversations(path, image_dir)) == rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"conversations": [{"user": "a", "assistant":', "invalid JSON"),
        ('["a"]', "expected a JSON object, got list"),
        ({"conversations": [turn(), {"user": "a"}]}, 'turn 2: "assistant" must be a non-empty string'),
        ('{"id": "1", "id": "2", "conversations": [{"user": "a", "assistant": "b"}]}', 'duplicate key "id"'),
        (f'{{"{"w" * 999}": 1, "{"w" * 999}": 2}}', 'w… (999 characters)"'),
        (f"{json.dumps({'conversations': [turn()]})} {json.dumps({'conversations': [turn()]})}", "invalid JSON (Extra data"),
        ({"conversations": [turn("a" * 17_000_000)]}, "longer than 16,777,216 bytes: split the conversation"),
    ],
)
def test_an_invalid_row_is_named(tmp_path, image_dir, row, message):
    good = {"id": "1", "conversations": [turn(images=["a/left.png"])]}
    path = write(tmp_path / "data.jsonl", good, "", row, good)
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3") as raised:
        load_conversations(path, image_dir)
    assert message in str(raised.value) and len(str(raised.value)) < 500
    assert not list((tmp_path / "cache/conversations").iterdir())


def test_invalid_rows_are_skipped_on_request(tmp_path, image_dir, capsys):
    good = [{"id": str(number), "conversations": [turn(images=["a/left.png"])]} for number in range(3)]
    bad = ['["a"]', {"conversations": []}, {"id": "no picture", "conversations": [turn(images=["none.png"])]}]
    path = write(tmp_path / "data.jsonl", good[0], bad[0], good[1], bad[1], bad[2], bad[2], good[2], bad[0])
    for limit in (None, 9, None):  # from the second time on from the cache
        rows = load_conversations(path, image_dir, limit, skip_bad=True)
        assert [row["id"] for row in rows] == ["0", "1", "2"]
        said, counts = capsys.readouterr()[::-1]
        assert "data.jsonl: 5 invalid rows skipped" in said and "line 6: one of its images cannot be used" in said
        assert "none.png is missing" in said and "checking: 1 invalid image skipped" in said
        assert "3 rows with 1 image from" in counts
    load_conversations(path, image_dir, limit=2, skip_bad=True)
    said = capsys.readouterr().err
    assert "data.jsonl: 1 invalid row skipped" in said and "line 2" in said
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2"):
        load_conversations(path, image_dir)


def test_worker_processes_read_the_same(tmp_path, image_dir, monkeypatch):
    row = {"conversations": [turn(images=["a/left.png"])]}
    rows = [{"id": str(number)} | row for number in range(2500)]
    path = write(tmp_path / "data.jsonl", *rows[:1500], ["bad"], *rows[1500:2400], {"conversations": []}, *rows[2400:])
    alone = load_conversations(path, image_dir, skip_bad=True)
    monkeypatch.setattr(sources, "SMALL_FILE", 0)
    monkeypatch.setattr(sources, "FEW_IMAGES", 0)
    os.utime(path)
    shared = load_conversations(path, image_dir, skip_bad=True)
    assert [row["id"] for row in shared] == [row["id"] for row in rows] and list(shared) == list(alone)
    assert [shared.place(index) for index in (0, 2499)] == [f"{path}, line 1", f"{path}, line 2502"]
    assert np.array_equal(shared.contents.rows, alone.contents.rows)
    with pytest.raises(ValueError, match=r"data\.jsonl, line 1501: expected a JSON object"):
        load_conversations(path, image_dir)
    (image_dir / "a/left.png").unlink()
    with pytest.raises(ValueError, match=r"images/a/left\.png is missing"):
        load_conversations(write(path, *rows), image_dir)


def test_missing_and_empty_files_are_named(tmp_path, image_dir):
    with pytest.raises(InputError, match=r"none\.jsonl is missing"):
        load_conversations(tmp_path / "none.jsonl", image_dir)
    with pytest.raises(InputError, match=r"data\.jsonl is empty"):
        load_conversations(write(tmp_path / "data.jsonl", "", " "), image_dir)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "none.png is missing: put the file there"),
        ("cut.png", "cut.png cannot be (read|decoded)"),
        ("a\0.png", "a\0.png cannot be read .embedded null byte.: replace it"),
        ("a" * 256, "image …a+ cannot be read .File name too long"),
        ("../b.png", "image ../b.png is outside {folder}"),
        ("a/../../b.png", "image a/../../b.png is outside {folder}"),
        ("{folder}/../b.png", "is outside {folder}"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(name, message, tmp_path, image_dir):
    (image_dir / "cut.png").write_bytes((image_dir / "a/left.png").read_bytes()[:60])
    names = ("a/left.png", name.format(folder=image_dir))
    path = write(tmp_path / "data.jsonl", *[{"conversations": [turn(images=[name])]} for name in names])
    with pytest.raises(InputError, match=message.format(folder=image_dir)):
        load_conversations(path, image_dir)
    assert len(load_conversations(path, image_dir, limit=1)) == 1  # images of unused rows are not checked


def test_rows_that_contain_images_are_named_by_their_number(image_dir):
    whole = (image_dir / "a/left.png").read_bytes()

    def conversations(row):
        return [{"conversations": [turn(user, images=[{"bytes": row["picture"], "path": None}])]} for user in row["asked"]]

    def rows(*found):
        return Rows(found, "mine, row {}".format)

    good = {"picture": whole, "asked": ["What?", "Which is <|image_1|>?"]}
    check_rows(rows(good, good), conversations, "training row")
    for wrong, message in (
        ({"picture": whole[: len(whole) // 2]}, "an image stored in the dataset cannot be (read|decoded)"),
        ({"asked": ["What?", "<|image_2|>?"]}, "the text's image tags"),
        ({"asked": []}, "the row has no question"),
    ):
        with pytest.raises(ValueError, match=f"^mine, row 1: {message}"):
            check_rows(rows(good, good | wrong), conversations, "training row")
        kept = check_rows(rows(good | wrong, good), conversations, "training row", skip_bad=True)
        assert list(kept) == [good] and kept.place(0) == "mine, row 1"


def test_an_unreachable_hub_is_named():
    with pytest.raises(InputError, match="nobody/nothing at_all cannot be loaded from the Hub .* use --data_dir"):
        load_hub("nobody/nothing", "at_all", columns=["images"])
    with pytest.raises(InputError, match="dataset nobody/nothing cannot be streamed from the Hub"):
        stream_hub("nobody/nothing", columns=["images"])


@pytest.mark.parametrize("load", [load_hub, stream_hub])
@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        ({"bytes": None, "path": "a/left.png"}, "row 0: image .*left.png is not stored in the dataset"),
        ("a/left.png", 'the column "image" does not contain images, but string'),
    ],
)
def test_a_dataset_of_the_hub_cannot_name_files(load, image, complaint, tmp_path, image_dir, monkeypatch):
    monkeypatch.chdir(image_dir)
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.Table.from_pylist([{"image": image}]), tmp_path / "hub/train.parquet")

    def conversation(row, _=None):
        return {"conversations": [turn(images=[row["image"]])]}

    with pytest.raises(InputError, match=complaint):
        rows = load(str(tmp_path / "hub"), columns=["image"])
        if isinstance(rows, Stream):
            data = StreamedData(rows, conversation, None, 0)
            [data[row] for row in rows.rows(0, 0)]
        check_rows(rows, lambda row: [conversation(row)], "row")


def test_a_damaged_dataset_of_the_hub_is_named(tmp_path):
    (tmp_path / "hub").mkdir()
    path = tmp_path / "hub/train.parquet"
    pq.write_table(pa.table({"image": [f"{number}" for number in range(5000)]}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(len(whole) // 2) + whole[100 + len(whole) // 2 :])
    with pytest.raises(InputError, match=f"{tmp_path}/hub cannot be loaded"):
        load_hub(str(tmp_path / "hub"), columns=["image"])


def test_many_rows_are_read_fast_and_need_no_memory(tmp_path, image_dir):
    line = json.dumps({"id": "000001", "conversations": [turn("What is it? " * 10, images=["a/left.png"])]}) + "\n"
    path = tmp_path / "data.jsonl"
    path.write_text(line * 30_000)

    def cpu_seconds():
        return sum(os.times()[:4])

    start = cpu_seconds()
    load_conversations(path, image_dir)
    assert cpu_seconds() - start < 9  # 2 s on idle cores
    start = cpu_seconds()
    rows = load_conversations(path, image_dir)  # from the cache
    assert len(rows) == 30_000 and cpu_seconds() - start < 2

    pid = os.fork()
    if pid == 0:
        before = psutil.Process().memory_full_info()
        texts = sum(len(rows[index]["conversations"][0]["user"]) for index in range(0, 30_000, 15))
        after = psutil.Process().memory_full_info()
        os._exit(0 if texts == 2000 * 120 and after.pss - before.pss < 8e6 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
