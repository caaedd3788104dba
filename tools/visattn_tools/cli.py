"""What the commands share: errors made for the person who typed, number ranges, exit codes."""

import argparse
import atexit
import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake in what the person gave. The command prints its message, without a traceback, and exits with 2."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived and the work stopped at a safe point. The command exits with 128 + `signum`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A clause with the names most like `name`, or an empty string: ``; did you mean 'lr', 'lr_base'?``."""
    names = difflib.get_close_matches(name, sorted(known), n=count, cutoff=0.6)
    return f"; did you mean {', '.join(map(repr, names))}?" if names else ""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are :class:`UserError` and which names the flag nearest to an unknown one.

    Args:
        elsewhere: Flags that people know from another program, without their dashes, and what to use instead.
        kwargs: argparse's.
    """

    def __init__(self, elsewhere: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self.elsewhere = elsewhere or {}

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        """``parse_args`` that names the flag nearest to an unknown one."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            raise UserError(f"unknown argument {flag}{self.instead(flag, self._option_string_actions)}")
        return namespace

    def instead(self, flag: str, known: Iterable[str]) -> str:
        """A clause that says what to use in place of an unknown flag or key: see `elsewhere`, else :func:`nearest`."""
        advice = self.elsewhere.get(flag.lstrip("-").replace("_", "-"))
        return f": {advice}" if advice else nearest(flag, known)


def number(
    kind: type[int] | type[float], low: float, high: float | None = None, above: bool = False
) -> Callable[[str], float]:
    """An argparse type: a number of `kind` in [`low`, `high`], or above `low` if `above`."""
    expected = f"{'an integer' if kind is int else 'a number'} {'>' if above else '>='} {low:g}"
    expected += "" if high is None else f" and <= {high:g}"

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number; expected {expected}") from None
        # Written so that nan fails.
        if not ((value > low if above else value >= low) and (high is None or value <= high)):
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected {expected}")
        return value

    return convert


def run(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Call `main` with the command line and exit: 0, 2 after a :class:`UserError`, 128 + n after signal n."""
    code = 0
    try:
        main(None)
    except UserError as error:
        # One that crossed from a loader's worker process carries that process's traceback before the message.
        print(f"error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
        code = 2
    except Interrupted as error:
        code = 128 + error.signum
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exit with `code`; as one of several processes that torchrun started, without taking the interpreter apart.

    Gloo's threads may still hold tensors of the last exchange, also after ``destroy_process_group``, since DDP keeps
    the group. One that lets go of such a tensor while Python finalizes aborts a process that has done all its work
    ("terminate called without an active exception"). So this ends as multiprocessing ends its processes: threads are
    waited for, exit handlers run, output is flushed, and the process is over.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # No public function waits for all threads, nor runs the handlers; multiprocessing calls the same two.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
