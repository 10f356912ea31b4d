"""What every program of the project shares: error classes, JSON files, flags, signals, and how a program ends."""
from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import reprlib
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# ---- errors --------------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """An input that cannot be used: exit status 1. The message is one line: what is wrong, where, what to do."""


class UsageError(Exception):
    """A wrong command line: exit status 2."""


class PeerError(Exception):
    """Another rank has failed and reports the error."""


USER_ERRORS = (UsageError, InputError, OSError)  # reported as one line; any other exception is a bug


def is_peer_failure(error: BaseException) -> bool:
    """Return whether the error only means that another rank is gone."""
    gone = "closed by peer|reset by peer|Broken pipe|pair closure|remote process exited"
    return isinstance(error, PeerError) or isinstance(error, RuntimeError) and bool(re.search(gone, str(error)))


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, or its type's name if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def shorten(value: object) -> str:
    """Return a value's repr, cut to fit in an error message."""
    return reprlib.repr(value) if isinstance(value, list | dict) else repr(value)[:100]


def read_json(path: str | Path, missing_ok: bool = False) -> dict:
    """Read the JSON object in a small file; return {} for a missing file if `missing_ok`. Raises InputError."""
    path = Path(path)
    if missing_ok and not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: is not valid JSON ({one_line(e)})") from e
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a JSON object")
    return content


# ---- flags ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors. `@FILE` reads flags from a file, where # starts a comment."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False, fromfile_prefix_chars="@", formatter_class=_Help)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def parse_known_args(self, args=None, namespace=None):
        try:
            return super().parse_known_args(args, namespace)
        except (ValueError, RecursionError) as e:  # from a flag file: unbalanced quotes, wrong encoding, endless @FILE
            files = ", ".join(arg for arg in args or () if arg.startswith("@"))
            self.error(f"{files} cannot be read as flags ({one_line(e)}): give one flag per line")

    def error(self, message: str):
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        for word in re.findall(r"--[\w-]+", message) if "unrecognized" in message else ():
            near = difflib.get_close_matches(word, flags, n=1)
            message += f" (did you mean {near[0]}?)" if near else f" ({self.prog} --help lists the flags)"
        raise UsageError(message)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show a flag's default only if it is informative."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        uninformative = action.default in (None, []) or isinstance(action.default, bool)
        return action.help if uninformative else super()._get_help_string(action)


def number(
    kind: type, low: float, high: float | None = None, *, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """Return an argparse type for a number of `kind` in [low, high].

    `above` excludes `low`, `below` excludes `high`. The default `high` is 1e9 for integers, infinity for floats.
    """
    high = high if high is not None else 10**9 if kind is int else float("inf")

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        inside = (low < value if above else low <= value) and (value < high if below else value <= high)
        if not inside or value == float("inf"):
            limits = f"{'above' if above else 'at least'} {low:g}"
            limits += f" and {'below' if below else 'at most'} {high:g}" if high < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'} {limits}")
        return value

    return parse


# ---- signals and exit ----------------------------------------------------------------------------------------------

stop_requested = threading.Event()  # set by SIGTERM or SIGINT once a program handles them (see StopSignals)


class StopSignals:
    """Handle SIGTERM and SIGINT as requests to save and stop after the current step, SIGUSR1 as a request to save."""

    def __init__(self, deadline: float = float("inf")):
        """deadline: a time.monotonic() value from which `poll` requests a stop."""
        self.save, self.deadline = False, deadline
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._handle)

    def _handle(self, number: int, frame) -> None:
        self.save = True
        if number != signal.SIGUSR1:
            stop_requested.set()

    def poll(self) -> tuple[bool, bool]:
        """Return (stop requested, save requested since the last call) for this rank."""
        save, self.save = self.save, False
        return stop_requested.is_set() or time.monotonic() >= self.deadline, save


def leave_process_group(worker: int) -> None:
    """Let the main process handle signals to its process group (Ctrl-C, torchrun's SIGTERM): a `worker_init_fn`."""
    os.setpgid(0, 0)


def run_program(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run `main` and return its exit status: 0, 1 for an unusable input, 2 for a wrong command line.

    A user error (USER_ERRORS) prints one line, or a traceback with `--debug`; a bug raises. Under torchrun all ranks
    often find the same error: rank 0 prints it, and torchrun ends the others within the 5 seconds that they wait. A
    rank that only lost a peer prints nothing.
    """
    try:
        main(argv)
        return 0
    except USER_ERRORS as e:
        error = e
    except (PeerError, RuntimeError) as e:
        if not is_peer_failure(e):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stop_requested.wait(10)  # torchrun ends this rank, unless its SIGTERM came before the collective broke
        return 1
    if "--debug" in argv:
        traceback.print_exception(error)
    if os.environ.get("RANK", "0") != "0" and not getattr(error, "only_on_this_rank", False):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = one_line(error)
    print("error:", text, file=sys.stderr, flush=True)
    return 2 if isinstance(error, UsageError) else 1
