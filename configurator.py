"""
One typed, frozen configuration from a dataclass, config files and the command line:

    python train.py config/stories15M.py --batch_size=8 --compile=False

Everything is read left to right and later wins. A config file holds plain assignments, with
arithmetic and earlier names; a name that starts with an underscore is the file's own. The
dataclass is the only list of options: its fields' trailing comments are their --help.
"""

import ast
import contextlib
import dataclasses
import difflib
import io
import math
import os
import sys
import types
from dataclasses import make_dataclass
from typing import Literal, Union, get_args, get_origin, get_type_hints

import tyro

COMMAND_LINE = "command line"
TYRO_OPTIONS = dict(config=(tyro.conf.FlagConversionOff,), use_underscores=True)

# What an expression in a config file may be made of: no calls, no attributes, no imports.
ALLOWED_NODES = (
    *(
        ast.Expression,
        ast.Constant,
        ast.Name,
        ast.Load,
        ast.BinOp,
        ast.UnaryOp,
        ast.BoolOp,
        ast.Compare,
        ast.IfExp,
    ),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.JoinedStr, ast.FormattedValue),
)


def configure(
    config_class, argv: list[str] | None = None, positional: tuple[str, ...] = (), program: str = ""
):
    """Read argv (default: the command line) into a config_class; returns (config, given).

    given maps each option that was set to the place that set it: "command line" or file:line. The
    first bare arguments fill the fields named in positional; the others are config files. The
    sentences that config_class.validate() yields, if it has one, are refused like bad values.
    All problems are printed at once to standard error, and the program ends with status 2."""
    argv = sys.argv[1:] if argv is None else argv
    program = program or os.path.basename(sys.argv[0])
    if "-h" in argv or "--help" in argv:
        bare = "".join(f" {name.upper()}" for name in positional)
        tyro.cli(
            config_class,
            args=["--help"],
            prog=f"{program}{bare} [CONFIG_FILE.py ...]",
            **TYRO_OPTIONS,
        )
    field_types = get_type_hints(config_class)
    fields = {
        name.removesuffix("_"): name for name in field_types
    }  # from_: what Python would not have as a name
    values, overrides, problems = {}, {}, []
    for key, value, source in read_arguments(argv, positional, problems):
        from_file = source != COMMAND_LINE
        assignment = f"{source}: {key} = {value!r}" if from_file else f"--{key}={value}"
        field = fields.get(key.replace("-", "_"))
        if field is None:
            problems.append(f"{assignment}: there is no such option{did_you_mean(key, fields)}")
            continue
        try:
            values[field], overrides[field] = parse(field_types[field], value, from_file), source
        except ValueError as error:
            problems.append(f"{assignment}: must be {error}")
    config = config_class(**values)
    if hasattr(config, "validate"):
        problems += config.validate()
    if problems:
        exit_with_errors(*problems, program=program)
    return config, overrides


def exit_with_errors(*problems: str, program: str = ""):
    """End the program with status 2 and one line a problem on standard error."""
    program = program or os.path.basename(sys.argv[0])
    print("\n".join(f"{program}: {problem}" for problem in problems), file=sys.stderr)
    raise SystemExit(2)


def run_main(main):
    """Call main(). A user's mistake (ValueError), the system's refusal (OSError) or a lack of memory
    ends with one sentence and status 1, Ctrl-C with 130; CRIA_TRACEBACK=1 in the environment shows where.
    Of several processes each says which it is."""
    try:
        main()
    except (KeyboardInterrupt, ValueError, OSError, MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not is_memory:
            raise
        if os.environ.get("CRIA_TRACEBACK"):
            raise
        sentence, status = "out of memory" if is_memory else str(error), 1
        if isinstance(error, KeyboardInterrupt):
            sentence, status = "interrupted", 130
        elif isinstance(error, OSError) and error.strerror:
            sentence = (
                error.strerror
                if error.filename is None
                else f"{error.filename or repr('')}: {error.strerror}"
            )
        is_one_of_many = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
        rank = f"rank {os.environ['RANK']}: " if is_one_of_many else ""
        print(f"{os.path.basename(sys.argv[0])}: {rank}{sentence}", file=sys.stderr)
        raise SystemExit(status) from None


def print_overrides(config, overrides: dict[str, str]):
    """Say which options were set, and where."""
    for key, source in overrides.items():
        print(f"{key.removesuffix('_')} = {getattr(config, key)!r}  ({source})")


def read_arguments(argv, positional, problems):
    """Yield (key, value, source) for every assignment in argv, in order: text from the command
    line, Python values from files. What cannot be read is told in problems."""
    waiting, argv = list(positional), list(argv)
    while argv:
        argument = argv.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and equals:
            yield key, value, COMMAND_LINE
        elif argument.startswith("--") and key and argv and not argv[0].startswith("--"):
            yield key, argv.pop(0), COMMAND_LINE  # --key value
        elif argument.startswith("-"):
            problems.append(
                f"{argument}: write options as --{argument.lstrip('-')}{'' if equals else '=VALUE'}"
            )
        elif waiting:
            yield waiting.pop(0), argument, COMMAND_LINE
        elif equals:
            problems.append(f"{argument}: write options as --{argument}")
        else:
            yield from read_config_file(argument, problems)


def read_config_file(path, problems):
    """Yield (key, value, file:line) for every plain assignment in the file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            statements = ast.parse(file.read()).body
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        problems.append(f"{path}: cannot read this config file: {reason}")
        return
    except SyntaxError as error:
        problems.append(f"{path}:{error.lineno}: not a line of Python: {error.msg}")
        return
    names = {}
    for statement in statements:
        where = f"{path}:{statement.lineno}"
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        target = (
            statement.targets[0]
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1
            else None
        )
        if not isinstance(target, ast.Name):
            problems.append(f"{where}: a config file holds plain assignments only: name = value")
            continue
        try:
            names[target.id] = evaluate(statement.value, names)
        except (ValueError, ArithmeticError, TypeError) as error:
            problems.append(f"{where}: cannot work out {target.id}: {error}")
            continue
        if not target.id.startswith("_"):
            yield target.id, names[target.id], where


def evaluate(expression: ast.expr, names: dict):
    """The value of an expression of constants, operators and earlier names."""
    for node in ast.walk(expression):
        if not isinstance(node, ALLOWED_NODES):
            raise ValueError(
                f"{ast.unparse(node)!r} is more than arithmetic with constants and earlier names"
            )
        if isinstance(node, ast.Name) and node.id not in names:
            raise ValueError(f"{node.id} is not set above{did_you_mean(node.id, names)}")
    return eval(
        compile(ast.Expression(expression), "<config>", "eval"), {"__builtins__": {}}, names
    )


def parse(field_type, value, from_file: bool):
    """value as field_type: text from the command line is read as tyro reads it, a value from a
    file must already fit (an int does for a float). Raises ValueError saying what is allowed."""
    text = value if isinstance(value, str) else repr(value)
    if field_type is bool and text in ("true", "false"):
        text = text.capitalize()
    one_field = make_dataclass("one_field", [("value", field_type)])
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed = tyro.cli(one_field, args=[f"--value={text}"], **TYRO_OPTIONS).value
    except SystemExit:
        raise ValueError(type_hint_text(field_type)) from None
    if (from_file and parsed != value) or (isinstance(parsed, float) and not math.isfinite(parsed)):
        raise ValueError(type_hint_text(field_type))
    return parsed


def restore_options(config, saved: dict, source: str):
    """config with the values of saved, which must fit their fields' types as a config file's must.

    Raises ValueError, naming source, for a value that does not fit."""
    field_types = get_type_hints(type(config))
    values = {}
    for name, value in saved.items():
        try:
            values[name] = parse(field_types[name], value, from_file=True)
        except ValueError as error:
            raise ValueError(
                f"{source}: its option {name} is {value!r}, not {error}; give --{name}"
            ) from None
    return dataclasses.replace(config, **values)


def type_hint_text(field_type) -> str:
    """What an option of this type takes, in words."""
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


def did_you_mean(name: str, names) -> str:
    """', did you mean X?' for the known name most like this one, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {close[0]}?" if close else ""
