"""Ask a finetuned model about pictures in the browser, its answer beside that of the model it was finetuned from.

python -m tools.demo --model output/docvqa
python -m tools.demo --model output/docvqa-lora --server_name 0.0.0.0 --server_port 7860
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import NamedTuple

from common.runtime import InputError

# Gradio reads it when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

from common.data.collator import Collator
from common.data.conversations import encode_prompt
from common.model.inference import find_adapter, find_base, load_for_inference, load_full, rewrites_base
from common.phi3v import Phi3VProcessor
from common.runtime import limit_library_bars

ONE_HOUR = 3600
CSS = """
.gradio-container { width: 100% !important; max-width: 76rem !important; margin: 0 auto !important; }
.answer textarea { font-size: 1.125rem !important; line-height: 1.5 !important; }
:focus-visible { outline: 3px solid #138a73 !important; outline-offset: 2px; }
"""


class Model(NamedTuple):
    """A model that answers: what it is, its name, and the context in which it is that model (an adapter's base has one)."""

    title: str
    name: str
    network: nn.Module
    context: Callable[[], AbstractContextManager] = nullcontext


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a finetuned model or an adapter: directory or hub id")
    parser.add_argument(
        "--base",
        metavar="DIR",
        help='what it was finetuned from, "none" to leave it out (default: what an adapter, or run.json beside a model, names)',
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument(
        "--server_name", default="127.0.0.1", help="where to listen; 0.0.0.0 is everywhere (default: %(default)s)"
    )
    parser.add_argument("--server_port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="no progress bars while models load")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        parser.error(f"--max_new_tokens must be at least 1, not {args.max_new_tokens}")
    return args


def load_models(name: str, base: str | None = None) -> tuple[list[Model], Phi3VProcessor]:
    """Load the finetuned model and, where it is known, the one that it was finetuned from.

    Parameters
    ----------
    name : str
        A model or an adapter: directory or hub id.
    base : str, optional
        What it was finetuned from; ``"none"`` for the finetuned model alone.

    Returns
    -------
    models : list of Model
        One or two, the finetuned one first. An adapter's base is the same network with the adapter off, where that is the base.
    processor : Phi3VProcessor
        The finetuned model's.

    Raises
    ------
    InputError
        If a model is missing or of another kind, or an adapter doesn't fit its base.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alone = base == "none"
    adapter = find_adapter(name)
    network, processor = load_for_inference(name, device, base=base if adapter and not alone else None)
    models = [Model("Finetuned", name, network)]
    if alone:
        return models, processor
    if adapter and not rewrites_base(network):
        base = network.get_base_model().name_or_path
        return [*models, Model("Before finetuning", base, network, network.disable_adapter)], processor
    revision = None
    if adapter and base is None:
        base, revision = find_base(adapter)
    if base is None and (run := Path(name) / "run.json").is_file():
        described = json.loads(run.read_text(encoding="utf-8"))
        base, revision = described.get("base_model"), described.get("base_revision")
    if base:
        try:
            models.append(Model("Before finetuning", base, load_full(base, device, revision=revision)))
        except (OSError, InputError) as error:
            raise InputError(
                f"{error}\n{name} was finetuned from {base}: give its directory by --base, or leave it out by --base none"
            ) from None
    return models, processor


class _Stream(BaseStreamer):
    """Hands on the answer so far, token by token; ends the generation at the next one once nobody listens."""

    def __init__(self, processor: Phi3VProcessor, queue: Queue) -> None:
        self.tokenizer = processor.tokenizer
        self.queue = queue
        self.deserted = Event()
        self.ids: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.deserted.is_set():
            raise InterruptedError("nobody listens")
        if self.ids is None:  # the prompt comes first
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        # A character may need several tokens; until they are all there it decodes to a replacement.
        self.queue.put(self.tokenizer.decode(self.ids, skip_special_tokens=True).rstrip("\ufffd").strip())

    def end(self) -> None:
        self.queue.put(None)


def stream_answer(
    model: Model, processor: Phi3VProcessor, question: str, pictures: Sequence[str], max_new_tokens: int
) -> Iterator[str]:
    """Answer a question about pictures, greedily.

    Parameters
    ----------
    question : str
        Image tags (``<|image_1|>`` …) are put before it where it has none.
    pictures : sequence of str
        Files, in the order of their numbers; none for a question about nothing.
    max_new_tokens : int
        Longest answer.

    Yields
    ------
    str
        The answer so far.

    Raises
    ------
    InputError
        If a picture can't be read, or the question has image tags that don't fit the pictures.
    """
    prompt = encode_prompt({"conversations": [{"images": list(pictures), "user": question}]}, processor)
    batch = Collator(processor, padding_side="left")([prompt])
    batch = {name: tensor.to(model.network.device) for name, tensor in batch.items()}
    queue: Queue[str | Exception | None] = Queue()
    stream = _Stream(processor, queue)

    def generate() -> None:
        try:
            with model.context():
                model.network.generate(
                    **batch,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=processor.tokenizer.pad_token_id,
                    streamer=stream,
                )
        except Exception as error:  # out of memory, say: raised again where the answer is awaited
            queue.put(error)

    thread = Thread(target=generate)
    thread.start()
    try:
        while (piece := queue.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece
    finally:
        stream.deserted.set()
        thread.join()  # the next answer may want the adapter on or off


def build_page(models: Sequence[Model], processor: Phi3VProcessor, max_new_tokens: int) -> gr.Blocks:
    """Build the page: pictures and a question on one side, each model's answer on the other."""

    def answer(pictures: list[tuple[str, str | None]] | None, question: str) -> Iterator[str | list[str]]:
        if not question.strip():
            raise gr.Error("Type a question first.", print_exception=False)
        files = [file for file, _ in pictures or []]
        answers = [""] * len(models)

        def shown() -> str | list[str]:
            return answers[0] if len(models) == 1 else list(answers)  # Gradio shows a list of one as a list

        yield shown()
        for index, model in enumerate(models):
            try:
                for answers[index] in stream_answer(model, processor, question.strip(), files, max_new_tokens):
                    yield shown()
            except InputError as error:
                raise gr.Error(str(error), print_exception=False) from error
            answers[index] = answers[index] or "(no answer)"
            yield shown()

    with gr.Blocks(title="Ask a finetuned model", analytics_enabled=False, delete_cache=(ONE_HOUR, ONE_HOUR)) as page:
        gr.Markdown(
            "# Ask a finetuned model\nOne picture or several, and a question. Answers are greedy: ask again, get the same."
        )
        with gr.Row():
            with gr.Column():
                pictures = gr.Gallery(
                    label="Pictures",
                    type="filepath",
                    file_types=["image"],
                    sources=["upload", "clipboard"],
                    columns=2,
                    height=320,
                    object_fit="contain",
                    buttons=[],
                )
                question = gr.Textbox(
                    label="Question",
                    info="In the words of training: for DocVQA with “Answer briefly.” on a line of its own.",
                    lines=3,
                    max_lines=8,
                )
                ask = gr.Button("Answer", variant="primary")
            with gr.Column(), gr.Row():
                answers = [
                    gr.Textbox(
                        label=f"{model.title}: {model.name}",
                        lines=4,
                        interactive=False,
                        elem_classes="answer",
                    )
                    for model in models
                ]
        # One answer at a time: an adapter is switched on and off in the one network.
        gr.on(
            [ask.click, question.submit],
            answer,
            [pictures, question],
            answers,
            show_progress="minimal",
            concurrency_limit=1,
            api_visibility="private",
        )
    return page


def theme() -> gr.themes.Base:
    """Give a theme without fonts to fetch, and with enough contrast."""
    base = gr.themes.Base(
        primary_hue="teal", neutral_hue="stone", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return base.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        button_primary_background_fill="#0e6252",
        button_primary_background_fill_hover="#0a4d40",
        button_primary_background_fill_dark="#0e6252",
        button_primary_background_fill_hover_dark="#0a4d40",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
    )


def main() -> None:
    args = parse_args()
    limit_library_bars(args.tqdm)
    try:
        page = build_page(*load_models(args.model, args.base), args.max_new_tokens)
        page.launch(
            server_name=args.server_name,
            server_port=args.server_port,
            share=False,
            ssr_mode=False,
            footer_links=[],
            theme=theme(),
            css=CSS,
        )
    except (OSError, InputError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
