"""Hypothesis strategies for broken files, and readers that must answer with a result or an InputError within seconds."""

import copy
import io
import json
import os
import signal

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from common.runtime.process import InputError

INPUTS = int(os.environ.get("FUZZ_INPUTS", 500))
SECONDS = 20

ODD = [None, True, False, -1, 0, 1, 2, 7, 2**31, 10**30, 0.5, -1.5, 1e308, float("nan"), float("inf"), "", "x", "\0", "\ud800"]
ODD += ["1", "../../../etc/passwd", "phi3_v", "<|end|>", "float16", [], {}, [[]], [None], [1, "a"], {"a": 1}, {"type": "su"}]
ODD += [[1.0] * 16, "{% for a in b %}", "x" * 5000]


def fuzz(check, contents, share):
    """Call ``check`` with a share of all inputs, taken from a strategy. The shares of all tests add up to about 1."""
    settings(
        max_examples=max(1, round(share * INPUTS)),
        deadline=None,
        derandomize=INPUTS <= 500,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(contents)(check))()


def read(reader):
    """The result of a reader, or None if it refuses the input."""

    def end(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        return reader()
    except InputError as error:
        assert str(error)
    finally:
        signal.alarm(0)


@st.composite
def damaged(draw, whole):
    """Truncated, overwritten or replaced bytes of a file."""
    at = draw(st.integers(0, len(whole)))
    how = draw(st.sampled_from(["cut", "flip", "insert", "replace"]))
    if how == "cut":
        return whole[:at]
    noise = draw(st.binary(min_size=1, max_size=16))
    if how == "replace":
        others = [noise, b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe" + whole, b"\xef\xbb\xbf" + whole]
        return draw(st.sampled_from(others))
    return whole[:at] + noise + whole[at + len(noise) * (how == "flip") :]


def paths(content, path=()):
    """The paths of all values in a JSON value."""
    yield path
    if isinstance(content, dict | list) and len(path) < 4:
        for key in content if isinstance(content, dict) else range(min(len(content), 3)):
            yield from paths(content[key], (*path, key))


@st.composite
def broken(draw, content, keys=()):
    """A JSON file with values replaced, removed or added, possibly damaged."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = [path for path in paths(content) if path] + [(key,) for key in keys]
        if not places:  # all was removed
            break
        *place, last = draw(st.sampled_from(places))
        target = content
        for key in place:
            target = target[key]
        value = copy.deepcopy(draw(st.sampled_from(ODD) | st.integers() | st.text(max_size=4)))
        if draw(st.integers(0, 3)) == 0 and (isinstance(target, list) or last in target):
            del target[last]
        else:
            target[last] = value
    text = json.dumps(content).encode()
    return draw(damaged(text)) if draw(st.integers(0, 4)) == 0 else text


def stored_picture(kind):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(file, kind)
    return file.getvalue()


@st.composite
def parquet(draw, row):
    """A Parquet file of a row with values replaced, removed or added, or with damaged bytes. "PNG" stands for an image."""

    def write(text):
        file = io.BytesIO()
        png = stored_picture("PNG")
        rows = [json.loads(text, object_hook=lambda found: {key: png if found[key] == "PNG" else found[key] for key in found})]
        pq.write_table(pa.Table.from_pylist(rows * 3), file)
        return file.getvalue()

    whole = json.dumps(row).encode()
    try:
        return write(draw(broken(row)))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, pa.ArrowException):  # not a table
        return draw(damaged(write(whole)))
