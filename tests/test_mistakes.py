"""What newcomers get wrong on the command line, and the one line that they are told, before anything slow is done."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from runs import message
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_hateful_memes as hateful_memes
import finetune_hf_trainer_jsonl as jsonl
import finetune_hf_trainer_nlvr2 as nlvr2
import finetune_hf_trainer_ucf101 as ucf101
from benchmarks import meter, roofline
from common import arguments
from common.phi3v import image_processing, parts
from common.runtime import process
from common.runtime.parser import Parser
from common.training import memory

# Flags, and what is said about them.
MISTAKES = [
    # misspelled
    ("--lora_rnk 8", "unknown flag --lora_rnk: did you mean --lora_rank?"),
    ("--learning-rate 1e-4", "unknown flag --learning-rate: did you mean --learning_rate?"),
    ("--no_tqdm", "unknown flag --no_tqdm: did you mean --no-tqdm?"),
    ("--Output_Dir=out", "unknown flag --Output_Dir: did you mean --output_dir?"),
    ("--trust_remote_code", "unknown flag --trust_remote_code; --help lists all flags"),
    # of other programs
    ("--lr 1e-4", "unknown flag --lr: use --learning_rate"),
    ("--gradient_accumulation_steps 8", "use --batch_size, the samples per step over all processes"),
    ("--fp16", "use no flag: fp16 is the default on a GPU"),
    ("--nproc_per_node=2", "torchrun's own flags come before the script"),
    # values
    ("--use_lora true", "unexpected 'true' after --use_lora; --help shows which flags take a value"),
    ("--output_dir", "argument --output_dir: expected one argument"),
    ("--num_crops four", "argument --num_crops: invalid int value: 'four'"),
    ("--save_strategy step", "argument --save_strategy: invalid choice: 'step' (choose from 'no', 'steps', 'epoch')"),
    ("--num_crops 17", "--num_crops must be from 1 to 16, got 17"),
    ("--batch_size 5 --batch_size_per_gpu 2", "--batch_size 5 is not divisible by 1 process × --batch_size_per_gpu 2"),
    ("--learning_rate 0", "--learning_rate must be above 0"),
    ("--learning_rate inf", "--learning_rate must be a finite number, got inf"),
    ("--warmup_steps nan", "--warmup_steps must be a finite number, got nan"),
    ("--warmup_steps 2.5", "--warmup_steps must be an integer, or a fraction of all steps below 1, got 2.5"),
    ("--use_lora --lora_dropout 1.5", "--lora_dropout must be below 1, got 1.5"),
    ("--use_lora --lora_rank 1 --lora_alpha_ratio 0.4", "--lora_rank 1 × --lora_alpha_ratio 0.4 must give"),
    ("--max_eval_samples 0", "--max_eval_samples must be at least 1"),
    ("--train_only decoder,head", "--train_only: unknown part 'head', expected decoder, vision, projector"),
    # without effect, or in contradiction
    ("--lora_rank 8", "--lora_rank requires --use_lora or --use_qlora"),
    ("--use_dora", "--use_dora requires --use_lora or --use_qlora"),
    ("--use_lora --use_qlora", "--use_qlora already trains LoRA adapters"),
    ("--use_lora --train_only projector", "remove it, or --use_lora and --use_qlora"),
    ("--freeze_vision_model --train_only projector", "--freeze_vision_model means --train_only decoder: remove one of them"),
    ("--train_only projector --vision_learning_rate 1e-5", "vision is not trained, only projector"),
    ("--use_flash_attention --attn_implementation eager", "are incompatible"),
    ("--max_steps 5 --num_train_epochs 2", "--max_steps and --num_train_epochs both set the length of the run"),
    ("--max_tokens_per_batch 9000 --batch_size_per_gpu 2", "has no effect with --max_tokens_per_batch: remove one of them"),
    ("--gradient_checkpointing elementwise --torch_compile", "has no effect with --torch_compile: remove one of them"),
    ("--gradient_checkpointing elementwise --no-fused_layers", "has no effect with --no-fused_layers: remove one of them"),
    ("--save_steps 2", "--save_steps requires --save_strategy steps"),
    ("--save_total_limit 2", "--save_total_limit requires --save_strategy steps or epoch"),
    ("--eval_steps 2", "--eval_steps requires --eval_strategy steps"),
    ("--hub_model_id me/mine", "--hub_model_id requires --push_to_hub"),
    ("--accept_changes seed", "--accept_changes requires --resume_from_checkpoint"),
    ("--load_best_model_at_end", "--load_best_model_at_end requires"),
    (
        "--load_best_model_at_end --eval_strategy steps --eval_steps 100 --save_strategy steps --save_steps 200",
        "set --save_steps (200) to --eval_steps (100)",
    ),
    ("--early_stopping_patience 2", "--early_stopping_patience requires --load_best_model_at_end"),
    ("--lr_scheduler_type polynomial --learning_rate 1e-7", "--lr_scheduler_type polynomial ends at 1e-07: --learning_rate"),
    ("--use_qlora --init_lora_weights orthogonal", "does not work with 4-bit weights: choose another one"),
    ("--eval_only --use_lora --learning_rate=1e-4", "--eval_only does not train: remove --use_lora, --learning_rate"),
]
OF_TASKS = [
    (docvqa, "--data_dir a --full_train", "--streaming and --full_train read from the Hub"),
    (hateful_memes, "--data_dir a --streaming", "--streaming reads from the Hub and cannot be used with --data_dir"),
    (nlvr2, "--data_dir a --streaming", "--streaming reads from the Hub and cannot be used with --data_dir"),
    (
        jsonl,
        "--train_file a.jsonl --eval_fraction 0.1 --eval_file b.jsonl",
        "--eval_fraction must be between 0 and 1, and excludes",
    ),
    (jsonl, "--data_dir launch", "there is no launch/train.jsonl to train on: pass --train_file, or its folder as --data_dir"),
    (jsonl, "--train_file a.jsonl", "there is no val.jsonl to evaluate on: pass --eval_file, or --eval_fraction 0.1"),
    (
        jsonl,
        "--eval_only --eval_file a.jsonl --seed 1",
        "--seed and --max_train_samples have no effect with --eval_only without --eval_fraction",
    ),
    (ucf101, "--data_dri clips", "unknown flag --data_dri: did you mean --data_dir?"),
    (hateful_memes, "--eval_by_likelihood --max_new_tokens 4", "--max_new_tokens has no effect with --eval_by_likelihood"),
]


@pytest.mark.parametrize(("script", "words", "expected"), [(docvqa, *mistake) for mistake in MISTAKES] + OF_TASKS)
def test_a_flag(script, words, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__name__, *words.split()])
    with pytest.raises(SystemExit) as ended:
        script.parse_args()
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_flash_attention": True}, "--use_flash_attention: no flash attention kernel runs on a CPU"),
        ({"attn_implementation": "flash_attention_2"}, "flash-attn 2 is not installed"),
        ({"optim": "adam_of_mine"}, "--optim adam_of_mine: invalid optimizer"),
        ({"optim": "galore_adamw"}, "galore_torch"),
        ({"optim": "adamw_bnb_8bit", "deepspeed": "common/deepspeed/zero2_offload.json"}, "ignores --optim adamw_bnb_8bit"),
        ({"torch_compile": True, "deepspeed": "common/deepspeed/zero3.json"}, "sharded weights cannot be compiled"),
        ({"report_to": "wandb"}, "--report_to wandb: "),
        ({"use_liger_kernel": True}, "--use_liger_kernel: Liger's kernels require a GPU"),
        ({"attn_implementation": "sdpa", "packing": True}, "--packing requires a variable-length attention kernel"),
        ({"deepspeed": "nowhere.json"}, "--deepspeed nowhere.json: no such file"),
        ({"deepspeed": "common/deepspeed/zero3.json", "use_qlora": True}, "ZeRO-3"),
        ({"resume_from_checkpoint": "no/such/checkpoint"}, "no such directory"),
        ({"model_name_or_path": "/no/such/model"}, "no such directory"),
        ({"model_name_or_path": "nobody/nothing"}, "no such directory, and the Hub cannot be reached"),
        ({"data_dir": "/no/such/data"}, "--data_dir must be the folder of DocVQA's official files"),
        ({"data_dir": None}, "without access to the Hub, use --data_dir"),
    ],
)
def test_what_only_the_run_can_know(options, expected, monkeypatch, docvqa_data, tmp_path):
    assert expected in message(monkeypatch, docvqa_data, tmp_path / "out", **options)


PROGRAMS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for pattern in ("*.py", "tools/*.py", "benchmarks/*.py")
    for path in sorted(ROOT.glob(pattern))
    if "parse_args" in (text := path.read_text(encoding="utf-8")) and "__main__" in text
]
# Flags of data and models that are not there; {} is a folder with empty.jsonl and the spreadsheet table.xlsx.
MISSING = [
    ("finetune_hf_trainer_docvqa", "--data_dir {}/nowhere", "--data_dir {}/nowhere: no such folder"),
    ("finetune_hf_trainer_ucf101", "--data_dir {}/empty.jsonl", "--data_dir {}/empty.jsonl: no such folder"),
    (
        "finetune_hf_trainer_nlvr2",
        "--model_name_or_path {}/no",
        "--model_name_or_path {}/no: no such directory, and not a Hub id",
    ),
    (
        "finetune_hf_trainer_jsonl",
        "--data_dir {} --train_file no.jsonl --eval_fraction 0.1",
        "--train_file {}/no.jsonl: no such",
    ),
    ("finetune_hf_trainer_jsonl", "--eval_only --eval_file {}/no.jsonl", "--eval_file {}/no.jsonl: no such file"),
    (
        "finetune_hf_trainer_jsonl",
        "--train_file {}/table.xlsx --eval_fraction 0.1",
        "--train_file {}/table.xlsx: neither JSON nor CSV: expected JSON Lines, a JSON array, or a table that was saved as CSV",
    ),
    ("tools.check_data", "--data_file {}/empty.jsonl {}/no.jsonl", "--data_file {}/no.jsonl: no such file"),
    ("tools.predict", "--model {}/no --prompt What?", "--model {}/no: no such directory, and not a Hub id"),
    ("tools.evaluate", "--model a/b --data_file {}/table.xlsx", "--data_file {}/table.xlsx: neither JSON nor CSV"),
    ("tools.demo", "--model a/b", 'the page requires Gradio: pip install -e ".[demo]"'),
    ("tools.merge_lora", "--adapter {}/no --output_dir out", "--adapter {}/no: no such directory, and not a Hub id"),
    ("tools.reproduce", "nlvr2 --row full --model_name_or_path {}/no", "--model_name_or_path {}/no: no such directory"),
    ("benchmarks.train", "--model_name_or_path {}/no", "--model_name_or_path {}/no: no such directory"),
]
# Runs programs one after the other, and prints exit code and output of each, and whether PyTorch is imported.
RUN = """
import contextlib, io, json, runpy, sys
results, sys.modules["gradio"] = [], None  # as if it were not installed
for module, *words in json.load(sys.stdin):
    sys.argv, said, code = [module, *words], io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(Exception):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as ended:
            code = ended.code
    results.append([code, said.getvalue(), "torch" in sys.modules])
print(json.dumps(results))
"""


def test_flags_and_files_are_checked_before_torch_is_imported(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "table.xlsx").write_bytes(b"PK\x03\x04")
    expected = {(program, "--help"): (0, "usage: ") for program in PROGRAMS}
    expected |= {(program, "--no_such_flag"): (1, "error: unknown flag --no_such_flag") for program in PROGRAMS}
    expected |= {
        (program, *words.replace("{}", str(tmp_path)).split()): (1, f"error: {message.replace('{}', str(tmp_path))}")
        for program, words, message in MISSING
    }
    commands = json.dumps(list(expected))
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN], cwd=ROOT, input=commands, capture_output=True, text=True, timeout=60
    )
    for (command, (code, start)), found in zip(expected.items(), json.loads(process.stdout), strict=True):
        assert found[0] == code and found[1].startswith(start) and not found[2], (command, found)


def test_numbers_that_the_flags_repeat():
    assert (arguments.PARTS, arguments.MAX_CROPS) == (parts.PARTS, image_processing.MAX_CROPS)
    assert (tuple(meter.GPUS), memory.MODES) == (roofline.GPU_NAMES, roofline.MODES)


@pytest.mark.parametrize("failing", [[0, 1], [1]])
def test_torchruns_summary_ends_with_the_message(failing, tmp_path, monkeypatch, capsys):
    """Whichever process fails first."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for in_training, printed in ((True, "error: no rows are left\n"), (False, "")):
        with pytest.raises(SystemExit):
            process.fail("no rows are left", others_may_continue=in_training)
        assert capsys.readouterr() == ("", printed)
    files = {rank: tmp_path / ("error.json" if rank == failing[-1] else "none") for rank in failing}
    failures = {rank: ProcessFailure(rank, 100 + rank, 1, str(file)) for rank, file in files.items()}
    summary = str(ChildFailedError("script.py", failures)).splitlines()
    assert summary[-2] == "  traceback : error: no rows are left"
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "error: no rows are left"


def test_ctrl_c_while_libraries_are_imported(monkeypatch, capfd):
    """From the moment a program has a parser; training handles signals itself."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(os, "_exit", sys.exit)
    Parser("")
    with pytest.raises(SystemExit) as ended:
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert ended.value.code == 130 and capfd.readouterr().err == "stopped by SIGINT\n"
