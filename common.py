"""Shared parts of all programs: error classes, JSON files, flags, locks, signals, and how a program ends."""
from __future__ import annotations

import argparse
import contextlib
import difflib
import fcntl
import gc
import json
import logging
import os
import re
import reprlib
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger("common")

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


def print_line(text: str) -> None:
    """Print a line to standard output in one write, so that lines of several threads do not mix."""
    print(text + "\n", end="", flush=True)


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
        names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        flags = {name.replace("_", "-"): name for name in names}
        words = message.split() if "unrecognized" in message else ()
        unknown = [word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
        # Only likely typing errors get a suggestion. At a lower cutoff, flags of Megatron would get a wrong one.
        near = [difflib.get_close_matches(word, flags, n=1, cutoff=0.9)
                or [flag for flag in flags if sorted(flag) == sorted(word)] for word in unknown]  # swapped letters
        if any(near):
            message += f" (did you mean {', '.join(flags[match[0]] for match in near if match)}?)"
        if not all(near):
            message += (f"; {self.prog} --help lists the flags, and the migration table in README.zh.md has those of "
                        "MindSpeed-MM")
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


# ---- locks, signals and exit ---------------------------------------------------------------------------------------

LOCK_FILE = "run.lock"  # names the process that holds the lock


@contextlib.contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Lock a save directory while the context is active. Raises InputError if another run holds the lock.

    The operating system releases the lock when the process ends, even after kill -9. The file stays.
    """
    with open(directory / LOCK_FILE, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            file.seek(0)
            raise InputError(f"--save {directory}: another run uses it ({file.read()}): end that run, or give another "
                             "directory") from e
        except OSError as e:  # some cluster file systems have no locks
            log.warning("--save %s: cannot be locked (%s): make sure that no other run uses it", directory, e.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


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
    """Put a DataLoader worker in a process group of its own: only the main process gets Ctrl-C and torchrun's SIGTERM.

    This is a `worker_init_fn`. Training switches the garbage collector off, which a forked worker inherits.
    """
    os.setpgid(0, 0)
    gc.enable()


@contextlib.contextmanager
def explain_errors(state) -> Iterator[None]:
    """Turn out-of-memory errors, killed workers and collective timeouts into InputErrors that name the rank.

    `state` is the `parallel.ParallelState`. Other exceptions pass. For a bug, the rank and its current rows are logged.
    """
    try:
        yield
    except USER_ERRORS:
        raise
    except Exception as e:
        if is_peer_failure(e):
            if not isinstance(e, PeerError):
                with contextlib.suppress(RuntimeError):  # the store that keeps the answers may have died with rank 0
                    state.report_alive()
            raise
        text = str(e).strip().partition("\n")[0] or type(e).__name__
        rows = "; ".join(state.current_sources[:8])
        all_ranks_fail = False
        if re.search(r"DataLoader worker.*(is killed|exited unexpectedly)", text):
            problem = f"{text}: give a smaller --num-workers if the system ran out of memory"
        elif isinstance(e, MemoryError) or re.search("out of memory|n't allocate", text):
            problem = (f"out of memory ({text}): give a smaller --micro-batch-size or --seq-length, --recompute full, "
                       f"--activation-offload, --cpu-offload or more ranks; current rows: {rows}")
        elif isinstance(e, RuntimeError) and re.search("[Tt]imed out|[Tt]imeout", text):
            all_ranks_fail = True
            unresponsive = ", ".join(map(str, state.unresponsive_ranks())) or "(all answer)"
            problem = (f"a collective waited for {state.timeout.total_seconds() / 60:g} minutes "
                       f"(--distributed-timeout-minutes); no answer from rank {unresponsive}")
        else:
            log.error("rank %d failed; current rows: %s", state.rank, rows)
            raise
        error = InputError(f"rank {state.rank}: {problem}")
        error.only_on_this_rank = not all_ranks_fail
        raise error from e


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
