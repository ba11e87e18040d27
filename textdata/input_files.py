"""
Find the text files of a folder.
"""

import importlib.util
import os
import stat
from collections.abc import Iterator

from runtime.lfs import require_content
from textdata.corpus import CorpusReport, SkippedFile, format_skipped, open_records
from textdata.records import MissingTextField, iter_record_text, quote_fields
from textdata.text_files import FORMATS, file_format

HIDDEN_NAMES = ("__MACOSX",)  # beside the names that begin with a dot
PROBED_RECORDS = 100  # a file of a folder is left out if none of its first records has text


def find_files(path: str, text_field: str = "", report: CorpusReport | None = None) -> list[str]:
    """The file itself, or all text files below the folder, sorted.

    Args:
        path: a file or a folder. Folders and files that links lead to are read, too.
        text_field: the field with the text of a record; "text" or "story" if empty.
        report: gets the files and folders that are left out, each with the reason.

    Raises ValueError if there is no text file, one is only a pointer of Git LFS, or pyarrow is
    missing for a .parquet file.
    """
    report = CorpusReport() if report is None else report
    if os.path.isdir(path):
        return files_of_folder(path, text_field, report.skipped)
    check_named_file(path)
    return [path]


def check_named_file(path: str) -> None:
    """Raise ValueError if the path is not a file whose name ends in a known format, or the file is
    only a pointer of Git LFS."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: there is no such file or folder")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a file or folder")
    if not file_format(path):
        raise ValueError(f"{path}: give a file that ends in {format_list()}, or a folder of them")
    require_content(path)
    if file_format(path) == ".parquet":
        check_pyarrow(path)


def format_list() -> str:
    """The formats, for a message."""
    return f"{', '.join(FORMATS)} or .gz (.txt.gz)"


def files_of_folder(path: str, text_field: str, skipped: list[SkippedFile]) -> list[str]:
    """The text files below the folder, sorted. Adds those that are left out to skipped. Raises
    ValueError if none is found."""
    files = []
    for file in sorted(walk(path, skipped)):
        reason = reason_to_skip(file, text_field)
        if reason:
            skipped.append(SkippedFile(file, reason))
        else:
            files.append(file)
    if not files:
        details = "".join(f"; {line}" for line in format_skipped(skipped))
        raise ValueError(f"{path}: no file here ends in {format_list()} and has text{details}")
    return list(without_duplicates(files, skipped))


def walk(path: str, skipped: list[SkippedFile]) -> Iterator[str]:
    """Yield the files below the folder, then those below the folders that links lead to. Reads each
    folder once. Adds hidden files and folders, and links that are not followed, to skipped."""
    root = os.path.realpath(path)
    visited: set[str] = set()
    links = [path]
    while links:
        found: list[str] = []
        # A folder sorts before the folders in it, so links to those lead to what was read.
        for link in sorted(links, key=lambda link: (os.path.realpath(link), link)):
            target = os.path.realpath(link)
            if target in visited:
                skipped.append(SkippedFile(link, "a link to a folder that is read already"))
            elif target != root and root.startswith(os.path.join(target, "")):
                skipped.append(SkippedFile(link, "a link to a folder that contains the input"))
            else:
                yield from walk_folder(link, visited, found, skipped)
        links = found


def walk_folder(
    top: str, visited: set[str], links: list[str], skipped: list[SkippedFile]
) -> Iterator[str]:
    """Yield the files below one folder without following links to folders.

    Args:
        top: the folder.
        visited: the real paths of the folders that were read; those read now are added.
        links: the links to folders that are found are added.
        skipped: hidden files and folders, and folders read before, are added.
    """
    for folder, subfolders, names in os.walk(top, onerror=raise_error):
        visited.add(os.path.realpath(folder))
        kept = []
        for name in sorted(subfolders):
            subfolder = os.path.join(folder, name)
            if is_hidden(name):
                skipped.append(SkippedFile(subfolder, "hidden"))
            elif os.path.islink(subfolder):
                links.append(subfolder)
            elif os.path.realpath(subfolder) in visited:
                skipped.append(SkippedFile(subfolder, "a folder that is read already, by a link"))
            else:
                kept.append(name)
        subfolders[:] = kept
        for name in names:
            if is_hidden(name):
                skipped.append(SkippedFile(os.path.join(folder, name), "hidden"))
            else:
                yield os.path.join(folder, name)


def check_pyarrow(file: str) -> None:
    """Raise ValueError if pyarrow, which is optional, is not installed to read the file."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{file}: reading .parquet files needs pyarrow: pip install pyarrow")


def is_hidden(name: str) -> bool:
    """Whether a name of a folder's entry is hidden, or that of metadata of macOS."""
    return name.startswith(".") or name in HIDDEN_NAMES


def raise_error(error: OSError) -> None:
    """Raise the error of a folder that cannot be read, which os.walk would ignore."""
    raise error


def without_duplicates(files: list[str], skipped: list[SkippedFile]) -> Iterator[str]:
    """Yield the files without the links to others of them, which are added to skipped."""
    links = {file for file in files if os.path.islink(file)}
    targets = {os.path.realpath(file) for file in files if file not in links} if links else set()
    for file in files:
        if file in links:
            target = os.path.realpath(file)
            if target in targets:
                skipped.append(SkippedFile(file, "a link to a file that is read already"))
                continue
            targets.add(target)
        yield file


def reason_to_skip(file: str, text_field: str) -> str:
    """Why a file of a folder is left out, or "" if it is read."""
    try:
        is_file = stat.S_ISREG(os.stat(file).st_mode)
    except OSError as error:
        return f"a link that leads nowhere: {error.strerror}"
    if not is_file:
        return "a device, socket or pipe"
    if not file_format(file):
        return f"the name does not end in {format_list()}"
    require_content(file)
    if file_format(file) == ".parquet":
        check_pyarrow(file)
    return "" if file_format(file) == ".txt" else reason_without_field(file, text_field)


def reason_without_field(file: str, text_field: str) -> str:
    """Why a file of records is left out: none of the first has a field for the text. "" for a file
    without records or with damaged ones, so that reading it raises the error."""
    names = quote_fields(text_field)
    num_missing = 0
    try:
        for record in open_records(file, text_field=text_field):
            if num_missing == PROBED_RECORDS:
                return f"none of the first {PROBED_RECORDS} records has a field {names}"
            try:
                next(iter(iter_record_text(record, 1, text_field)), "")
                return ""
            except MissingTextField:
                num_missing += 1
    except ValueError:
        return ""
    return f"no record with a field {names}" if num_missing else ""
