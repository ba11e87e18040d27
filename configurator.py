"""
One typed, frozen configuration from a dataclass, config files and the command line:

    python train.py config/stories15M.py --batch_size=8 --compile=False

Arguments are read from left to right; later values win. A config file holds plain assignments with
arithmetic and earlier names. Names that start with an underscore are local to the file. An option
with a list, --stop=A --stop=B, collects the values of the command line; the first one replaces a
config file's list, and an empty one removes the earlier ones.

The dataclass is the only list of options. The comment after a field is its --help, or the comment
line above it; a line that ends with a comma or a semicolon continues. Another comment line above
starts a group of options.
"""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import io
import math
import os
import sys
import textwrap
import tokenize
import types
from collections.abc import Callable, Iterator
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro

from runtime.config_file import did_you_mean, read_config_file
from runtime.untrusted import describe_value

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

COMMAND_LINE = "command line"


class Assignment(NamedTuple):
    """One option set by the user."""

    key: str
    value: Any  # text from the command line, a Python value from a config file
    source: str  # "command line", or file:line

    @property
    def from_file(self) -> bool:
        return self.source != COMMAND_LINE

    def __str__(self) -> str:
        if self.from_file:
            return f"{self.source}: {self.key} = {describe_value(self.value)}"
        return f"--{self.key}={self.value}"


def configure(
    config_class: type[Config],
    argv: list[str] | None = None,
    positional: tuple[str, ...] = (),
    program: str = "",
) -> tuple[Config, dict[str, str]]:
    """Read the command line into a config_class; returns (config, overrides).

    All problems are printed to standard error together, and the program exits with status 2. The
    messages that config_class.validate() yields, if it exists, are problems too.

    Args:
        config_class: a dataclass with a default for every field.
        argv: the arguments. None: the command line.
        positional: fields set by the first bare arguments. Other bare arguments are config files.
        program: the program's name in messages. "": the script's name.

    overrides maps each option that was set to its source: "command line", or file:line."""
    argv = sys.argv[1:] if argv is None else argv
    program = program or os.path.basename(sys.argv[0])
    if "-h" in argv or "--help" in argv:
        print(help_text(config_class, positional, program), end="")
        raise SystemExit(0)
    field_types = get_type_hints(config_class)
    fields = {name.removesuffix("_"): name for name in field_types}  # from_: a Python keyword
    values: dict[str, Any] = {}
    overrides: dict[str, str] = {}
    problems: list[str] = []
    for item in read_arguments(argv, positional):
        if isinstance(item, str):
            problems.append(item)
            continue
        field = fields.get(item.key.replace("-", "_"))
        if field is None:
            problems.append(f"{item}: there is no such option{did_you_mean(item.key, fields)}")
            continue
        try:
            value = parse(field_types[field], item.value, item.from_file)
            is_repeated = is_list(field_types[field]) and overrides.get(field) == item.source
            values[field] = values[field] + value if is_repeated and value else value
            overrides[field] = item.source
        except ValueError as error:
            problems.append(f"{item}: must be {error}")
    config = config_class(**values)
    if hasattr(config, "validate"):
        problems += config.validate()
    if problems:
        exit_with_errors(*problems, program=program)
    return config, overrides


def restore_options(config: Config, saved: dict[str, Any], source: str) -> Config:
    """A copy of config with the options that a file saved. Names that are no option are ignored.
    Raises ValueError, with source as the file's name, for a value of the wrong type."""
    field_types = get_type_hints(type(config))
    values = {}
    for name, value in saved.items():
        if name not in field_types:
            continue
        try:
            values[name] = parse(field_types[name], value, from_file=True)
        except ValueError as error:
            raise ValueError(
                f"{source}: its option {name} is {describe_value(value)}, not {error}; "
                f"give --{name}"
            ) from None
    return dataclasses.replace(config, **values)


def exit_with_errors(*problems: str, program: str = "") -> NoReturn:
    """Print one line per problem to standard error and exit with status 2."""
    program = program or os.path.basename(sys.argv[0])
    print("\n".join(f"{program}: {problem}" for problem in problems), file=sys.stderr)
    raise SystemExit(2)


def run_main(main: Callable[[], object]) -> None:
    """Call main() and turn a user's mistake into one line on standard error.

    ValueError, OSError and out of memory exit with status 1, Ctrl-C with 130. Other errors pass.
    CRIA_TRACEBACK=1 in the environment shows the traceback. Under torchrun the line names the
    rank."""
    try:
        main()
    except (KeyboardInterrupt, ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        if os.environ.get("CRIA_TRACEBACK"):
            raise
        has_peers = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
        rank = f"rank {os.environ['RANK']}: " if has_peers else ""
        program = os.path.basename(sys.argv[0])
        print(f"{program}: {rank}{describe_error(error)}", file=sys.stderr)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or PyTorch on a CPU, could not allocate memory."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def describe_error(error: BaseException) -> str:
    """The one-line message of an error that run_main handles."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        if error.filename is None:
            return error.strerror
        return f"{error.filename or repr('')}: {error.strerror}"
    return "out of memory" if is_out_of_memory(error) else str(error)


def print_overrides(config: "DataclassInstance", overrides: dict[str, str]) -> None:
    """Print each option that was set, its value and its source."""
    for key, source in overrides.items():
        print(f"{key.removesuffix('_')} = {getattr(config, key)!r}  ({source})")


def help_text(config_class: type[Config], positional: tuple[str, ...], program: str) -> str:
    """The --help of a config_class: every option in its group, with type, help and default."""
    bare = "".join(f"{name.upper()} " for name in positional)
    parser = argparse.ArgumentParser(
        usage=f"{program} {bare}[CONFIG_FILE.py ...] [--OPTION=VALUE ...]",
        description=config_class.__doc__,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28),
    )
    comments: dict[str, FieldComment] = {}
    for base in reversed(config_class.__mro__):
        comments |= field_comments(base) if dataclasses.is_dataclass(base) else {}
    field_types = get_type_hints(config_class)
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(config_class):
        comment = comments[field.name]
        if comment.group:
            group = parser.add_argument_group(comment.group)
        defaults: dict[object, str] = {"": "''", (): "none"}
        default = defaults.get(field.default, field.default)
        group.add_argument(
            f"--{field.name.removesuffix('_')}",
            metavar=metavar(field_types[field.name]),
            help=f"{comment.help} (default: {default})".strip().replace("%", "%%"),
        )
    return parser.format_help()


class FieldComment(NamedTuple):
    """The comments of a field in the source of its dataclass."""

    group: str  # title of the group that begins with the field, or ""
    help: str


def field_comments(config_class: type) -> dict[str, FieldComment]:
    """The comments of each field that the class itself defines."""
    source = textwrap.dedent(inspect.getsource(config_class))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [
        (token.start[0], token.string.removeprefix("#").strip())
        for token in tokens
        if token.type == tokenize.COMMENT
    ]
    class_def = ast.parse(source).body[0]
    assert isinstance(class_def, ast.ClassDef)
    result: dict[str, FieldComment] = {}
    previous_end = class_def.lineno
    for statement in class_def.body:
        start, end = statement.lineno, statement.end_lineno or statement.lineno
        above = [text for line, text in comments if previous_end < line < start]
        trailing = [text for line, text in comments if start <= line <= end]
        previous_end = end
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if not trailing:
                above, trailing = split_comment(above)
            result[statement.target.id] = FieldComment(" ".join(above), " ".join(trailing))
    return result


def split_comment(lines: list[str]) -> tuple[list[str], list[str]]:
    """Split the comment above a field into the title of a group and the help of the field: the last
    line, and those before it that end with a comma or a semicolon."""
    start = max(0, len(lines) - 1)
    while start and lines[start - 1].endswith((",", ";")):
        start -= 1
    return lines[:start], lines[start:]


def read_arguments(argv: list[str], positional: tuple[str, ...]) -> Iterator[Assignment | str]:
    """Yield every assignment in argv, in order, and a message (str) for every problem."""
    arguments = list(argv)
    fields = list(positional)
    while arguments:
        argument = arguments.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and equals:
            yield Assignment(key, value, COMMAND_LINE)
        elif argument.startswith("--") and key and arguments and not arguments[0].startswith("--"):
            yield Assignment(key, arguments.pop(0), COMMAND_LINE)  # --key value
        elif argument.startswith("-"):
            missing = "" if equals else "=VALUE"
            yield f"{argument}: write options as --{argument.lstrip('-')}{missing}"
        elif fields:
            yield Assignment(fields.pop(0), argument, COMMAND_LINE)
        elif equals:
            yield f"{argument}: write options as --{argument}"
        else:
            for item in read_config_file(argument):
                yield item if isinstance(item, str) else Assignment(*item)


def is_list(field_type: Any) -> bool:
    """Whether an option may be given several times: tuple[str, ...]."""
    return get_origin(field_type) is tuple


def parse(field_type: Any, value: Any, from_file: bool) -> Any:
    """Convert value to field_type. Text from the command line is parsed by tyro. A value from a
    file must already have the type, except that an int is accepted for a float. Of a list, the
    command line has one item, or none if it is empty; a file has one item or a list. Raises
    ValueError with the values that are allowed."""
    if is_list(field_type):
        item_type = get_args(field_type)[0]
        items = value if from_file and isinstance(value, list | tuple) else [value]
        is_empty = not from_file and value == ""
        return () if is_empty else tuple(parse(item_type, item, from_file) for item in items)
    if not isinstance(value, str | int | float | None):
        raise ValueError(type_hint_text(field_type))
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # a number of thousands of digits
        raise ValueError(type_hint_text(field_type)) from None
    if field_type is bool and text in ("true", "false"):
        text = text.capitalize()
    parsed = parse_text(field_type, text)
    if (from_file and parsed != value) or (isinstance(parsed, float) and not math.isfinite(parsed)):
        raise ValueError(type_hint_text(field_type))
    return parsed


def parse_text(field_type: Any, text: str) -> Any:
    """Parse text with tyro. Raises ValueError with the values that are allowed."""
    one_field = dataclasses.make_dataclass("one_field", [("value", field_type)])
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed: Any = tyro.cli(
                one_field,
                args=[f"--value={text}"],
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
            )
    except SystemExit:
        raise ValueError(type_hint_text(field_type)) from None
    return parsed.value


def type_hint_text(field_type: Any) -> str:
    """The values that an option of this type accepts, in words."""
    if is_list(field_type):
        return type_hint_text(get_args(field_type)[0])
    if get_origin(field_type) is Literal:
        return "one of " + ", ".join(map(str, get_args(field_type)))
    if get_origin(field_type) in (types.UnionType, Union):
        return " or ".join(type_hint_text(choice) for choice in get_args(field_type))
    return {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "text",
        types.NoneType: "None",
    }[field_type]


def metavar(field_type: Any) -> str:
    """The values that an option of this type accepts, as --help shows them after its name."""
    if is_list(field_type):
        return metavar(get_args(field_type)[0])
    if get_origin(field_type) is Literal:
        return "{" + ",".join(map(str, get_args(field_type))) + "}"
    if get_origin(field_type) in (types.UnionType, Union):
        return "|".join(metavar(choice) for choice in get_args(field_type))
    return {
        int: "INT",
        float: "FLOAT",
        bool: "{True,False}",
        str: "STR",
        types.NoneType: "None",
    }[field_type]
