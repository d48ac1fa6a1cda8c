"""Imports between the packages of common/, read from the source; which libraries they load; what they use of transformers."""

import ast
import inspect
import os
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT
from runs import SCRIPT, flags, write_docvqa
from transformers import Trainer

from common.training.trainer import FinetuningTrainer

COMMON = ROOT / "common"
# Each may import those before it.
ROOMS = ("runtime", "phi3v", "arguments", "data", "model", "evaluation", "report", "training")
MOST_LEVELS = 6


def modules():
    return sorted(path for path in COMMON.rglob("*.py") if path.name != "__init__.py" or path.parent != COMMON)


def room_of(path):
    return path.relative_to(COMMON).parts[0].removesuffix(".py")


def imported(path):
    """Full names of what a module of common/ imports, wherever in it."""
    return imports(ast.parse(path.read_text(encoding="utf-8")), path)


def imports(tree, path):
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = (
                [*package[: len(package) - node.level + 1], *(node.module or "").split(".")] if node.level else [node.module]
            )
            module = ".".join(filter(None, parts))
            for alias in node.names:  # a name in a module, or a module itself
                submodule = ROOT.joinpath(*module.split("."), f"{alias.name}.py")
                yield f"{module}.{alias.name}" if submodule.is_file() else module


def edges():
    """Pairs of rooms of which the first imports the second."""
    for path in modules():
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "common" and len(parts) > 1 and parts[1] != room_of(path):
                yield room_of(path), parts[1]


def test_there_are_eight_rooms():
    assert {room_of(path) for path in modules()} == set(ROOMS)


def test_imports_go_only_one_way():
    assert not [(upper, lower) for upper, lower in set(edges()) if ROOMS.index(lower) >= ROOMS.index(upper)]


def test_the_longest_chain_of_imports_has_six_levels():
    below = set(edges())

    @cache
    def level(room):
        return 1 + max((level(lower) for upper, lower in below if upper == room), default=0)

    assert max(map(level, ROOMS)) <= MOST_LEVELS


def test_there_are_no_import_cycles():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in modules()}
    below = {name: {found for found in imported(path) if found in names} for name, path in names.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, [*path[path.index(name) :], name]
        if name not in done:
            path.append(name)
            for lower in below[name]:
                visit(lower)
            done.add(path.pop())

    for name in names:
        visit(name)


def test_packages_export_nothing_of_their_modules():
    """Names are imported from their modules; only phi3v registers its classes."""
    for path in COMMON.glob("*/__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        assert path.parent.name == "phi3v" or len(tree.body) == 1, path


def test_model_and_runtime_import_no_other_package():
    assert not [edge for edge in edges() if edge[0] in ("phi3v", "runtime")]


def test_flags_are_not_rewritten():
    """Settings that follow from them are in a Setup."""
    for path in [*modules(), *ROOT.glob("finetune_hf_trainer_*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
            for target in (part for each in targets for part in ast.walk(each)):
                owner = ast.unparse(target.value) if isinstance(target, ast.Attribute) else ""
                assert owner not in ("args", "flags", "self.flags"), (path, ast.unparse(node))


def imported_at_the_top(path):
    """Full names of what a module imports whenever it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return set(imports(tree, path))


def test_heavy_libraries_are_imported_late():
    """Only by modules of report/, which others import late as well, except for report/run.py."""
    for path in modules():
        names = imported_at_the_top(path)
        if room_of(path) != "report" or path.name == "run.py":
            heavy = {"bitsandbytes", "matplotlib", "sklearn"} & {name.split(".")[0] for name in names}
            late = {name for name in names if name.startswith("common.report.") and name != "common.report.run"}
            assert not heavy | late, path


@pytest.mark.slow
def test_training_loads_no_libraries_of_reports(random_model, tmp_path):
    """Up to the report. The model does without bitsandbytes too, which transformers' Trainer imports, by way of PEFT."""
    data = write_docvqa(tmp_path / "data", train=4, val=1)
    lora = {"model_name_or_path": random_model, "use_lora": True, "lora_rank": 4}
    words = flags(data, tmp_path / "output", max_steps=1, dataloader_num_workers=0, **lora)
    code = f"""
import sys, common.phi3v
assert "bitsandbytes" not in sys.modules
import finetune_hf_trainer_docvqa as script
from common.training.trainer import FinetuningTrainer
found = []
FinetuningTrainer.report = lambda trainer: found.append({{"matplotlib", "sklearn"}} & set(sys.modules))
sys.argv = {[SCRIPT, *words]}
script.main(script.parse_args())
assert found == [set()], found
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_private_methods_of_transformers():
    """At most six are overridden, each with a comment why; no object writes another's private fields."""
    overridden = {name for name in vars(FinetuningTrainer) if hasattr(Trainer, name) and name[0] == "_" != name[1]}
    assert len(overridden) <= 6, overridden
    lines = inspect.getsource(FinetuningTrainer).splitlines()
    for name in overridden:
        [number] = [number for number, line in enumerate(lines) if line.startswith(f"    def {name}(")]
        assert lines[number - 1].startswith("    # "), name
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr[0] == "_" != node.attr[1]:
                assert ast.unparse(node.value) in ("self", "cls"), (path, ast.unparse(node))
