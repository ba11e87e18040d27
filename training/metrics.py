"""
What a run measured: a line of JSON for each report, and the loss curve as a picture.
"""

import contextlib
import errno
import json
import math
import os
import sys
import time

from checkpoints.manager import RETRY_SECONDS
from runtime.atomic_files import AtomicFile, write_atomically


class MetricsLogger:
    """OUT_DIR/metrics.jsonl. Records from first_step on, of an earlier try that is being run
    again, are dropped, and so is a last line that was cut off."""

    def __init__(self, out_dir: str, first_step: int):
        self.path = os.path.join(out_dir, "metrics.jsonl")
        self.picture = os.path.join(out_dir, "loss.png")
        self.records = [record for record in read_records(self.path) if record["iter"] < first_step]
        self.file, self.tried_at = None, 0.0
        self.needs_rewrite = False  # whether the file lacks records
        self.can_draw = True  # as far as is known
        self.rewrite()

    def rewrite(self):
        self.tried_at = time.monotonic()
        write_atomically(self.path, "".join(json.dumps(r) + "\n" for r in self.records).encode())
        if self.file:
            self.file.close()
        self.file = open(self.path, "ab", buffering=0)
        self.needs_rewrite = False

    def write(self, **record):
        """Add a line; a figure that is no number is written as null, which every reader knows. Raises
        OSError once where it cannot; later calls then try to write all lines again."""
        record = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self.records.append(record)
        if self.needs_rewrite:
            if not self.tried_at or time.monotonic() - self.tried_at > RETRY_SECONDS:
                self.finish()
            return
        self.needs_rewrite, self.tried_at = True, time.monotonic()
        line = (json.dumps(record) + "\n").encode()
        if self.file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.needs_rewrite = False

    def mark_missing(self):
        """It is gone: the next call writes all lines again."""
        self.needs_rewrite, self.tried_at = True, 0.0

    def finish(self):
        """Write what is missing, where that can be done now."""
        if self.needs_rewrite:
            with contextlib.suppress(OSError):
                self.rewrite()

    def draw(self):
        """Training and validation loss over the steps so far. Where matplotlib cannot be imported, or
        takes offence at the user's own settings for it, it says so once and there is no picture."""
        if not self.can_draw:
            return
        try:
            self.draw_with_matplotlib()
        except OSError:  # a disk that is full may have room again
            raise
        except Exception as error:
            self.can_draw = False
            print(f"no picture of the loss, as matplotlib fails: {error}", file=sys.stderr)

    def draw_with_matplotlib(self):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for key, label, style in (
            ("loss", "training batch", dict(linewidth=0.8, alpha=0.5)),
            ("train_loss", "training, fixed windows", dict(marker=".")),
            ("val_loss", "validation", dict(marker="o")),
        ):
            points = [
                (record["iter"], record[key])
                for record in self.records
                if record.get(key) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.1g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        with AtomicFile(self.picture) as file:
            figure.savefig(file, format="png", dpi=120)


def read_records(path: str) -> list[dict]:
    """The whole lines of a metrics.jsonl; none if there is no file."""
    records = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
    return [
        record
        for record in records
        if isinstance(record, dict) and isinstance(record.get("iter"), int)
    ]
