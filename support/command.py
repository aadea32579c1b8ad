"""The command lines of scripts: flags with their bounds, and text that is safe to print."""

import argparse
import re
from collections.abc import Callable

from support import machine
from support.files import UserError


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with each flag's default, where it has one to show."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


# What a flag's value may be -> whether it is
BOUNDS = {
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in (0, 1], or auto": lambda value: value == "auto" or 0 < value <= 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "above 0": lambda value: 0 < value < float("inf"),
    "above 0 and finite": lambda value: 0 < value < float("inf"),
    "from 0 to 2^63 - 1": lambda value: 0 <= value < 2**63,
}


def share(text: str) -> float | str:
    """A flag's type: a number, or "auto"."""
    return text if text == "auto" else float(text)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with defaults in its help, groups by their titles, bounds, and one line for a mistake."""

    def __init__(self, description: str):
        super().__init__(
            usage="%(prog)s [flags]", description=description, formatter_class=ShowDefaults, allow_abbrev=False
        )
        self.groups, self.bounds = {}, {}
        say = "show the traceback of a mistake too, such as a flag or a file that cannot work"
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=say)  # for run_script

    def group(self, title: str) -> Callable:
        """What adds a flag to the group of help that is called so: `add_argument`, and a bound, one of BOUNDS."""
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)

        def add(flag: str, bound: str | None = None, **settings):
            action = self.groups[title].add_argument(flag, **settings)
            if bound:
                self.bounds[flag] = (action.dest, bound)

        return add

    def parse_args(self, argv=None, namespace=None) -> argparse.Namespace:
        """The command line; a value outside its flag's bound is a UserError that names the flag.

        A --dtype that is not given is the one that the --device computes quickly.
        """
        args = super().parse_args(argv, namespace)
        for flag, (name, bound) in self.bounds.items():
            value = getattr(args, name)
            if value is not None and not BOUNDS[bound](value):
                raise UserError(f"{flag} is {value}; it must be {bound}")
        if getattr(args, "dtype", "") is None:
            args.dtype = machine.usual_dtype(machine.find_device(args.device))
        return args

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def add_flags(parser: ArgumentParser, of: str = ""):
    """Where every script computes, and in what; of: what --dtype is of."""
    add = parser.group("machine")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help=f"of the {of}weights and activations; default: bfloat16, on a CPU without instructions for it float32",
    )
    add("--device", default="auto", help="as torch names it; auto: a GPU if there is one, else the CPU")


def one_line(text: str) -> str:
    """`text` on one line of a terminal, with what is not printable spelled out: parts may come from anyone's file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def cell(text: str) -> str:
    """A name for a cell of a Markdown table: what would be markup in it is escaped."""
    return re.sub(r"[\\`*\[\]<>|&~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line(text))
