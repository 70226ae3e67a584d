"""The commands, their exit codes, and what a user sees when something goes wrong.

Exit codes: 0 done, 2 something the user can mend (one line says what and how), 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

import typer

from rankloom.cli import demo, evaluate, export, generate, limits, methods, train
from rankloom.errors import RankloomError, near_names

__all__ = ["app", "main"]

app = typer.Typer(
    name="rankloom",
    help="Low-rank adaptation and low-rank training: every published method as a composition of a few parts.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks. May stand anywhere on the line."),
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("rankloom"))
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.command,
    "eval": evaluate.command,
    "generate": generate.command,
    "methods": methods.command,
    "export": export.command,
    "demo": demo.command,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(limits.app, name="limits")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    if arguments is None:
        _share_cores(sys.argv[1:])
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Taken out here so that it works after the command's name as well.
    debug = "--debug" in words or bool(os.environ.get("RANKLOOM_DEBUG"))
    words = [word for word in words if word != "--debug"]
    try:
        result = app(args=words, prog_name="rankloom", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error, words)
    if result == 130:  # typer's own handling of Ctrl-C
        return _fail("interrupted", 130)
    return result if isinstance(result, int) else 0


def _share_cores(words: list[str]) -> None:
    """Start again with OpenMP threads that spin only briefly while they wait for one another.

    By default a waiting thread spins for milliseconds. Where another program holds one of the cores, nearly all time
    goes there: a training step on two shared cores was measured at 25 s, and at 2 s with this setting. The runtime
    reads it when torch is loaded, which has happened already. A user's own setting is left alone.
    """
    computes = words and words[0] in ("train", "eval", "generate", "demo", "limits")
    if not computes or sys.platform != "linux" or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return
    os.execve(sys.executable, sys.orig_argv, {**os.environ, "GOMP_SPINCOUNT": "2000"})


def _report(error: Exception, words: list[str]) -> int:
    """Print one line for ``error`` and choose the exit code."""
    if isinstance(error, RankloomError):
        return _fail(f"error: {_flat(str(error))}", 2)
    if type(error).__name__ == "Interrupted":  # defined beside the trainer, which only some commands import
        return _fail(_flat(str(error)), 130)
    if hasattr(error, "format_message"):  # what the parser raises, whichever click it carries
        message = _flat(error.format_message())
        if words and words[0] != "limits" and message.startswith("No such command") and "Did you mean" not in message:
            message = message.rstrip(".") + near_names(words[0], [*_COMMANDS, "limits"])
        return _fail(f"error: {message} (see rankloom --help)", 2)
    if isinstance(error, ModuleNotFoundError):
        return _fail(f"error: {error}; install the extras: pip install 'rankloom[all]'", 2)
    return _fail(f"unexpected {type(error).__name__}: {_flat(str(error))}; run again with --debug for the traceback", 1)


def _flat(text: str) -> str:
    return " ".join(text.split())


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code
