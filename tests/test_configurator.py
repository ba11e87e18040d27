import dataclasses
import difflib
import re
import time
import tracemalloc
from dataclasses import dataclass
from typing import Literal

import pytest

from bench import BENCHMARKS
from configurator import configure, exit_with_errors, print_overrides, restore_options, run_main
from export import ExportConfig
from sample import SampleConfig
from tests.processes import ROOT
from tinystories import STAGES, Pretokenize
from train import TrainConfig


@dataclass(frozen=True)
class Config:
    """A configuration with an option of every type."""

    out_dir: str = "out"  # where it writes
    # data
    batch_size: int = 128  # sequences in a batch
    # peak learning rate,
    # 100% of it
    learning_rate: float = 5e-4
    compile: bool = True  # whether to compile
    # the model
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the products
    n_kv_heads: int | None = None  # None: as many as heads
    # system
    # scales;
    # None: keeps,
    # the width
    multiplier: float | None = 1.5


@dataclass(frozen=True)
class Limited:
    least: int = 0  # at most most
    most: int = 10  # at least least

    def validate(self):
        if self.least > self.most:
            yield f"--least={self.least}: must not be above --most={self.most}"


def read(*argv: str, config_class=Config, **options):
    return configure(config_class, list(argv), program="program.py", **options)


def value_of(key: str, *argv: str):
    return getattr(read(*argv)[0], key)


@pytest.fixture
def config_file(tmp_path):
    """config_file(text) writes a config file; returns its path."""

    def write(text: str, name: str = "config.py") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def refused(capsys):
    """refused(*argv) is the lines on standard error with which argv is refused with status 2."""

    def read_and_fail(*argv: str, **options) -> list[str]:
        with pytest.raises(SystemExit) as exit:
            read(*argv, **options)
        assert exit.value.code == 2
        out, err = capsys.readouterr()
        assert not out
        lines = err.splitlines()
        assert all(line.startswith("program.py: ") for line in lines)
        return [line.removeprefix("program.py: ") for line in lines]

    return read_and_fail


def test_nothing_given_is_the_defaults():
    assert read() == (Config(), {})


@pytest.mark.parametrize(
    "argument, key, value",
    [
        ("--batch_size=8", "batch_size", 8),
        ("--batch_size=-8", "batch_size", -8),
        ("--learning_rate=1e-3", "learning_rate", 1e-3),
        ("--learning_rate=-1e-3", "learning_rate", -1e-3),
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--compile=False", "compile", False),
        ("--compile=false", "compile", False),
        ("--compile=true", "compile", True),
        ("--dtype=bfloat16", "dtype", "bfloat16"),
        ("--n_kv_heads=4", "n_kv_heads", 4),
        ("--n_kv_heads=None", "n_kv_heads", None),
        ("--multiplier=2", "multiplier", 2.0),
        ("--multiplier=None", "multiplier", None),
        ("--out_dir=", "out_dir", ""),
        ("--out_dir=a=b=c", "out_dir", "a=b=c"),
        ("--out_dir=--batch_size=8", "out_dir", "--batch_size=8"),
        ("--out_dir=-1", "out_dir", "-1"),
        ("--out_dir=two words\nand a line", "out_dir", "two words\nand a line"),
        ("--out_dir=naïve–Bär", "out_dir", "naïve–Bär"),
        ("--out_dir=5", "out_dir", "5"),
        ("--out_dir=None", "out_dir", "None"),
    ],
)
def test_a_flag_is_read_as_the_type_of_its_field(argument, key, value):
    value_read = value_of(key, argument)
    assert value_read == value and type(value_read) is type(value)


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("batch_size = 8", "batch_size", 8),
        ("batch_size = -8", "batch_size", -8),
        ("batch_size = 2**3 * (5 - 1) // 3 % 7", "batch_size", 3),
        ("batch_size = 200_000", "batch_size", 200000),
        ("learning_rate = 1", "learning_rate", 1.0),
        ("learning_rate = -1e-3", "learning_rate", -1e-3),
        ("_width = 8\n_twice = 2 * _width\nbatch_size = _twice + 1", "batch_size", 17),
        ("batch_size = 4\nlearning_rate = batch_size / 8", "learning_rate", 0.5),
        ("batch_size = 4\nbatch_size = batch_size * 2", "batch_size", 8),
        ("compile = False", "compile", False),
        ("n_kv_heads = None", "n_kv_heads", None),
        ("multiplier = 3", "multiplier", 3.0),
        ("out_dir = 'a=b'", "out_dir", "a=b"),
        ("out_dir = '--x'", "out_dir", "--x"),
        ("out_dir = ''", "out_dir", ""),
        ("_n = 2\nout_dir = f'out/{_n}' + '-run'", "out_dir", "out/2-run"),
        ("learning_rate = 1e-3\nout_dir = f'{learning_rate}{{}}'", "out_dir", "0.001{}"),
        ("'''A docstring.'''\n# a comment\nout_dir = 'Bär'  # and another", "out_dir", "Bär"),
    ],
)
def test_a_file_holds_arithmetic_with_earlier_names(config_file, text, key, value):
    value_read = value_of(key, config_file(text))
    assert value_read == value and type(value_read) is type(value)


def test_later_arguments_win(config_file):
    eight, sixteen = (
        config_file("batch_size = 8", "eight.py"),
        config_file("batch_size = 16", "sixteen.py"),
    )
    assert value_of("batch_size", eight, sixteen) == 16
    assert value_of("batch_size", sixteen, eight) == 8
    assert value_of("batch_size", "--batch_size=1", eight) == 8
    assert value_of("batch_size", eight, "--batch_size=1", "--batch_size=2") == 2


def test_names_do_not_pass_from_one_file_to_another(config_file, refused):
    first, second = config_file("_n = 8", "first.py"), config_file("batch_size = _n", "second.py")
    assert refused(first, second) == [
        f"{second}:1: cannot work out batch_size: _n is not set above"
    ]


def test_overrides_name_the_source_of_every_option(config_file, capsys):
    path = config_file("_n = 8\n\nbatch_size = _n\ncompile = False")
    config, overrides = read(path, "--compile=True", "--out_dir=x")
    assert overrides == {
        "batch_size": f"{path}:3",
        "compile": "command line",
        "out_dir": "command line",
    }
    print_overrides(config, overrides)
    assert capsys.readouterr().out.splitlines() == [
        f"batch_size = 8  ({path}:3)",
        "compile = True  (command line)",
        "out_dir = 'x'  (command line)",
    ]


def test_a_value_equal_to_the_default_counts_as_given():
    assert read("--batch_size=128")[1] == {"batch_size": "command line"}


def test_bare_arguments_fill_the_positional_fields_first(config_file):
    path = config_file("batch_size = 8")
    config, overrides = read("some/model.bin", path, "--compile=False", positional=("out_dir",))
    assert (config.out_dir, config.batch_size, config.compile) == ("some/model.bin", 8, False)
    assert overrides["out_dir"] == "command line"


def test_a_path_with_an_equals_sign_fills_a_positional_field():
    assert read("runs/lr=1/ckpt.pt", positional=("out_dir",))[0].out_dir == "runs/lr=1/ckpt.pt"


def test_an_unknown_key_is_refused_with_the_nearest_name(config_file, refused):
    path = config_file("\nlerning_rate = 0.1")
    assert refused(path, "--bach_size=8", "--batch.size=8", "--zzz=1") == [
        f"{path}:2: lerning_rate = 0.1: there is no such option, did you mean learning_rate?",
        "--bach_size=8: there is no such option, did you mean batch_size?",
        "--batch.size=8: there is no such option, did you mean batch_size?",
        "--zzz=1: there is no such option",
    ]


WHOLE, NUMBER, BOOL, NULLABLE = (
    "a whole number",
    "a number",
    "True or False",
    "a whole number or None",
)
DTYPES = "one of float32, bfloat16"


@pytest.mark.parametrize(
    "argument, allowed",
    [
        *(
            (f"--batch_size={value}", WHOLE)
            for value in ("x", "1.5", "8.0", "1e3", "", "None", "True", "8 9")
        ),
        *(
            (f"--learning_rate={value}", NUMBER)
            for value in ("x", "", "None", "nan", "inf", "-inf", "1e999", "1,5")
        ),
        *(
            (f"--compile={value}", BOOL)
            for value in ("1", "0", "yes", "no", "", "TRUE", "None", "Falsch")
        ),
        *((f"--dtype={value}", DTYPES) for value in ("float64", "", "Float32", "float")),
        *((f"--n_kv_heads={value}", NULLABLE) for value in ("x", "", "1.5", "none")),
        ("--multiplier=nan", "a number or None"),
    ],
)
def test_a_flag_of_the_wrong_type_is_refused(refused, argument, allowed):
    assert refused(argument) == [f"{argument}: must be {allowed}"]


@pytest.mark.parametrize(
    "assignment, allowed",
    [
        *((f"batch_size = {value}", WHOLE) for value in ("'8'", "8.0", "True", "None", "'x'")),
        *((f"learning_rate = {value}", NUMBER) for value in ("'0.1'", "True", "None", "inf", "1j")),
        *((f"compile = {value}", BOOL) for value in ("1", "0", "'True'", "'true'", "None")),
        *((f"out_dir = {value}", "text") for value in ("5", "None", "True", "b'out'")),
        *((f"dtype = {value}", DTYPES) for value in ("'float64'", "32")),
        *((f"n_kv_heads = {value}", NULLABLE) for value in ("'None'", "'4'", "1.5", "False")),
    ],
)
def test_a_wrong_value_in_a_file_is_refused(config_file, refused, assignment, allowed):
    path = config_file("\n\n" + assignment.replace("inf", "1e999"))
    assert refused(path) == [f"{path}:3: {assignment}: must be {allowed}"]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("import os", "a config file holds plain assignments only: name = value"),
        ("from os import path", "a config file holds plain assignments only: name = value"),
        ("print('x')", "a config file holds plain assignments only: name = value"),
        ("if True: batch_size = 8", "a config file holds plain assignments only: name = value"),
        ("batch_size += 8", "a config file holds plain assignments only: name = value"),
        ("batch_size: int = 8", "a config file holds plain assignments only: name = value"),
        ("batch_size, dtype = 8", "a config file holds plain assignments only: name = value"),
        ("batch_size = compile = 1", "a config file holds plain assignments only: name = value"),
        ("batch_size = int('8')", "cannot work out batch_size: \"int('8')\" is more than"),
        ("batch_size = __import__('os').getpid()", "cannot work out batch_size: "),
        ("out_dir = ''.__class__", "cannot work out out_dir: \"''.__class__\" is more than"),
        ("batch_size = [8][0]", "cannot work out batch_size: '[8][0]' is more than"),
        ("batch_size = (lambda: 8)", "cannot work out batch_size: "),
        ("batch_size = (other := 8)", "cannot work out batch_size: '(other := 8)' is more than"),
        ("batch_size = 8 if True else 9", "cannot work out batch_size: '8 if True else 9' is more"),
        ("compile = 2 < 3", "cannot work out compile: '2 < 3' is more than"),
        ("compile = 2 in [2]", "cannot work out compile: '2 in [2]' is more than"),
        ("compile = True and False", "cannot work out compile: 'True and False' is more than"),
        ("compile = not True", "cannot work out compile: 'not True' is more than"),
        ("batch_size = ~8", "cannot work out batch_size: '~8' is more than"),
        ("batch_size = 1 << 3", "cannot work out batch_size: '1 << 3' is more than"),
        ("batch_size = 8 | 1", "cannot work out batch_size: '8 | 1' is more than"),
        ("out_dir = f'{open(1)}'", "cannot work out out_dir: an f-string holds earlier names only"),
        ("_n = 2\nout_dir = f'{_n:02d}'", "cannot work out out_dir: an f-string holds earlier"),
        ("_n = 2\nout_dir = f'{_n!r}'", "cannot work out out_dir: an f-string holds earlier"),
        ("_n = [2]\nout_dir = f'{_n}'", "cannot work out out_dir: an f-string holds numbers and"),
        ("batch_size = 1 // 0", "cannot work out batch_size: integer "),
        ("batch_size = 1 + 'x'", "cannot work out batch_size: unsupported operand"),
        (
            "batch_size = learning_rate",
            "cannot work out batch_size: learning_rate is not set above",
        ),
        (
            "_wide = 1\nbatch_size = _wied",
            "cannot work out batch_size: _wied is not set above, did you mean _wide?",
        ),
        ("batch_size = = 8", "not a line of Python: "),
    ],
)
def test_a_line_that_is_no_plain_assignment_is_refused(config_file, refused, line, reason):
    path = config_file(line)
    (problem,) = refused(path)
    assert problem.startswith(f"{path}:{1 + line.count(chr(10))}: {reason}")


def test_a_file_cannot_run_code(config_file, refused, tmp_path):
    left = tmp_path / "left"
    refused(config_file(f"out_dir = open({str(left)!r}, 'w').name"))
    assert not left.exists()


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "No such file or directory"),
        (b"out_dir = '\xff'", "'utf-8' codec can't decode"),
        (b"out_dir = 'a\0b'", "source code string cannot contain null bytes"),
    ],
)
def test_an_unreadable_config_file_is_reported_like_other_problems(
    tmp_path, refused, content, reason
):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_bytes(content)
    problem, other = refused(str(path), "--batch_size=x")
    assert problem.startswith(str(path)) and reason in problem
    assert other.startswith("--batch_size=x")


@pytest.mark.parametrize(
    "argument", ["--batch_size", "-batch_size=8", "batch_size=8", "-b", "--compile"]
)
def test_an_option_without_dashes_or_value_is_corrected(refused, argument):
    (problem,) = refused(argument)
    assert problem.startswith(
        f"{argument}: write options as --{argument.strip('-').partition('=')[0]}="
    )


def test_all_problems_are_reported_together(config_file, refused):
    path = config_file("import os\nbatch_size = 'x'\nbatchsize = 1\nout_dir = 7\n")
    missing = path + ".missing"
    problems = refused(path, missing, "--dtype=int8", "--compile", "--learning_rate=nan")
    starts = [f"{path}:{line}: " for line in range(1, 5)] + [
        f"{missing}: ",
        "--dtype=int8: ",
        "--compile: ",
    ]
    starts += ["--learning_rate=nan: "]
    assert len(problems) == len(starts)
    assert all(
        problem.startswith(start)
        for problem, start in zip(sorted(problems), sorted(starts), strict=True)
    )


def test_problems_found_by_validate_are_reported_with_the_rest(refused):
    assert read("--least=3", config_class=Limited)[0].least == 3
    assert refused("--least=12", "--lest=1", config_class=Limited) == [
        "--lest=1: there is no such option, did you mean least?",
        "--least=12: must not be above --most=10",
    ]


def test_an_overridden_bad_value_is_still_refused(refused):
    assert len(refused("--batch_size=x", "--batch_size=8")) == 1


SCRIPTS = [
    TrainConfig,
    SampleConfig,
    ExportConfig,
    *(config_class for config_class, _ in STAGES.values()),
    *(config_class for config_class, _ in BENCHMARKS.values()),
]


@pytest.mark.parametrize(
    "config_class", [Config, *SCRIPTS], ids=lambda config_class: config_class.__name__
)
def test_every_config_is_frozen(config_class):
    for field in dataclasses.fields(config_class):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config_class(), field.name, field.default)


def parse_help(config_class, capsys, *argv: str) -> tuple[str, dict, dict]:
    """The usage line; for each option its (type, help, default); for each group its options."""
    with pytest.raises(SystemExit) as exit:
        read(*argv, config_class=config_class)
    assert exit.value.code == 0
    out = capsys.readouterr().out
    options, groups = {}, {}
    for title, text in re.findall(r"^(\S.*):\n((?:  .*\n)+)", out, re.M):
        blocks = re.split(r"^  (?=--)", text, flags=re.M)[1:]
        matches = (
            re.fullmatch(r"--(\w+) (\S+) (.+) \(default: (.*)\)", " ".join(block.split()))
            for block in blocks
        )
        entries = [match.groups() for match in matches]
        options |= {name: tuple(rest) for name, *rest in entries}
        groups[title] = [name for name, *_ in entries]
    return out.splitlines()[0], options, groups


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_option_with_comment_type_and_default(capsys, flag):
    usage, options, _ = parse_help(Config, capsys, "--batch_size=x", flag)
    assert usage == "usage: program.py [CONFIG_FILE.py ...] [--OPTION=VALUE ...]"
    assert options == {
        "out_dir": ("STR", "where it writes", "out"),
        "batch_size": ("INT", "sequences in a batch", "128"),
        "learning_rate": ("FLOAT", "peak learning rate, 100% of it", "0.0005"),
        "compile": ("{True,False}", "whether to compile", "True"),
        "dtype": ("{float32,bfloat16}", "of the products", "float32"),
        "n_kv_heads": ("INT|None", "None: as many as heads", "None"),
        "multiplier": ("FLOAT|None", "scales; None: keeps, the width", "1.5"),
    }


def test_help_shows_the_options_in_the_groups_of_the_comments(capsys):
    _, _, groups = parse_help(Config, capsys, "--help")
    assert groups == {
        "options": ["out_dir"],
        "data": ["batch_size", "learning_rate", "compile"],
        "the model": ["dtype", "n_kv_heads"],
        "system": ["multiplier"],
    }


def test_help_shows_inherited_options_and_positional_arguments(capsys):
    @dataclass(frozen=True)
    class Derived(Config):
        seed: int = 0  # of the dropout

    with pytest.raises(SystemExit):
        read("--help", config_class=Derived, positional=("out_dir",))
    out = capsys.readouterr().out
    assert out.startswith("usage: program.py OUT_DIR [CONFIG_FILE.py ...]")
    assert "where it writes" in out and "of the dropout" in out


@pytest.mark.parametrize("config_class", SCRIPTS, ids=lambda config_class: config_class.__name__)
def test_help_explains_every_option_of_every_script(capsys, config_class):
    """A help comment on a wrong line would be shown as the title of a group."""
    _, options, groups = parse_help(config_class, capsys, "--help")
    fields = {field.name.removesuffix("_") for field in dataclasses.fields(config_class)}
    assert set(options) == fields
    assert all(len(title.split()) <= 5 for title in groups)


def test_help_of_train_has_the_familiar_groups(capsys):
    _, _, groups = parse_help(TrainConfig, capsys, "--help")
    assert groups["adamw optimizer"][0] == "optimizer"
    assert {"I/O", "data", "model", "learning rate decay settings", "system"} <= set(groups)


@pytest.mark.parametrize(
    "saved, expected",
    [
        ({}, Config()),
        (dict(batch_size=8, compile=False), Config(batch_size=8, compile=False)),
        (dict(learning_rate=1, n_kv_heads=None), Config(learning_rate=1.0)),
        (dict(no_longer_an_option=1), Config()),
    ],
    ids=str,
)
def test_saved_options_replace_those_of_the_config(saved, expected):
    assert restore_options(Config(), saved, "ckpt.pt") == expected


@pytest.mark.parametrize(
    "saved, problem",
    [
        (dict(batch_size="8"), "batch_size is '8', not a whole number; give --batch_size"),
        (dict(batch_size=True), "batch_size is True, not a whole number; give --batch_size"),
        (dict(dtype="int4"), "dtype is 'int4', not one of float32, bfloat16; give --dtype"),
        (dict(compile=1), "compile is 1, not True or False; give --compile"),
    ],
    ids=str,
)
def test_a_saved_option_of_the_wrong_type_is_refused(saved, problem):
    with pytest.raises(ValueError) as error:
        restore_options(Config(), dict(out_dir="x") | saved, "ckpt.pt")
    assert str(error.value) == f"ckpt.pt: its option {problem}"


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem
)
def test_every_preset_is_accepted_by_its_script(preset):
    config_class = Pretokenize if preset.stem.endswith("_data") else TrainConfig
    _, overrides = read(str(preset), config_class=config_class)
    assert overrides and all(source.startswith(f"{preset}:") for source in overrides.values())


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_mistake_ends_the_script_with_status_2(run_script, config_file, script):
    path = config_file("bacth_size = 8")
    result = run_script(script, path, "--device")
    assert result.returncode == 2 and result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith(f"{script}: {path}:1: bacth_size = 8: there is no such option")
    assert second == f"{script}: --device: write options as --device=VALUE"


def test_exit_with_errors_prints_one_line_per_problem(capsys):
    with pytest.raises(SystemExit) as exit:
        exit_with_errors("one", "two", program="x.py")
    assert exit.value.code == 2
    assert capsys.readouterr().err == "x.py: one\nx.py: two\n"


@pytest.mark.parametrize(
    "error, sentence, status",
    [
        (ValueError("--x=1: too small"), "--x=1: too small", 1),
        (
            FileNotFoundError(2, "No such file or directory", "a.txt"),
            "a.txt: No such file or directory",
            1,
        ),
        (OSError(28, "No space left on device"), "No space left on device", 1),
        (ConnectionError("gave up"), "gave up", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_a_mistake_of_the_user_ends_with_one_sentence(monkeypatch, capsys, error, sentence, status):
    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["/some/where/x.py"])
    with pytest.raises(SystemExit) as exit:
        run_main(main)
    assert exit.value.code == status
    assert capsys.readouterr().err == f"x.py: {sentence}\n"
    monkeypatch.setenv("CRIA_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_main(main)


def test_an_error_of_the_program_itself_is_not_hidden():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_main(main)


def test_hyphens_and_a_space_before_the_value_are_accepted():
    config, overrides = read("--batch-size", "8", "--learning_rate", "-1", "--compile=False")
    assert (config.batch_size, config.learning_rate, config.compile) == (8, -1.0, False)
    assert set(overrides) == {"batch_size", "learning_rate", "compile"}
    assert read("--batch_size=8")[0] == read("--batch-size", "8")[0]


@dataclass(frozen=True)
class Listed:
    """A configuration with lists."""

    stop: tuple[str, ...] = ()  # stop string; may repeat
    stop_ids: tuple[int, ...] = ()  # token


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--stop=<|im_end|>", "--stop=a|b"], ("<|im_end|>", "a|b")),
        (["--stop", "A", "--stop=A"], ("A", "A")),
        (["FILE", "--stop=C"], ("C",)),
        (["--stop=C", "FILE"], ("A", "B")),
        (["FILE"], ("A", "B")),
        (["FILE", "--stop="], ()),
        (["--stop=A", "--stop=", "--stop=B"], ("B",)),
    ],
    ids=str,
)
def test_an_option_with_a_list_is_repeated(config_file, arguments, expected):
    """Strings were separated by | and could not contain it."""
    path = config_file("_a = 'A'\nstop = ['Z']\nstop = [_a, 'B']")
    arguments = [path if argument == "FILE" else argument for argument in arguments]
    assert read(*arguments, config_class=Listed)[0].stop == expected


def test_the_items_of_a_list_have_its_type(config_file, refused):
    assert read("--stop_ids=2", "--stop_ids=0", config_class=Listed)[0].stop_ids == (2, 0)
    path = config_file("stop_ids = 7\nstop = 'A|B'")
    assert read(path, config_class=Listed)[0] == Listed(("A|B",), (7,))
    path = config_file("stop_ids = [7, 'x']")
    assert refused(path, "--stop_ids=1,2", config_class=Listed) == [
        f"{path}:1: stop_ids = a tuple of 2 items: must be a whole number",
        "--stop_ids=1,2: must be a whole number",
    ]


LARGE = {
    "a power": "9**9**9",
    "a power of powers": "(2**4000)**4000",
    "a shift": "1 << 10**10",
    "a product of texts": "'x' * 10**9",
    "products": "(10**1000) * (10**1000)",
    "a text format": "'%1000000000d' % 1",
    "a sum of texts": "+".join(["'" + "x" * 60_000 + "'"] * 2),
    "a width": "f'{1:>1000000000}'",
    "a nested width": "f'{1:>{10**9}}'",
    "bytes": "b'x' * 10**9",
    "a list": "[1] * 10**9",
    "a hexadecimal number": "0x" + "f" * 5000,
    "a decimal number": "9" * 5000,
    "a sum": "+".join("1" * 20_000),
    "signs": "-" * 100_000 + "1",
    "parentheses": "(" * 20_000 + "1" + ")" * 20_000,
    "conditions": "0 if 0 else " * 2_000 + "1",
    "calls": "f(" * 90 + ")" * 90,
}


@pytest.mark.parametrize("expression", LARGE)
def test_a_large_expression_is_refused_at_once(config_file, refused, expression):
    """9**9**9 hung, and a long sum was a traceback."""
    path = config_file(f"batch_size = {LARGE[expression]}")
    start = time.monotonic()
    (problem,) = refused(path)
    assert problem.startswith(path) and len(problem) < 400 and "\n" not in problem
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("form", ["{_text}" * 1000, "{_list}"])
def test_a_large_text_is_not_joined_before_its_check(config_file, refused, form):
    """A file of 106 KB took 200 MB: the text of an f-string was checked after it was joined."""
    items = ", ".join(["_text"] * 1000)
    path = config_file(f"_text = 'x' * 100_000\n_list = [{items}]\nout_dir = f'{form}'")
    tracemalloc.start()
    problems = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(problems) == 1 and problems[0].startswith(f"{path}:3: cannot work out out_dir: ")
    assert peak < 20 << 20


@pytest.mark.parametrize("line", ["batch_size = {}", "{} = 1", "_{} = 1\nbatch_size = {}"])
def test_a_long_name_is_not_compared(config_file, refused, monkeypatch, line):
    """Two names of 20,000 characters took a second; the time grew with the square of the length."""
    compared: list[str] = []

    def compare(name: str, names: list[str], n: int) -> list[str]:
        compared.extend([name, *names])
        return []

    monkeypatch.setattr(difflib, "get_close_matches", compare)
    (problem,) = refused(config_file(line.format("x" * 101, "x" * 102)))
    assert "did you mean" not in problem and max(map(len, compared), default=0) <= 100


def test_lists_in_lists_are_refused(config_file, refused):
    """Sixty lines that name a list twice are 2**60 items when printed."""
    doubled = "\n".join(f"_{n + 1} = [_{n}, _{n}]" for n in range(60))
    (problem, *_) = refused(config_file(f"_0 = [1]\n{doubled}\nbatch_size = _60"))
    assert "cannot work out _1: a list holds numbers and texts only" in problem


def test_a_sum_of_many_terms_is_computed(config_file):
    assert value_of("batch_size", config_file("batch_size = " + "+".join("1" * 500))) == 500


def test_an_endless_config_file_is_refused(refused):
    (problem,) = refused("/dev/zero")
    assert problem.startswith("/dev/zero: cannot read this config file: ")


def shared_lists(depth: int) -> list:
    value: list = [1]
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "value",
    [shared_lists(60), {"a": shared_lists(60)}, 10**5000],
    ids=["lists", "dictionary", "number"],
)
def test_a_saved_option_that_cannot_be_printed_is_refused(value):
    """Printing it hung; a number of 5,000 digits ended without the name of the file."""
    with pytest.raises(ValueError, match=r"^ckpt.pt: its option batch_size is a .*, not a whole"):
        restore_options(Config(), {"batch_size": value}, "ckpt.pt")
