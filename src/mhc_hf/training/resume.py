"""Which checkpoint to resume from after a run was killed, perhaps in the middle of a save."""

import json
import re
import zipfile
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState

STATE_NAME = "trainer_state.json"


def last_complete_checkpoint(output_dir: str | PathLike) -> str | None:
    """The newest `checkpoint-N` of a Trainer's output folder that was written to its end.

    Trainer writes a checkpoint in place, its state last, and `resume_from_checkpoint=True` takes the newest folder even
    if a kill has left half of it. `trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))` starts
    afresh where there is none, and goes on to the bit where there is one. Nothing is deleted: a half-written folder is
    written again when training comes by.

    Args:
        output_dir: as in `TrainingArguments`; it need not exist yet.
    Returns:
        The path, or None.
    """
    folders = {
        int(match[1]): path
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    for step in sorted(folders, reverse=True):
        if _is_complete(folders[step], step):
            return str(folders[step])
    return None


def _is_complete(folder: Path, step: int) -> bool:
    if not (folder / STATE_NAME).is_file() or not all(_is_whole(path) for path in folder.rglob("*") if path.is_file()):
        return False
    return TrainerState.load_from_json(str(folder / STATE_NAME)).global_step == step


def _is_whole(path: Path) -> bool:
    """Whether a file of a format that says where it ends has been written that far."""
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return False
    elif path.suffix == ".safetensors":
        try:
            # compares the header with the length of the file
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return False
    elif path.suffix in (".pt", ".pth", ".bin"):
        # torch.save writes the directory of its archive last
        return zipfile.is_zipfile(path)
    return True
