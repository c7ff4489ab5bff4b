"""What test_resume.py runs: one training run, killed by SIGKILL again and again and resumed, then one that is not.

Kills fall on an optimizer step, or on the moment at which a file of a checkpoint is about to be opened.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from mhc_hf.training import last_complete_checkpoint, mhc_param_groups

from .conftest import Rows, losses, training_arguments

NUM_STEPS = 60
SAVE_STEPS = 7
NUM_KILLS = 5


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DieAtStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            die()


def die_when_opened(name, step):
    """SIGKILL when the file `name` of a checkpoint at `step` or later is opened to be written."""

    def hook(event, arguments):
        if event != "open" or not isinstance(arguments[0], str) or not isinstance(arguments[1], str):
            return
        path = Path(arguments[0])
        number = path.parent.name.removeprefix("checkpoint-")
        if "w" in arguments[1] and path.name == name and number.isdigit() and int(number) >= step:
            die()

    sys.addaudithook(hook)


def train(model_dir, output_dir, callbacks=()):
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    optimizer = torch.optim.AdamW(mhc_param_groups(model, 1e-3, weight_decay=0.01))
    arguments = training_arguments(
        output_dir, max_steps=NUM_STEPS, save_strategy="steps", save_steps=SAVE_STEPS, save_total_limit=2
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[*callbacks], optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))
    Path(output_dir, "losses.json").write_text(json.dumps(losses(trainer)))
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, Path(output_dir, "final.safetensors"))


def main():
    torch.set_num_threads(1)
    model_dir, folder = Path(sys.argv[1]), Path(sys.argv[2])
    chance = random.Random(0)
    deaths, half_written = [], 0
    for attempt in range(NUM_KILLS + 1):
        begun = last_complete_checkpoint(folder / "killed")
        step = int(begun.rpartition("-")[2]) if begun else 0
        # before any thread of torch has been started
        pid = os.fork()
        if pid == 0:
            callbacks = []
            if attempt == NUM_KILLS:
                pass
            elif attempt % 2:
                name = chance.choice(["config.json", "trainer_state.json"])
                die_when_opened(name, step + 1)
            else:
                callbacks = [DieAtStep(min(step + chance.randint(2, 2 * SAVE_STEPS + 2), NUM_STEPS - 1))]
            train(model_dir, folder / "killed", callbacks)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        deaths.append(status)
        half_written += get_last_checkpoint(folder / "killed") != last_complete_checkpoint(folder / "killed")
    (folder / "deaths.json").write_text(json.dumps({"statuses": deaths, "half_written": half_written}))
    train(model_dir, folder / "whole")


if __name__ == "__main__":
    main()
