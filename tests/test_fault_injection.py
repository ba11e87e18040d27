"""The fault injection notices a lost checkpoint, a lost best model, and a wrong start."""

import os
import random

from tests.checkpoints.test_manager import save_steps
from tests.tools.fault_folders import copy_without_times, describe_loss, folder_state
from tests.training.test_best_model import save_best


def test_lost_checkpoints_and_best_models_are_found(tmp_path):
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    save_steps(out_dir, [5, 10], keep_checkpoints=1)
    save_best(out_dir / "best.pt", 1.5)
    before = folder_state(out_dir)
    copy_without_times(out_dir, random.Random(0))
    assert describe_loss(before, folder_state(out_dir)) == ""
    save_best(out_dir / "best.pt", 1.6)
    assert "lost the best model" in describe_loss(before, folder_state(out_dir))
    save_best(out_dir / "best_000007.pt", 1.5)
    assert describe_loss(before, folder_state(out_dir)) == ""
    (out_dir / "previous1").mkdir()
    os.rename(out_dir / "ckpt_000010.pt", out_dir / "previous1" / "ckpt_000010.pt")
    assert "resumed from an older" in describe_loss(before, folder_state(out_dir))
    os.remove(out_dir / "ckpt.pt")
    assert "lost checkpoint 10" in describe_loss(before, folder_state(out_dir))
