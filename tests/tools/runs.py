"""Training runs in processes of their own, some of which are to die; and what two runs leave, compared."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch
from safetensors.torch import load_file
from visattn_tools import engine, training
from visattn_tools.checkpoint import load_state
from visattn_tools.cli import Interrupted

# Everything random at once, an update of several batches, and an epoch whose last update has fewer.
LIVELY = ["--epochs", "3", "--warmup-epochs", "1", "--sched-on-updates", "--mixup", "0.2", "--cutmix", "1"]
LIVELY += ["--reprob", "0.5", "--drop-path", "0.3", "--drop", "0.2", "--model-ema", "--model-ema-decay", "0.9"]
LIVELY += ["--batch-size", "2", "--grad-accum-steps", "2", "--checkpoint-minutes", "0"]


def _process(
    arguments: list[str], environment: dict[str, str], at: int, signum: signal.Signals, among: tuple[str, ...]
) -> None:
    # Loaders' workers as of a command: the fork server would be their parent and keep them when this process is killed.
    multiprocessing.set_start_method("fork", force=True)
    os.environ |= environment
    torch.set_num_threads(1)
    count = 0

    def event(original: Callable[..., object]) -> Callable[..., object]:
        def call(*values: object) -> object:
            nonlocal count
            count += 1
            if count == at and "nan" in among:
                values = (values[0], values[1] * float("nan"), *values[2:])  # type: ignore[operator]
            elif count == at:
                os.kill(os.getpid(), signum)
            return original(*values)

        return call

    for name, (owner, attribute) in {
        "step": (engine.Engine, "_step"),
        "nan": (engine.Engine, "_step"),
        "replace": (os, "replace"),
        "fsync": (os, "fsync"),
    }.items():
        if name in among:
            setattr(owner, attribute, event(getattr(owner, attribute)))
    try:
        training.main(arguments)
    except Interrupted as interrupted:
        os._exit(128 + interrupted.signum)


def exit_codes(
    arguments: list[str],
    processes: int = 1,
    at: int = 0,
    among: tuple[str, ...] = (),
    victim: int = 0,
    signum: signal.Signals = signal.SIGKILL,
) -> list[int | None]:
    """Train in new processes, as torchrun starts them, and return their exit codes.

    Args:
        arguments: The command line.
        processes: How many train together.
        at: The event at which one gets a signal, from 1 on.
        among: What counts as an event: ``step`` of training, ``replace`` and ``fsync`` of a file; or ``nan``: the
            images of a training step become so, and there is no signal.
        victim: Which one gets it. If it dies of it the others are killed, too, as torchrun does.
        signum: Which signal.
    """
    context = multiprocessing.get_context("forkserver")  # imports torch once for all
    context.set_forkserver_preload(["visattn_tools.training"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {}
        if processes > 1:
            environment = {"WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
            environment |= {"MASTER_ADDR": "127.0.0.1"}
        values = {key: str(value) for key, value in environment.items()}
        own = among if rank == victim else ()
        started.append(context.Process(target=_process, args=(arguments, values, at, signum, own)))
        started[-1].start()
    waiting = list(started)
    while waiting:
        assert wait([process.sentinel for process in waiting], 120), "the processes hang"
        for process in [process for process in waiting if not process.is_alive()]:
            waiting.remove(process)
            if process.exitcode:
                for other in waiting if process.exitcode in (1, -signal.SIGKILL) else ():
                    other.kill()
    return [process.exitcode for process in started]


def killed(arguments: list[str], at: int, *among: str) -> bool:
    """Whether a process that trains was killed at an event, see :func:`exit_codes`; else it came to its end."""
    (code,) = exit_codes(arguments, at=at, among=among)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def assert_same_run(a: Path, b: Path) -> None:
    """Compare all that two runs leave, bit by bit."""
    assert (a / "summary.csv").read_text() == (b / "summary.csv").read_text()
    for name in ("best", "last"):
        one, other = (load_file(run / "checkpoints" / f"{name}.safetensors") for run in (a, b))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (load_state(run / "checkpoints" / "state.pt") for run in (a, b))
    assert one["updates"] == other["updates"]
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    for key, state in one["optimizer"]["state"].items():
        assert all(torch.equal(state[name], other["optimizer"]["state"][key][name]) for name in state)
    assert torch.equal(one["random"]["torch"], other["random"]["torch"])
    assert one["random"]["python"] == other["random"]["python"]
