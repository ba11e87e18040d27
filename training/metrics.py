"""The metrics of a run: one JSON record per report, and a plot of the loss."""

import contextlib
import errno
import json
import math
import os
import sys
import time
from typing import BinaryIO

from runtime.atomic_files import AtomicFile, write_atomically

RETRY_SECONDS = 30.0  # between attempts to rewrite the file
CURVES = (  # record key, label and line style of each curve in the plot
    ("loss", "training batch", {"linewidth": 0.8, "alpha": 0.5}),
    ("train_loss", "training, fixed windows", {"marker": "."}),
    ("val_loss", "validation", {"marker": "o"}),
)


class MetricsLogger:
    """Appends records to OUT_DIR/metrics.jsonl and draws OUT_DIR/loss.png.

    A record is a dictionary with the key "iter" and numbers. The main process calls open once,
    before the first write."""

    def __init__(self, out_dir: str):
        self.path = os.path.join(out_dir, "metrics.jsonl")
        self.plot_path = os.path.join(out_dir, "loss.png")
        self.records: list[dict] = []
        self.file: BinaryIO | None = None
        self.last_attempt = 0.0  # time.monotonic() of the last write that may have failed
        self.needs_rewrite = False  # the file lacks some of the records
        self.can_plot = True

    def open(self, first_step: int) -> None:
        """Read the records before first_step, drop later ones, and rewrite the file with them.

        The dropped records are of steps that run again. Raises OSError."""
        self.records = [record for record in read_records(self.path) if record["iter"] < first_step]
        self.rewrite()

    def rewrite(self) -> None:
        """Write all records to a new file, atomically. Raises OSError."""
        self.last_attempt = time.monotonic()
        lines = [json.dumps(record) + "\n" for record in self.records]
        write_atomically(self.path, "".join(lines).encode())
        if self.file:
            self.file.close()
        self.file = open(self.path, "ab", buffering=0, opener=open_existing)
        self.needs_rewrite = False

    def write(self, **record: float) -> None:
        """Append a record; NaN and Inf become null, which all JSON readers accept.

        Raises OSError at the first failed write. Later calls keep the records in memory and try to
        rewrite the file every RETRY_SECONDS."""
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self.records.append(finite)
        if self.needs_rewrite:
            if time.monotonic() - self.last_attempt > RETRY_SECONDS:
                self.flush()
            return
        self.needs_rewrite = True
        self.last_attempt = time.monotonic()
        line = (json.dumps(finite) + "\n").encode()
        if self.file is None or self.file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.needs_rewrite = False

    def flush(self) -> None:
        """Write the records that the file lacks, all if it was deleted, if that is possible now."""
        if self.needs_rewrite or not os.path.exists(self.path):
            self.needs_rewrite = True
            with contextlib.suppress(OSError):
                self.rewrite()

    def plot_loss(self) -> None:
        """Draw the training and validation loss. Raises OSError where the file cannot be written.

        Where matplotlib cannot be imported, or rejects the user's settings, it warns once."""
        if not self.can_plot:
            return
        try:
            self._plot_loss()
        except OSError:  # a full disk may have space again later
            raise
        except Exception as error:
            self.can_plot = False
            print(f"no plot of the loss: matplotlib fails with {error}", file=sys.stderr)

    def _plot_loss(self) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for key, label, style in CURVES:
            points = [(r["iter"], r[key]) for r in self.records if r.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.1g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        with AtomicFile(self.plot_path) as file:
            figure.savefig(file, format="png", dpi=120)


def open_existing(path: str, flags: int) -> int:
    """Open a file that exists: one that was deleted meanwhile must not begin again empty."""
    return os.open(path, flags & ~os.O_CREAT)


def read_records(path: str) -> list[dict]:
    """Read the complete records of a metrics.jsonl; an empty list if there is no file.

    Lines that hold anything else are left out with a message, except for a last line that was cut
    off. Raises ValueError if the path is not a file."""
    if not os.path.exists(path):
        return []
    if not os.path.isfile(path):
        raise ValueError(f"{path}: is not a file; move it away")
    records: list[dict] = []
    damaged: list[int] = []  # numbers of lines
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            record = parse_record(line)
            if record is not None:
                records.append(record)
            elif line.endswith("\n"):
                damaged.append(number)
    if damaged:
        print(f"{path}: left out {len(damaged)} damaged line(s), the first is line {damaged[0]}")
    return records


def parse_record(line: str) -> dict | None:
    """The record in a line, or None unless it is a step and numbers. NaN and Inf become null."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not is_number(record.get("iter")):
        return None
    if not all(value is None or is_number(value) for value in record.values()):
        return None
    is_step = isinstance(record["iter"], int) and record["iter"] >= 0
    finite = {key: finite_or_none(value) for key, value in record.items()}
    return finite if is_step and finite["iter"] is not None else None


def is_number(value: object) -> bool:
    """Whether a value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite_or_none(value: float | None) -> float | None:
    """A number, or None for NaN, Inf and numbers too large for a float."""
    return value if value is not None and abs(value) < sys.float_info.max else None
