"""
The names and the prose of the repository use the field's words.

Names are identifiers in the code; prose is comments, docstrings, messages, help texts and Markdown.
"""

import io
import re
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import NamedTuple

import pytest

from tests.processes import ROOT
from tests.source_files import CODE, TESTS, read

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md")
MAX_WORDS_IN_TEST_NAME = 10

# Words that stand for something else than their plain meaning, with what to write. They are found
# in names, split at underscores and capitals, and in prose.
WORDS = {
    "tell tells telling told untold teller storyteller": "generate, print, log or report",
    "story stories": "text, completion, sequence or sample",
    "place places": "index, position, path, source or context",
    "kind kinds": "dtype, type, format, mode or variant",
    "behind": "after",
    "ours theirs mine": "the name of the thing, such as cria, baseline or expected",
    "nursery": "process",
    "stands": "is",
}

# The same in names only; in prose these words are plain English.
NAME_WORDS = {
    "say says said saying": "log, print or message",
    "share shares": "shard",
}

# Private names that are more than one word or mean something else in the field. Names with an
# underscore are found in prose, too.
NAMES = """
    A_CALL agree agree_on_name agreeing ALONE args_of as_shares AT_ONCE at_once attend
    attend_one block_ends changes_text check_agreement check_what_gives_way choose_next
    compiled_check compiled_tell completed_by cuts_as_llama3 cuts_at_spaces Decoding
    decoding_problems digest_of draft_and_check DRAFTED draw_key draw_weights end_at_once
    ends_of equip expanded FEWEST_NORMS first_bad first_choice first_numbers first_weights
    foreseen forget_beyond forget_file format_of give_number go_on_from go_through going_on
    gradients_meet header_of heads_in in_order in_shares in_words is_behind is_cut is_in_shares
    is_ours is_renamed is_share is_target join_world Joined keep_freed_memory Keeper keeper
    keeps_architecture KNOWN largest_group LARGEST_SIZE learning_rate_at leave_world lengthen
    lie_in lie_together LONGEST LONGEST_UNASKED lost_processes_in_words made_up_tokenizer
    mesh_of_its_own MOST_COMPILED MOST_NORMS MOST_WORDS newest_checkpoint newest_path NOT_TIED
    numbered_copies of_equals of_target one_step only_writer open_out_dir OTHERS our_run
    our_step out_of_memory_in_words outline owes_best packable_kinds pairs_of part_files
    penalize_repeats PLAIN_ATTENTION_MAX_LEN plain_name print_beginning put_aside put_back
    put_in_place put_older_aside Quality ranks_refusal read_and_choose READ_AT_ONCE read_outline
    read_pieces read_stored read_table read_together reason_of recognises recorded_shards
    register_buffers_and_ties remember remember_bad remove_oldest rope_tables row_product
    save_shares saving_mesh SCORED_AT_ONCE set_aside share_like Shares short_runs short_write
    SHORTEST_PATIENCE show_step SHOWN skips SORTED_FIRST spell state_of stored_weights
    StoredModel StoredTensor sum_of_prefixes TABLE_IS_MADE_OF TableUnpickler take_name_away
    tell_in_turns tell_spikes tell_story tensors_of to_halves to_neighbours to_write together
    Together tokenizer_beside tokenizer_in tokenizer_writes tokens_folder Turns typed_lines
    with_ends with_whole_tensors without_classifier World write_anew write_best_of_shares
    write_shares write_whole write_whole_file written_at
"""

# Turns of phrase that a reader must read twice. Case does not matter.
PHRASES = (
    r"ahead\s+of",
    r"as\s+(?:it|they)\s+(?:is|are)\s+there",
    r"giv(?:e|es|ing)\s+way",
    r"in\s+shares|processe?s?'s?\s+shares?|shares\s+of",
    r"(?:is|are|was|were)\s+to\s+be",
    r"of\s+(?:its|their|his|our)\s+own",
    r"one\s+that\s+is\s+none",
    r"of\s+which",
    r"what\s+is",
)


class AllowedUse(NamedTuple):
    """A use of a banned word that is right."""

    files: str  # a pattern of paths
    pattern: str  # a regular expression
    reason: str
    scope: str = "any"  # names, prose or any


EXCEPTIONS = (
    AllowedUse("*", r"(?i)tiny_?stories\w*", "the data set, and the script named after it"),
    AllowedUse(
        "*", r"(?i)stories\d+[km]\w*", "llama2.c's models, and the presets named after them"
    ),
    AllowedUse("*", r"(?i)(?:num_|synthetic[\s_])stor(?:y|ies)", "the synthetic training data"),
    AllowedUse("*", r"(?i)stor(?:y|ies)_per_shard", "the synthetic training data"),
    AllowedUse("*", r"[\"']story[\"']", "the key of a text in the data set's records"),
    AllowedUse("tinystories.py", r"stor(?:y|ies)", "its stages download and write stories"),
    AllowedUse("textdata/synthetic*.py", r"\w+", "the words of the synthetic stories", "prose"),
    AllowedUse("benchmarks/data.py", r"^story$", "the synthetic training data", "names"),
    AllowedUse("checkpoints/file.py", r"[\"']kind[\"']", "a key in checkpoint files"),
    AllowedUse("formats/*_file.py", r"^tell$", "Python's file method", "names"),
    AllowedUse("textdata/text_files.py", r"^tell$", "Python's file method", "names"),
    AllowedUse("textdata/download.py", r"^tell$", "Python's file method", "names"),
    AllowedUse("textdata/synthetic.py", r"\w*(?:story|stories|kind)\w*", "its subject", "names"),
    AllowedUse("config/quickstart*.py", r"(?i)stor(?:y|ies)", "the synthetic training data"),
    AllowedUse("*", r"(?i)\bin[\s-]place", "the term for an operation that changes its argument"),
    AllowedUse("*", r"(?i)\btakes?\s+place\b", "happens"),
    AllowedUse("*", r"(?i)\bdecimal\s+places?\b", "of a number"),
    AllowedUse("*", r"\bstands\s+for\b", "is short for"),
)


class Finding(NamedTuple):
    """A banned word with the line it is on."""

    line: int
    word: str
    advice: str


def parts_of(name: str) -> list[str]:
    """The words of a name, in lower case: split at underscores, digits and capitals."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def by_word(table: dict[str, str]) -> dict[str, str]:
    return {word: advice for words, advice in table.items() for word in words.split()}


ADVICE = by_word(WORDS)
NAME_ADVICE = ADVICE | by_word(NAME_WORDS)
PRIVATE_NAMES = set(NAMES.split())


def without_exceptions(path: str, text: str, scope: str) -> str:
    """The text with its allowed uses blanked out, so that lines keep their numbers."""
    for exception in EXCEPTIONS:
        if fnmatch(path, exception.files) and exception.scope in ("any", scope):
            blank = lambda match: re.sub(r"\S", " ", match.group())
            text = re.sub(exception.pattern, blank, text)
    return text


def check_name(path: str, name: str, line: int) -> Iterator[Finding]:
    """The banned words of an identifier."""
    if name in PRIVATE_NAMES:
        yield Finding(line, name, "the field's name; see the list in tests/test_vocabulary.py")
        return
    for part in parts_of(without_exceptions(path, name, "names")):
        if part in NAME_ADVICE:
            yield Finding(
                line, name if part == name.lower() else f"{part} in {name}", NAME_ADVICE[part]
            )


def check_prose(path: str, text: str, first_line: int = 1) -> Iterator[Finding]:
    """The banned words and phrases of a comment, a string or a document."""
    text = without_exceptions(path, text, "prose")
    line_of = lambda match: first_line + text.count("\n", 0, match.start())
    for match in re.finditer(r"\w+", text):
        word = match.group()
        if "_" in word and word in PRIVATE_NAMES:
            yield Finding(line_of(match), word, "the field's name")
        for part in parts_of(word):
            if part in ADVICE:
                yield Finding(line_of(match), part, ADVICE[part])
    for phrase in PHRASES:
        for match in re.finditer(rf"(?i)\b(?:{phrase})\b", text):
            found = " ".join(match.group().split())
            yield Finding(line_of(match), found, "a short sentence: subject, verb, object")


def check_code(path: str, text: str) -> Iterator[Finding]:
    """The banned words of a Python file. Comments on successive lines are read as one."""
    comment, start, last = "", 0, -1
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type == tokenize.NAME:
            yield from check_name(path, token.string, line)
        elif token.type == tokenize.STRING or "FSTRING_MIDDLE" in tokenize.tok_name[token.type]:
            yield from check_prose(path, token.string, line)
        elif token.type == tokenize.COMMENT:
            if line != last + 1:
                yield from check_prose(path, comment, start)
                comment, start = "", line
            comment += token.string.lstrip("# ") + "\n"
            last = line
    yield from check_prose(path, comment, start)


def report(path: str, findings: Iterator[Finding]) -> list[str]:
    return [
        f"{path}:{line}: {word}; write {advice}" for line, word, advice in sorted(set(findings))
    ]


def test_the_code_uses_the_words_of_the_field():
    problems = [
        line for path in CODE for line in report(str(path), check_code(str(path), read(path)))
    ]
    assert not problems, f"{len(problems)} words\n" + "\n".join(problems)


def test_the_documents_use_the_words_of_the_field():
    paths = [path.relative_to(ROOT) for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]
    problems = [
        line for path in paths for line in report(str(path), check_prose(str(path), read(path)))
    ]
    assert not problems, f"{len(problems)} words\n" + "\n".join(problems)


def test_names_of_tests_have_at_most_ten_words():
    problems = []
    for path in TESTS:
        for match in re.finditer(r"^ *def test_(\w+)", read(path), re.M):
            if (count := len(match.group(1).split("_"))) > MAX_WORDS_IN_TEST_NAME:
                line = read(path).count("\n", 0, match.start()) + 1
                problems.append(f"{path}:{line}: {count} words: test_{match.group(1)}")
    assert not problems, f"{len(problems)} names are too long\n" + "\n".join(problems)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("def tell_spikes(): pass", [(1, "tell_spikes")]),
        ("class StoryTeller: pass", [(1, "story in StoryTeller"), (1, "teller in StoryTeller")]),
        ("x = 1\ny = x.kind", [(2, "kind")]),
        ("# read from this\n# place\n", [(2, "place")]),
        ('"""A shard.\n\nOne behind another."""', [(3, "behind")]),
        ('print(f"the {n} stories")', [(1, "stories")]),
        ("# a process of its\n# own\n", [(1, "of its own")]),
        ("y = 'call take_name_away'", [(1, "take_name_away")]),
    ],
)
def test_a_banned_word_is_found(text, expected):
    found = [(line, word) for line, word, _ in check_code("a.py", text)]
    assert sorted(found) == expected


@pytest.mark.parametrize(
    "text",
    [
        "x.replace(y)  # in place, TinyStories",
        "config.num_stories  # stories15M",
        'record["story"]',
        "shared = 1",
        "def mankind(): 'a tellurium placement'",
    ],
)
def test_plain_words_pass(text):
    assert list(check_code("a.py", text)) == []
