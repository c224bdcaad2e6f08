"""`lead-ds COMMAND`. Exit status: 0 done, 1 the work failed, 2 the input was wrong; errors are one line, without traceback."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import typer
import typer.main

from lead_ds import __version__
from lead_ds.cli import (
    evaluation,
    inspection,
    operations,
    pipeline,
    preparation,
    retrieval,
    sharing,
    teaching,
    training,
)
from lead_ds.errors import InputError, LeadError

# Usage errors: click's own class, or that of the click which newer versions of typer carry inside.
UsageError = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="lead-ds",
    help="Distil a large retrieval teacher into a small dense-retrieval student, layer by layer.",
    epilog="Start with `lead-ds demo`. Under a launcher: `deepspeed --module lead_ds distill CONFIG`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"lead-ds {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    pass


preparation.add_commands(app)
training.add_commands(app)
teaching.add_commands(app)
pipeline.add_commands(app)
retrieval.add_commands(app)
evaluation.add_commands(app)
inspection.add_commands(app)
sharing.add_commands(app)
operations.add_commands(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get("LEAD_DS_DEBUG") == "1"
    # Where another program has the port at which processes meet, PyTorch would warn each second, with its stack.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # DeepSpeed's launcher puts --local_rank=N before our own arguments; --debug is welcome anywhere.
    arguments = [a for a in arguments if not re.fullmatch(r"--local[_-]rank=\d+", a) and a != "--debug"]
    try:
        _refuse_undecoded(arguments)
        _refuse_no_number()
        program = typer.main.get_command(app)
        _refuse_twice(arguments, getattr(program, "commands", {}))
        status = program(args=arguments, prog_name="lead-ds", standalone_mode=False)
    except LeadError as error:
        status = _report(str(error), error.status, debug)
    except typer.Abort:
        status = _report("lead-ds: interrupted (checkpoints are kept: continue with --resume)", 130, False)
    except KeyboardInterrupt:
        status = _report("lead-ds: interrupted (checkpoints are kept: continue with --resume)", 130, False)
    except BrokenPipeError:
        # Whoever read our output has gone: `lead-ds ... | head`. Not an error; keep the interpreter from flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except MemoryError:
        status = _report("lead-ds: out of memory (lower the batch size)", 1, debug)
    except Exception as error:
        if isinstance(error, UsageError):
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "lead-ds"
            message = getattr(error, "format_message", error.__str__)().rstrip(".?")
            sys.exit(_report(f"{command}: {message} (see {command} --help)", 2, debug))
        if debug:
            traceback.print_exc()
        what = " ".join(str(error).split()) or type(error).__name__
        status = _report(f"lead-ds: {type(error).__name__}: {what[:600]} (add --debug for the traceback)", 1, False)
    sys.stdout.flush()
    sys.exit(status if isinstance(status, int) else 0)


def _refuse_undecoded(arguments: Sequence[str]) -> None:
    """Raise InputError for an argument whose bytes are no text here: no tokenizer, file or report could take it."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            what = f"is not {sys.getfilesystemencoding().upper()}: {argument!r}"
            raise InputError(
                "an argument", what, "write it in UTF-8, under a UTF-8 locale such as LANG=C.UTF-8"
            ) from None


def _refuse_no_number() -> None:
    """Raise InputError for what a launcher would have set, and that is none of its numbers."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise InputError(name, f"is {value!r} in the environment, and no number", "unset it, or use a launcher")


def _refuse_twice(arguments: Sequence[str], commands: Mapping[str, Any]) -> None:
    """Raise InputError for an option that is given twice and holds one value: the first would be dropped."""
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    for option in getattr(commands.get(name), "params", ()):
        if option.param_type_name != "option" or option.multiple:
            continue
        words = [word.partition("=")[0] for word in takewhile(lambda word: word != "--", arguments)]
        if sum(words.count(spelling) for spelling in option.opts) > 1:
            raise InputError(option.opts[0], "is given twice", "keep one of them")


def _report(message: str, status: int, debug: bool) -> int:
    if debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    named = os.environ.get("RANK", "0")
    rank = int(named) if named.isdecimal() else 0
    if rank and status == 2:
        # Wrong input is wrong on every rank: rank 0 reports it once. Leave it the time to, before the launcher ends us
        # all.
        time.sleep(2)
    else:
        print(f"error: {message}" if not rank else f"error: [rank {rank}] {message}", file=sys.stderr, flush=True)
    return status
