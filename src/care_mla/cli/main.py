"""The command `care`: lists the commands, imports the chosen one alone, and turns errors into exit codes.

Exit codes: 0 done; 1 our fault, with a traceback; 2 the user's input, with a message; 3 done, but a check
failed; 130 interrupted, work kept. Nothing heavy is imported here, so that `care --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from care_mla import __version__, console
from care_mla.errors import CareError

# No room, read-only, over quota, not allowed: the user can mend these, and nothing of ours is wrong.
UNWRITABLE = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM)
COMMANDS = {
    "inspect": "what a model is, and whether it can be converted; reads its configuration alone",
    "plan": "memory, disk, time and cached values of a conversion; writes nothing",
    "convert": "turn a model into Multi-head Latent Attention",
    "compare": "methods side by side at one budget, with the original",
    "evaluate": "perplexity, tasks, needles, cache and speed of several models in one run",
    "generate": "answers of several models to one prompt, side by side",
    "heal": "train a converted model back towards its original",
    "export": "write a converted model again for another engine: deepseek-v2, gguf, …",
    "verify": "reload a converted model and compare it with its stored reference",
    "bench": "speed and memory of models side by side, or of a conversion",
    "report": "one HTML page about every result in a folder",
    "demo": "convert and check a small built-in model, offline, in minutes",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        arguments: the words after `care`; those of the process if None.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    terminal = console.current()
    if not words or words[0] in ("-h", "--help", "help"):
        terminal.out(help_text())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        terminal.out(f"care {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        terminal.error(
            f"care: there is no command {name!r}. Commands: {', '.join(COMMANDS)}. Try: care --help"
        )
        return 2
    return _run(name, rest)


def help_text() -> str:
    """What `care --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: care COMMAND [options]",
            "",
            "Turns a decoder with multi-head or grouped-query attention into Multi-head Latent Attention.",
            "",
            *lines,
            "",
            "care COMMAND --help lists a command's options. First steps: care demo",
        ]
    )


def _run(name: str, arguments: list[str]) -> int:
    terminal = console.current()
    terminal.warnings.clear()
    try:
        return import_module(f"care_mla.cli.{name}").run(arguments)
    except CareError as error:
        terminal.error(f"care {name}: {error}")
        return 2
    except KeyboardInterrupt:
        terminal.error(f"care {name}: interrupted, work kept. The same command goes on from there.")
        return 130
    except BrokenPipeError:
        # The reader has left (`care plan demo | head`): nothing more can be said, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        terminal.error(
            f"care {name}: {error.filename or 'the disk'}: {error.strerror}. Work so far is kept. Make room, "
            "or choose a folder that can be written, and type the same command again."
        )
        return 2
