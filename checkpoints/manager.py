"""Writes, rotates and prunes the checkpoints of a run in the background."""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from checkpoints.background_writer import BackgroundWriter, describe_error
from checkpoints.file import load_checkpoint, save_checkpoint
from checkpoints.latest import BEST_NAMES, LATEST_NAMES, numbered_checkpoints, step_of, step_path
from checkpoints.links import link_checkpoint, remove_checkpoint
from checkpoints.snapshot import snapshot
from model import ModelArgs
from runtime.atomic_files import sync_folder, write_atomically
from runtime.distributed import DistContext

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class CheckpointManager:
    """Saves the training state of a run: the latest, some older ones, and the best.

    A save writes ckpt.pt, makes ckpt_STEP.pt a hard link to it, and prunes older ones. The best
    state goes to best.pt, and to model.bin where the format can hold the model. With FSDP all
    processes write their shards of ckpt_STEP.dcp together, and ckpt.dcp and best.dcp are folders of
    hard links to its files.

    A save also writes the run_files and the model.bin that were deleted meanwhile."""

    def __init__(
        self,
        out_dir: str,
        keep_checkpoints: int,
        dist_ctx: DistContext,
        run_files: dict[str, bytes],
        export_best: Callable[[ModelArgs, dict], None] | None = None,
        mesh: "DeviceMesh | None" = None,
    ):
        """Manage the checkpoints in an output folder.

        Args:
            out_dir: the output folder of the run.
            keep_checkpoints: how many checkpoints to keep that are older than the latest.
            dist_ctx: the processes of the run.
            run_files: name -> content of the files that belong to every run's folder.
            export_best: writes the best model's weights to model.bin; None: no such file.
            mesh: the processes on the CPU, for saving sharded checkpoints; None: not sharded.
        """
        self.out_dir = out_dir
        self.keep_checkpoints = keep_checkpoints
        self.dist_ctx = dist_ctx
        self.run_files = run_files
        self.export_best = export_best
        self.mesh = mesh
        self.writer = BackgroundWriter(retries_alone=mesh is None)
        self.last_saved_step: int | None = None  # of the latest checkpoint that is complete
        self.submitted_step: int | None = None  # of the latest save
        self.has_best = False  # whether a best model was written or found
        self.best_pending = False  # a sharded best checkpoint that could not be written yet

    def path(self, name: str) -> str:
        """The path of a file in the output folder."""
        return os.path.join(self.out_dir, name)

    def save(self, state: dict, args: ModelArgs, best: bool) -> None:
        """Start writing a training state as the latest checkpoint; if best, also as best.pt.

        Called by the main process; by all processes where the checkpoints are sharded. Raises the
        error of an earlier save that a retry cannot fix, such as weights with NaN."""
        self.writer.wait_or_raise()  # before memory is taken for another copy
        self.submitted_step = state["iter_num"]
        if self.mesh is not None:
            return self._save_sharded(state, args, best)
        self.writer.pending.pop(self.path("ckpt.pt"), None)  # its state is outdated; frees memory
        copied = snapshot(state)
        jobs = self._run_file_jobs()
        if best:  # before the latest, which records how good the best is
            jobs[self.path("best.pt")] = partial(self._write_best, copied)
        if self.export_best and best:
            jobs[self.path("model.bin")] = partial(self.export_best, args, copied["model"])
        elif self._is_model_bin_lost():
            jobs[self.path("model.bin")] = self._export_best_again
        jobs[self.path("ckpt.pt")] = partial(self._write_latest, copied)
        self.writer.submit(jobs)

    def is_best_lost(self) -> bool:
        """Whether the best model was deleted in all its forms. Waits until nothing is written."""
        self.join()
        names = (*BEST_NAMES, "model.bin")
        return self.has_best and not any(os.path.exists(self.path(name)) for name in names)

    def _is_model_bin_lost(self) -> bool:
        has_model_bin = os.path.exists(self.path("model.bin"))
        is_pending = self.path("model.bin") in self.writer.pending
        has_source = os.path.exists(self.path("best.pt"))
        return bool(self.export_best) and has_source and not has_model_bin and not is_pending

    def _export_best_again(self) -> None:
        """Write the model.bin of best.pt. Raises OSError."""
        assert self.export_best, "the format can hold the model"
        try:
            checkpoint = load_checkpoint(self.path("best.pt"))
        except ValueError as error:  # damaged: no reason to end the run
            raise OSError(str(error)) from error
        self.export_best(checkpoint["model_args"], checkpoint["model"])

    def _run_file_jobs(self) -> dict[str, Callable[[], None]]:
        """The jobs that write the missing run files."""
        return {
            self.path(name): partial(write_atomically, self.path(name), content)
            for name, content in self.run_files.items()
            if not os.path.exists(self.path(name))
        }

    def write_run_files(self) -> None:
        """Write the files that belong to every run's folder, now. Raises OSError."""
        for name, content in self.run_files.items():
            write_atomically(self.path(name), content)

    def _write_best(self, state: dict) -> None:
        save_checkpoint(self.path("best.pt"), state)
        self.has_best = True
        remove_checkpoint(self.path("best.dcp"))

    def _write_latest(self, state: dict) -> None:
        # First under the name that a resumed run reads: if the process is killed in between, the
        # run resumes from this step.
        latest, step = self.path("ckpt.pt"), state["iter_num"]
        save_checkpoint(latest, state)
        self.last_saved_step = step
        link_checkpoint(latest, step_path(latest, step))
        self._remove_outdated("ckpt.pt", step)

    def _remove_outdated(self, latest: str, step: int) -> None:
        """Remove the latest checkpoint of the other form, and prune older numbered ones."""
        sync_folder(self.out_dir)
        outdated = [self.path(name) for name in LATEST_NAMES if name != latest]
        older = [path for path in numbered_checkpoints(self.out_dir) if step_of(path) < step]
        for path in outdated + older[self.keep_checkpoints :]:
            with contextlib.suppress(OSError):  # tried again at the next save
                remove_checkpoint(path)

    def _save_sharded(self, state: dict, args: ModelArgs, best: bool) -> None:
        from checkpoints.sharded import cpu_copy, save_sharded, split_sharded, without_tied_head

        assert self.mesh is not None, "a sharded save takes a mesh"
        self.writer.pending.clear()
        self.best_pending |= best  # a later state replaces one that failed
        shards, rest = split_sharded(state)
        shards = {
            name: cpu_copy(shard, self.mesh)
            for name, shard in without_tied_head(shards, args).items()
        }
        commit = partial(self._commit_sharded, state["iter_num"])
        folder = self.path("ckpt.dcp")
        job = partial(save_sharded, shards, snapshot(rest), folder, self.mesh, commit)
        self.writer.submit({folder: job})

    def _commit_sharded(self, step: int, folder: str) -> None:
        """Give the complete folder its names; called on the main process."""
        for write_run_file in self._run_file_jobs().values():
            write_run_file()
        best_error = None
        if self.best_pending:  # before the latest, which records how good the best is
            try:
                self._publish_best_sharded(folder)
            except (OSError, ValueError) as error:  # save the latest even if the best fails
                best_error = OSError(describe_error(error))
        latest = self.path("ckpt.dcp")
        numbered = step_path(latest, step)
        try:
            link_checkpoint(folder, latest)
        except ValueError as error:  # the folder has foreign files; a retry may succeed
            raise OSError(str(error)) from error
        self.last_saved_step = step
        remove_checkpoint(numbered)
        os.rename(folder, numbered)
        self._remove_outdated("ckpt.dcp", step)
        if best_error:
            raise best_error

    def _publish_best_sharded(self, folder: str) -> None:
        link_checkpoint(folder, self.path("best.dcp"))
        self.has_best = True
        self.best_pending = False
        for name in ("best.pt", "model.bin"):  # of a worse model
            remove_checkpoint(self.path(name))

    def poll(self) -> list[str]:
        """Messages about failed and repeated saves; starts a retry when it is due."""
        return self.writer.poll()

    def join(self) -> None:
        """Wait until nothing is being written."""
        self.writer.join()

    def cancel(self) -> bool:
        """Write nothing but the file that is being written; returns whether there is one."""
        self.writer.cancel()
        return not self.writer.is_idle

    def flush(self) -> None:
        """Write the pending jobs. Raises ValueError if that fails."""
        self.writer.flush()
