"""
The documents: their commands run, their options exist, their links resolve.

The commands of a fenced block run in order, in a copy of a folder with tiny models and little
data, with options added that shrink them. A comment directly before a block marks it as one that
the tests do not run:

    <!-- not run by the tests: needs a GPU -->

The scripts and options of all commands, in blocks and in running text, must exist.
"""

import builtins
import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from torch.distributed.run import get_args_parser

from tests.helpers import VOCAB_SIZE, write_tinystories_shard
from tests.processes import ROOT, Result, run_in_process
from tests.source_files import CODE, FILES, read
from tests.test_layout import SCRIPTS, UNRESTRICTED, imports_in, layer_of

DOCS = sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *DOCS)
FENCE = re.compile(r"```(\w*)$")
MARK = re.compile(r"<!-- not run by the tests: \S.* -->$")
LANGUAGES = {"sh", "python", "mermaid"}
FILE_COMMANDS = {"mkdir", "cp", "ln"}  # run as they are

# Options added to a command, so that it runs within a second.
TINY_TRAIN = (
    f"--vocab_size={VOCAB_SIZE}",
    "--dim=32",
    "--n_layers=1",
    "--n_heads=4",
    "--n_kv_heads=2",
    "--max_seq_len=32",
    "--batch_size=2",
    "--gradient_accumulation_steps=2",
    "--max_iters=4",
    "--eval_iters=1",
    "--compile=False",
    "--device=cpu",
    "--dtype=float32",
)
SHRINK: dict[str, tuple[str, ...]] = {
    "train.py": TINY_TRAIN,
    "sample.py": ("--max_new_tokens=8", "--compile=False", "--device=cpu"),
    "export.py": (),
    "tinystories.py train_vocab": (f"--vocab_size={VOCAB_SIZE}",),
    "tinystories.py pretokenize": (f"--vocab_size={VOCAB_SIZE}", "--num_workers=1"),
}


# Reading the documents


class Block(NamedTuple):
    """A fenced block of a document."""

    document: str
    line: int  # of the opening fence
    language: str
    is_marked: bool  # as one that the tests do not run
    text: str

    @property
    def name(self) -> str:
        """The identifier of the block in pytest's output."""
        return f"{self.document}:{self.line}"


class Command(NamedTuple):
    """A shell command without its environment variables and redirections."""

    words: list[str]
    stdin: str = ""  # path of a file
    stdout: str = ""

    @property
    def shrink_key(self) -> str:
        """The script and, for tinystories.py, its stage: a key of SHRINK."""
        script, *arguments = self.words[1:]
        return f"{script} {arguments[0]}" if script == "tinystories.py" else script


@functools.cache
def read_document(document: str) -> str:
    """The text of a document."""
    return (ROOT / document).read_text(encoding="utf-8")


def blocks_in(document: str, text: str) -> Iterator[Block]:
    """The fenced blocks of a document."""
    before, start, content = "", None, []
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if start is None and fence:
            start = Block(document, number, fence[1], bool(MARK.match(before)), "")
            content = []
        elif fence:
            yield start._replace(text="\n".join(content))
            start = None
        elif start is not None:
            content.append(line)
        before = line
    assert start is None, f"{start} has no end"


def commands_in(text: str) -> list[Command]:
    """The commands of a shell block, or of a piece of running text."""
    lines = text.replace("\\\n", " ").splitlines()
    return [parse_command(words) for line in lines if (words := shlex.split(line, comments=True))]


def parse_command(words: list[str]) -> Command:
    """A command from its words."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    streams = {"<": "", ">": ""}
    for sign in streams:
        if sign in words:
            index = words.index(sign)
            streams[sign] = words[index + 1]
            words = words[:index] + words[index + 2 :]
    return Command(words, streams["<"], streams[">"])


def without_blocks(text: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def inline_code(text: str) -> list[str]:
    """The code spans in the running text of a document."""
    return re.findall(r"`([^`]+)`", without_blocks(text))


BLOCKS = [block for name in DOCUMENTS for block in blocks_in(name, read_document(name))]
SHELL_BLOCKS = [block for block in BLOCKS if block.language == "sh"]


def runnable(language: str) -> list:
    """The blocks that are run, as parameters of a test; torchrun starts processes and is slow."""
    blocks = [block for block in BLOCKS if block.language == language and not block.is_marked]
    slow = {block for block in blocks if "torchrun" in block.text}
    return [
        pytest.param(block, id=block.name, marks=[pytest.mark.slow] if block in slow else [])
        for block in blocks
    ]


# Running commands


def run_command(command: Command, folder: Path) -> Result:
    """Run a command in a folder, with the options that shrink it."""
    program = command.words[0]
    if program in FILE_COMMANDS:
        done = subprocess.run(command.words, cwd=folder, capture_output=True, text=True)
        return Result(done.returncode, done.stdout, done.stderr)
    if program == "torchrun":
        return run_torchrun(command, folder)
    is_script = program == "python" and command.words[1].endswith(".py")
    if not is_script or command.shrink_key not in SHRINK:
        pytest.fail(f"{shlex.join(command.words)}: mark its block as not run by the tests")
    arguments = [*command.words[2:], *SHRINK[command.shrink_key]]
    stdin = (folder / command.stdin).read_bytes() if command.stdin else b""
    result = run_in_process(command.words[1], *arguments, cwd=folder, stdin=stdin)
    if command.stdout:
        (folder / command.stdout).write_text(result.stdout, encoding="utf-8")
    return result


def run_torchrun(command: Command, folder: Path) -> Result:
    """Run a torchrun command on one machine with two processes."""
    options = get_args_parser().parse_args(command.words[1:])
    script, arguments = options.training_script, options.training_script_args
    shrink = SHRINK[Command(["torchrun", script, *arguments]).shrink_key]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(ROOT / script), *arguments, *shrink],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_successfully(script: str, *arguments: str, cwd: Path) -> None:
    """Run a script, which must succeed."""
    result = run_in_process(script, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def prepared_folder(stories, tokenizer_path, tmp_path_factory) -> Path:
    """A folder with everything that the documents' commands read: texts, tokens, a run, models.

    A test uses a copy of it in the folder in which it was made, as tokens record the paths of their
    texts."""
    folder = tmp_path_factory.mktemp("documents") / "copy"
    folder.mkdir()
    (folder / "config").symlink_to(ROOT / "config")
    for number in range(2):
        shard = folder / "data" / "TinyStories_all_data" / f"data{number:02d}.json"
        write_tinystories_shard(shard, stories[number::2])
    (folder / "mytext.txt").write_text("\n\n".join(stories[:40]), encoding="utf-8")
    (folder / "prompt.txt").write_text("Once upon a time", encoding="utf-8")
    (folder / "prompts.txt").write_text("Once upon a time\nTom saw\n", encoding="utf-8")
    shutil.copy(tokenizer_path, folder / "tokenizer.model")
    tokenize = ["pretokenize", *SHRINK["tinystories.py pretokenize"], "--tokenizer=tokenizer.model"]
    run_successfully("tinystories.py", *tokenize, cwd=folder)
    run_successfully("tinystories.py", *tokenize, "--input=mytext.txt", cwd=folder)
    run_successfully("train.py", *TINY_TRAIN, "--max_iters=2", cwd=folder)
    for path in re.findall(r"out/ckpt_\d+\.pt", read_document("README.md")):
        shutil.copy(folder / "out" / "ckpt.pt", folder / path)
    export_models(folder)
    return folder.rename(folder.parent / "prepared")


def export_models(folder: Path) -> None:
    """Write the models that the documents' commands read, under the names that they have there."""
    for name, format in {
        "mymodel-hf": "hf",
        "Llama-3.2-1B-hf": "hf",
        "Meta-Llama-3-8B": "meta",
        "stories260K.bin": "v0",
    }.items():
        run_successfully("export.py", name, f"--format={format}", cwd=folder)
    (folder / "tokenizer.bin").rename(folder / "tok512.bin")


@pytest.fixture
def folder(prepared_folder) -> Iterator[Path]:
    """A copy of the prepared folder."""
    copy = prepared_folder.parent / "copy"
    yield Path(shutil.copytree(prepared_folder, copy, symlinks=True))
    shutil.rmtree(copy)


@pytest.mark.parametrize("block", runnable("sh"))
def test_the_commands_of_a_block_run(block, folder):
    for command in commands_in(block.text):
        result = run_command(command, folder)
        assert result.returncode == 0, f"{shlex.join(command.words)}\n{result.stderr}"


@pytest.mark.parametrize("block", runnable("python"))
def test_the_python_of_a_block_runs(block, folder):
    output = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(output):
        exec(compile(block.text, block.name, "exec"), {})
    assert output.getvalue()


# Checking commands without running them


class Parsed(Exception):
    """The options of a script were read without an error."""


def check_command(command: Command) -> None:
    """Raise AssertionError unless the script or target exists and takes these options."""
    program, *arguments = command.words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.M) for target in arguments), command.words
    elif program == "torchrun":
        with readable_errors(command):
            options = get_args_parser().parse_args(arguments)
        check_options(options.training_script, options.training_script_args, command)
    elif program == "python" and arguments[0] == "-m":
        check_module(arguments[1], arguments[2:])
    elif program == "python":
        check_options(arguments[0], arguments[1:], command)
    else:
        assert program in FILE_COMMANDS | {"export"}, f"{program} is not known to this test"


@contextlib.contextmanager
def readable_errors(command: Command) -> Iterator[None]:
    """Turn the end of a parser of options into an AssertionError with its message."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit:
        raise AssertionError(f"{shlex.join(command.words)}: {errors.getvalue()}") from None


def check_options(script: str, arguments: list[str], command: Command) -> None:
    """Raise AssertionError unless the script reads these options without an error."""
    module = importlib.import_module(script.removesuffix(".py"))
    configure: Callable = module.configure

    def read_options_and_stop(*args, **kwargs):
        configure(*args, **kwargs)
        raise Parsed

    arguments = [argument for argument in arguments if argument != "--help"]
    with (
        mock.patch.object(module, "configure", read_options_and_stop),
        contextlib.chdir(ROOT),
        readable_errors(command),
        pytest.raises(Parsed),
    ):
        module.main(arguments)


def check_module(module: str, arguments: list[str]) -> None:
    """Raise AssertionError unless the module, its options and the files in its arguments exist."""
    if module == "pytest":
        paths = [argument for argument in arguments if argument.startswith("tests")]
        assert all((ROOT / path).exists() for path in paths), arguments
        return
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert path.exists(), f"{module}: there is no such module"
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        option = argument.partition("=")[0]
        assert f'"{option}"' in path.read_text(encoding="utf-8"), f"{module} has no {option}"


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in SHELL_BLOCKS])
def test_the_options_in_a_block_exist(block):
    for command in commands_in(block.text):
        check_command(command)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_in_running_text_exist(document):
    for code in inline_code(read_document(document)):
        is_command = re.match(r"([A-Z_]+=\S+ )*(python|torchrun|make) ", code)
        if is_command and "..." not in code:
            (command,) = commands_in(code)
            check_command(command)


def known_options() -> set[str]:
    """The options of all scripts, of torchrun and of the tools under tests/."""
    train, sample, export, tinystories, bench = map(
        importlib.import_module, ("train", "sample", "export", "tinystories", "bench")
    )
    classes = [train.TrainConfig, sample.SampleConfig, export.ExportConfig]
    classes += [config_class for config_class, _ in tinystories.STAGES.values()]
    classes += [config_class for config_class, _ in bench.BENCHMARKS.values()]
    names = {name.removesuffix("_") for each in classes for name in each.__dataclass_fields__}
    names |= {name.replace("_", "-") for name in names}  # --meta-llama, as llama2.c spells it
    options = {f"--{name}" for name in (*names, "help")}
    options |= get_args_parser()._option_string_actions.keys()
    for path in (ROOT / "tests" / "tools").glob("*.py"):
        options |= set(re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    return options


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_options_in_running_text_exist(document):
    used = set(re.findall(r"`(--[\w-]+)", without_blocks(read_document(document))))
    assert not used - known_options() - {"--key"}  # --key=value in general


@pytest.mark.parametrize(
    "command",
    [
        "python train.py --batchsize=8",
        "python tinystories.py tokenize",
        "python missing.py",
        "python -m tests.tools.fuzz --no-such-option=1",
        "make nothing",
        "torchrun --processes=2 train.py",
        "rm -r out",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises((AssertionError, ImportError)):
        check_command(*commands_in(command))


# Structure


def test_every_block_has_a_known_language():
    """A command in a block of another language would not be checked."""
    assert not [block.name for block in BLOCKS if block.language not in LANGUAGES]


def test_a_mark_must_be_directly_before_its_block():
    text = "<!-- not run by the tests: why -->\n```sh\na\n```\n\n```sh\nb\n```"
    assert [block.is_marked for block in blocks_in("a.md", text)] == [True, False]
    for name in DOCUMENTS:
        lines = read_document(name).splitlines()
        marks = [number for number, line in enumerate(lines) if line.startswith("<!-- not run")]
        assert all(MARK.match(lines[n]) and FENCE.match(lines[n + 1]) for n in marks), name


def test_a_command_without_a_mark_must_be_runnable(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="mark its block"):
        run_command(*commands_in("python bench.py train"), tmp_path)


def test_the_readme_describes_every_script():
    readme = read_document("README.md")
    for path in ROOT.glob("*.py"):
        assert re.search(rf"^\|.*`{re.escape(path.name)}`", readme, re.M), path.name


def test_the_readme_describes_every_folder_of_code():
    readme = read_document("README.md")
    for folder in {path.parent.name for path in ROOT.glob("*/*.py")}:
        assert re.search(rf"^\|.*`{re.escape(folder)}/`", readme, re.M), folder


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", (*DOCUMENTS, "CHANGELOG.md"))
def test_links_resolve(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", read_document(document)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_in_running_text_exist(document):
    """Files of the repository: those under one of its folders of code, and scripts."""
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} | {"docs"}
    for code in inline_code(read_document(document)):
        if re.fullmatch(r"[\w/]+\.(py|md|sh)", code) and code.split("/")[0] in folders:
            assert (ROOT / code).exists() or "NAME" in code, code


def defines(text: str, name: str) -> bool:
    """Whether a Python file defines a function, class, constant or attribute of this name."""
    last = re.escape(name.split(".")[-1])
    pattern = rf"^\s*(def|class) {last}\b|^\s*(self\.)?{last}(: [^=]+)? = |^    {last}: "
    return bool(re.search(pattern, text, re.M))


def test_names_in_the_table_of_where_things_are_exist():
    """Rows such as | the training loop | `train.py`: `train` and `training_step` |."""
    rows = re.findall(r"^\|[^|]*\| (`\w[\w/]*\.py`: .*) \|$", read_document("README.md"), re.M)
    assert rows
    for row in rows:
        path = ""
        for code in re.findall(r"`([\w./]+)`", row):
            if code.endswith(".py"):
                path = code
            else:
                assert defines((ROOT / path).read_text(encoding="utf-8"), code), f"{path}: {code}"


@pytest.mark.parametrize(
    "name, exists",
    [("TABLE", True), ("Model.size", True), ("run", True), ("field", True), ("missing", False)],
)
def test_definitions_are_found(name, exists):
    text = "TABLE: dict = {}\nclass Model:\n    field: int\n    def run(self):\n"
    text += "        self.size = 1\n"
    assert defines(text, name) is exists


def test_names_in_contributing_exist():
    """Constants, classes, and functions with an underscore, with or without arguments."""
    text = "\n".join(read(path) for path in FILES)
    is_name = re.compile(r"(?!NAME\b)([A-Z]\w*(\.\w+)?|_?[a-z]+_\w+)(\([\w, ]*\))?")
    codes = set(filter(is_name.fullmatch, inline_code(read_document("CONTRIBUTING.md"))))
    assert {"FORMAT_BY_SUFFIX", "Batch._set_sampling", "sample_next"} <= codes
    names = {code.partition("(")[0] for code in codes if not hasattr(builtins, code)}
    assert not [name for name in names if not defines(text, name)]


def test_the_diagram_of_imports_is_true():
    """Every arrow is an import, and every import is an arrow or a path of several."""
    diagram = next(block.text for block in BLOCKS if block.language == "mermaid")
    arrows = set(re.findall(r"^ +(\w+)[^-\n]* --> (\w+)", diagram, re.M))
    drawn, imported = follow_arrows(arrows), imports_between_folders()
    assert arrows <= imported
    assert imported <= drawn


def imports_between_folders() -> set[tuple[str, str]]:
    """The pairs (importer, imported) of folders and files at the root; scripts are one node."""
    names = {path: "scripts" if layer_of(path) in SCRIPTS else layer_of(path) for path in CODE}
    pairs = {
        (name, import_.module.split(".")[0])
        for path, name in names.items()
        if name not in UNRESTRICTED
        for import_ in imports_in(path, read(path))
    }
    return {(a, b) for a, b in pairs if a != b and b in names.values()}


def follow_arrows(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows, and one for each path along them."""
    while longer := {(a, d) for a, b in arrows for c, d in arrows if b == c} - arrows:
        arrows = arrows | longer
    return arrows


def test_the_messages_in_the_table_of_troubleshooting_exist():
    """The messages are in italics: | *no tokens here* | ... |."""
    messages = re.findall(r"^\| \*([^*]+)\* \|", read_document("README.md"), re.M)
    code = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*/*.py"))
    assert messages
    for message in messages:
        assert message in code, message
