"""A process of a run that a fault strikes: at a call of a function, in one process or in all."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.training.callbacks import SECONDS_OF_ONE_SIGNAL


@dataclass(frozen=True)
class Place:
    """What a strike can act on: the directories of the run, and the arguments of the call."""

    output: Path
    data: Path
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Strike:
    """What happens before a call of a function."""

    at: str  # the function, for example common.training.trainer.FinetuningTrainer.training_step
    do: Callable[[Place], None]
    call: int = 1  # number of the call, from 1
    ranks: tuple[int, ...] = (0, 1)  # processes that are struck


def arm(strike: Strike, output: Path, data: Path) -> None:
    """Replace the function by one that strikes at its call."""
    path = strike.at.split(".")
    # The longest prefix that is a module, then attributes.
    depth = next(depth for depth in range(len(path) - 1, 0, -1) if ".".join(path[:depth]) in sys.modules)
    owner: Any = sys.modules[".".join(path[:depth])]
    for name in path[depth:-1]:
        owner = getattr(owner, name)
    original, calls = getattr(owner, path[-1]), 0

    def struck(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == strike.call:
            strike.do(Place(output, data, arguments))
        return original(*arguments, **options)

    setattr(owner, path[-1], struck)


def be_struck(strike: Strike | None, output: Path, data: Path, rank: int, *arguments: Any) -> None:
    """Be one process of a run, as :func:`forked.be_process`."""
    from forked import be_process

    if strike and rank in strike.ranks:
        arm(strike, output, data)
    be_process(rank, *arguments, whole=strike is not None and strike.at.endswith(".report"))


def send(number: int, times: int, place: Place) -> None:
    """Send a signal to this process; twice so late that it is not taken for the first one."""
    os.kill(os.getpid(), number)
    for _ in range(times - 1):
        time.sleep(SECONDS_OF_ONE_SIGNAL + 0.5)
        os.kill(os.getpid(), number)


kill, stop, term, interrupt = (
    partial(send, number, 1) for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT)
)
term_twice, interrupt_twice = partial(send, signal.SIGTERM, 2), partial(send, signal.SIGINT, 2)


def kill_workers(place: Place) -> None:
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.5)


def fill_disk(place: Place) -> None:
    """From now on, files that have 50 kB get no larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))


def kill_in_writing(place: Place) -> None:
    """The process is killed while it writes the first file that gets longer than 50 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    fill_disk(place)


def fail(number: int, *_: Any, **__: Any) -> None:
    """Fail with an error of the operating system."""
    raise OSError(number, os.strerror(number))


def refuse_directories(place: Place) -> None:
    """From now on, no directory can be made, as on a file system that is read-only."""
    Path.mkdir = partial(fail, errno.EROFS)  # type: ignore[method-assign]


def remove_output(place: Place) -> None:
    shutil.rmtree(place.output)


def kill_while_removing(place: Place) -> None:
    """As if killed in ``rotate_checkpoints``, which deletes one file after another."""
    oldest = min(place.output.glob("checkpoint-*"), key=os.path.getmtime)
    for path in sorted(path for path in oldest.rglob("*") if path.is_file())[1::2]:
        path.unlink()
    os.kill(os.getpid(), signal.SIGKILL)


def put_inf(place: Place) -> None:
    """A weight becomes infinite, as after a bit flip in memory."""
    trainer = place.arguments[0]
    weight = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    with torch.no_grad():
        weight.view(-1)[0] = float("inf")


def put_nan_loss(place: Place) -> None:
    """The loss of all steps from now on is not a number."""
    trainer = place.arguments[0]
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *arguments, **options: compute(*arguments, **options) * float("nan")


def put_inf_gradient(place: Place) -> None:
    """A gradient of all steps from now on is infinite, although the loss is not."""
    trainer = place.arguments[0]
    weight = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    weight.register_hook(lambda gradient: gradient * float("inf"))


def spoil(how: Callable[[Path], Any], names: str, place: Place) -> None:
    """Spoil pictures, before any process reads on."""
    if os.environ["RANK"] == "0":
        for path in (place.data / "documents").glob(names):
            how(path)
    torch.distributed.barrier()


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def repaint(path: Path) -> None:
    Image.new("RGB", (300, 300), "red").save(path)


def wait_for_signal(place: Place) -> None:
    """Say that the step is reached, and wait until the signal was sent."""
    (place.output.parent / f"reached-{os.environ['RANK']}").touch()
    while not (place.output.parent / "sent").exists():
        time.sleep(0.05)


if __name__ == "__main__":  # under torchrun
    import finetune_hf_trainer_docvqa as script

    output, data = Path(sys.argv.pop(1)), Path(sys.argv.pop(1))
    arm(Strike("common.training.trainer.FinetuningTrainer.training_step", wait_for_signal, call=3), output, data)
    script.run(script.main, script.parse_args())
