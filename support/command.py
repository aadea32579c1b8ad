"""Scripts: flags with their bounds, one-line errors, exit status."""

import argparse
import re
import signal
import sys
import traceback
from collections.abc import Callable

from torch import distributed

from support.files import UserError
from support.machine import reuse_memory
from support.ranks import first_rank
from support.runs import Stopped


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with each flag's default, where it has one to show."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


# What a flag's value may be -> whether it is
BOUNDS = {
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "above 0": lambda value: 0 < value < float("inf"),
    "above 0 and finite": lambda value: 0 < value < float("inf"),
    "from 0 to 2^63 - 1": lambda value: 0 <= value < 2**63,
}


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
        """The command line; a value outside its flag's bound is a UserError that names the flag."""
        args = super().parse_args(argv, namespace)
        for flag, (name, bound) in self.bounds.items():
            value = getattr(args, name)
            if value is not None and not BOUNDS[bound](value):
                raise UserError(f"{flag} is {value}; it must be {bound}")
        return args

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def add_machine_flags(parser: ArgumentParser, of: str = ""):
    """Where every script computes, and in what; of: what --dtype is of."""
    add = parser.group("machine")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help=f"of the {of}weights and activations")
    add("--device", default="auto", help="as torch names it; auto: a GPU if there is one, else the CPU")


def one_line(text: str) -> str:
    """`text` on one line of a terminal, with what is not printable spelled out: parts may come from anyone's file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def cell(text: str) -> str:
    """A name for a cell of a Markdown table: what would be markup in it is escaped."""
    return re.sub(r"[\\`*\[\]<>|&~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line(text))


def run_script(main: Callable[[], None]):
    """Run a script's main; a mistake of the user's ends it with status 2 and one line that says which.

    With --debug its traceback comes first. Any other error is one of ours, and always has it.
    """
    reuse_memory()
    status = 0
    try:
        main()
    except UserError as mistake:
        if "--debug" in sys.argv:
            mistake.__suppress_context__ = False  # what it was made from as well
            traceback.print_exc()
        print(f"error: {one_line(str(mistake))}", file=sys.stderr)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt) as reason:
        number, message = reason.args or (signal.SIGINT, "stopped")
        if first_rank():
            print(message, file=sys.stderr)
        status = 128 + number
    if distributed.is_initialized():  # not after an error: the others may never come to the same place
        distributed.destroy_process_group()
    if status:
        sys.exit(status)
