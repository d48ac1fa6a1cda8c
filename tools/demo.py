"""Ask a finetuned model about images in the browser, and compare its answers with those of the model before finetuning.

python -m tools.demo --model output/docvqa
python -m tools.demo --model output/docvqa-lora --server_name 0.0.0.0 --server_port 7860
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

from common.runtime.parser import Parser, check_inputs
from common.runtime.process import InputError, fail, say


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="directory or Hub id of a finetuned model or an adapter")
    parser.add_argument(
        "--base",
        metavar="DIR",
        help='model before finetuning, or "none" to omit it (default: from the adapter, or from run.json next to the model)',
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, help="maximum answer length in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--server_name", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all interfaces (default: %(default)s)"
    )
    parser.add_argument("--server_port", type=int, help="port to listen on (default: first free port from 7860)")
    parser.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="disable progress bars while models are loaded")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        parser.error(f"--max_new_tokens: expected at least 1, got {args.max_new_tokens}")
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds
    check_inputs(args)
    if find_spec("gradio") is None:
        fail('the page requires Gradio: pip install -e ".[demo]"')
    say("Loading PyTorch and Gradio")

# Gradio reads this variable on import.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from common.data.collator import Collator
from common.data.conversations import encode_prompt
from common.model.inference import find_adapter, find_base, load_for_inference, load_full, rewrites_base
from common.phi3v import Phi3VProcessor
from common.phi3v.processing import control_token_ids
from common.runtime.files import OPTIONAL_PATH, check_config, read_json
from common.runtime.progress import limit_library_bars

ONE_HOUR = 3600
LARGEST_UPLOAD = "20mb"
LONGEST_QUESTION = 20_000  # characters
MOST_PICTURES, MOST_WAITING = 32, 16
CSS = """
.gradio-container { width: 100% !important; max-width: 76rem !important; margin: 0 auto !important; }
.answer textarea { font-size: 1.125rem !important; line-height: 1.5 !important; }
:focus-visible { outline: 3px solid #138a73 !important; outline-offset: 2px; }
"""


class Model(NamedTuple):
    """A model to ask: title of its answers, directory or Hub id, and the network."""

    title: str
    name: str
    network: Any
    # Returns the context in which the network is this model: for the base of an adapter, the adapter is disabled.
    context: Callable[[], AbstractContextManager] = nullcontext


def load_models(name: str, base: str | None = None) -> tuple[list[Model], Phi3VProcessor]:
    """Load the finetuned model and, if known, the model before finetuning.

    Parameters
    ----------
    name : str
        Directory or Hub id of a model or an adapter.
    base : str, optional
        Model before finetuning; ``"none"`` loads only the finetuned model.

    Returns
    -------
    models : list of Model
        One or two models, the finetuned one first. Where disabling the adapter restores the base, both share one network.
    processor : Phi3VProcessor
        Processor of the finetuned model.

    Raises
    ------
    InputError
        If a model is missing or has an unsupported type, or an adapter does not match its base.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alone = base == "none"
    adapter = find_adapter(name)
    network: Any
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
        described = read_json(run, remedy := "delete it, or set --base")
        check_config(described, dict.fromkeys(("base_model", "base_revision"), OPTIONAL_PATH), run, remedy)
        base, revision = described.get("base_model"), described.get("base_revision")
    if base:
        try:
            models.append(Model("Before finetuning", base, load_full(base, device, revision=revision)))
        except (OSError, InputError) as error:
            raise InputError(
                f"{error}\n{name} was finetuned from {base}: set --base to its directory, or omit it with --base none"
            ) from None
    return models, processor


class _AnswerStreamer(TextIteratorStreamer):
    """Leaves out control tokens, but not special tokens that users have added."""

    control: set[int]

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or value.item() not in self.control:
            super().put(value)


def stream_answer(
    model: Model, processor: Phi3VProcessor, question: str, pictures: Sequence[str], max_new_tokens: int
) -> Iterator[str]:
    """Answer a question about images with greedy decoding.

    Parameters
    ----------
    question : str
        Image tags (``<|image_1|>`` …) are prepended if it contains none.
    pictures : sequence of str
        Image files in the order of their numbers; empty for a question without images.
    max_new_tokens : int
        Maximum answer length.

    Yields
    ------
    str
        The answer so far.

    Raises
    ------
    InputError
        If an image cannot be read, or the image tags in the question do not match the images.
    """
    prompt = encode_prompt({"conversations": [{"images": list(pictures), "user": question}]}, processor)
    batch = Collator(processor, padding_side="left")([prompt])
    batch = {name: tensor.to(model.network.device) for name, tensor in batch.items()}
    streamer = _AnswerStreamer(processor.tokenizer, skip_prompt=True)
    streamer.control = control_token_ids(processor)
    deserted, failures = Event(), []

    def generate() -> None:
        try:
            with model.context():
                model.network.generate(
                    **batch,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=processor.tokenizer.pad_token_id,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([lambda ids, _: torch.full(ids.shape[:1], deserted.is_set())]),
                )
        except Exception as error:  # for example out of memory; raised again in the reading thread
            failures.append(error)
            streamer.end()

    thread = Thread(target=generate)
    thread.start()
    answer = ""
    try:
        for piece in streamer:
            answer += piece
            yield answer.strip()
    finally:
        deserted.set()
        thread.join()  # the next answer may enable or disable the adapter
    if failures:
        raise failures[0]


def example_question(name: str) -> str:
    """Return a question in the format of training, from the model's ``run.json``; empty if it is unknown."""
    run = Path(name) / "run.json"
    return str(read_json(run, "delete it").get("question", "")) if run.is_file() else ""


def build_page(models: Sequence[Model], processor: Phi3VProcessor, max_new_tokens: int) -> gr.Blocks:
    """Build the page: images and a question on the left, the answer of each model on the right."""

    def answer(pictures: list[tuple[str, str | None]] | None, question: str) -> Iterator[str | list[str]]:
        if not question.strip():
            raise gr.Error("Enter a question first.", print_exception=False)
        files = [file for file, _ in pictures or []]
        if len(question) > LONGEST_QUESTION or len(files) > MOST_PICTURES:
            limits = f"{LONGEST_QUESTION:,} characters and {MOST_PICTURES} images"
            raise gr.Error(f"A question can have at most {limits}.", print_exception=False)
        answers = [""] * len(models)

        def shown() -> str | list[str]:
            return answers[0] if len(models) == 1 else list(answers)  # with one output, Gradio would display the list itself

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
            "# Ask a finetuned model\nAdd one or more images and ask a question. Decoding is greedy, so answers do not vary."
        )
        with gr.Row():
            with gr.Column():
                pictures = gr.Gallery(
                    label="Images",
                    type="filepath",
                    file_types=["image"],
                    sources=["upload", "clipboard"],
                    columns=2,
                    height=320,
                    object_fit="contain",
                    buttons=[],
                )
                question = gr.Textbox(
                    example_question(models[0].name),
                    label="Question",
                    info="Ask in the format of the training data, like the example. For DocVQA, add “Answer briefly.” on a "
                    "separate line.",
                    lines=3,
                    max_lines=8,
                    max_length=LONGEST_QUESTION,
                )
                button = gr.Button("Ask", variant="primary")
            with gr.Column(), gr.Row():
                answers = [
                    gr.Textbox(label=f"{model.title}: {model.name}", lines=4, interactive=False, elem_classes="answer")
                    for model in models
                ]
        # One answer at a time, because the models may share a network whose adapter is enabled and disabled.
        gr.on(
            [button.click, question.submit],
            answer,
            [pictures, question],
            answers,
            show_progress="minimal",
            concurrency_limit=1,
            api_visibility="private",
        )
    return page.queue(max_size=MOST_WAITING)


def theme() -> gr.themes.Base:
    """Return a theme with sufficient contrast that downloads no fonts."""
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


def main(args: argparse.Namespace) -> None:
    limit_library_bars(args.tqdm)
    try:
        page = build_page(*load_models(args.model, args.base), args.max_new_tokens)
        _, address, _ = page.launch(
            server_name=args.server_name,
            server_port=args.server_port,
            share=False,
            ssr_mode=False,
            footer_links=[],
            theme=theme(),
            css=CSS,
            max_file_size=LARGEST_UPLOAD,
            quiet=True,
            prevent_thread_lock=True,
        )
        print(
            f"Open {address}\nFrom another machine, first: ssh -L {page.server_port}:127.0.0.1:{page.server_port} THIS_MACHINE"
        )
        page.block_thread()
    except (OSError, InputError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(args)
