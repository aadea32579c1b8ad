"""The command lines of scripts: flags with their bounds, and text that is safe to print."""

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from support import machine
from support.files import UserError

# A bound, in the words of its error -> whether a value is within it
BOUNDS = {f"at least {least}": lambda value, least=least: value >= least for least in range(3)} | {
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in (0, 1], or auto": lambda value: value == "auto" or 0 < value <= 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "above 0": lambda value: 0 < value < float("inf"),
    "above 0 and finite": lambda value: 0 < value < float("inf"),
    "from 0 to 2^63 - 1": lambda value: 0 <= value < 2**63,
}


def share(text: str) -> float | str:
    """A flag's type: a number, or "auto"."""
    return text if text == "auto" else float(text)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with defaults in its help, groups by their titles, bounds, and a mistake as a UserError."""

    def __init__(self, description: str):
        super().__init__(usage="%(prog)s [flags]", description=description, allow_abbrev=False)
        self.groups, self.bounds = {}, {}
        say = "show the traceback of a user's mistake too"
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=say)  # for run_script

    def group(self, title: str) -> Callable:
        """A function that adds a flag to this group of --help: add_argument, with a bound of BOUNDS."""
        group = self.groups.get(title) or self.groups.setdefault(title, self.add_argument_group(title))

        def add(flag: str, bound: str | None = None, **settings):
            action = group.add_argument(flag, **settings)
            if action.default not in (None, []) and action.default is not False:
                action.help += " (default: %(default)s)"
            if bound:
                self.bounds[flag] = (action.dest, bound)

        return add

    def parse_args(self, argv=None, namespace=None) -> argparse.Namespace:
        """The command line; UserError for a value out of bounds. A byte that is no character is spelled."""
        given, encoding = sys.argv[1:] if argv is None else argv, sys.getfilesystemencoding()
        words = [os.fsencode(word).decode(encoding, "backslashreplace") for word in given]
        args = super().parse_args(words, namespace)
        for flag, (name, bound) in self.bounds.items():
            value = getattr(args, name)
            if value is not None and not BOUNDS[bound](value):
                raise UserError(f"{flag} is {value}; it must be {bound}")
        if getattr(args, "dtype", "") is None:  # what the device computes quickly
            args.dtype = machine.usual_dtype(machine.find_device(args.device))
        return args

    def given(self, argv: list[str] | None = None) -> list[str]:
        """The flags on the command line, without their values."""
        words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
        return [flag for action in self._actions for flag in action.option_strings if flag in words]

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def add_flags(parser: ArgumentParser):
    add = parser.group("machine")
    say = "of weights and activations (default: bfloat16; float32 on a CPU without bfloat16 instructions)"
    add("--dtype", choices=("bfloat16", "float32"), help=say)
    add("--device", default="auto", help="torch's name of it; auto: a GPU if there is one, else the CPU")


def one_line(text: str) -> str:
    """`text` on one line of a terminal, with what is not printable spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


# What a terminal or a page would obey -> what is shown: controls but line break and tab, Unicode's Bidi_Control
SHOWN = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {0x7F: 0x2421}
SHOWN |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
SHOWN |= {i: f"\\u{i:04x}" for i in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def short_names(paths: list[str]) -> list[str]:
    """Names of models in print: the last part of each path, or as many parts as tell it from the others."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    ends = (next(a[-n:] for n in itertools.count(1) if all(a[-n:] != b[-n:] for b in {*parts} - {a})) for a in parts)
    return [one_line("/".join(end)) for end in ends]


def cell(text: str) -> str:
    """A name for a cell of a Markdown table: what would be markup in it is escaped."""
    return re.sub(r"[\\`*\[\]<>|&~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line(text))
