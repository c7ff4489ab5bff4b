"""What test_resume.py runs: one training run that is not killed, and one killed by SIGKILL again and again and resumed.

    python -m tests.training.killed MODEL FOLDER [--steps 300] [--kills 5] [--random-moments SEED]

Kills fall on an optimizer step, or on the moment at which a file of a checkpoint is about to be opened; with
--random-moments on any moment. Exit code 1 if losses or weights differ by a bit.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from mhc_hf.training import last_complete_checkpoint, mhc_param_groups

from .conftest import Rows, losses, training_arguments

SAVE_STEPS = 7


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


def train(model_dir, output_dir, num_steps, callbacks=()):
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    optimizer = torch.optim.AdamW(mhc_param_groups(model, 1e-3, weight_decay=0.01))
    arguments = training_arguments(
        output_dir, max_steps=num_steps, save_strategy="steps", save_steps=SAVE_STEPS, save_total_limit=2
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[*callbacks], optimizers=(optimizer, None))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))
    Path(output_dir, "losses.json").write_text(json.dumps(losses(trainer)))
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, Path(output_dir, "final.safetensors"))


def in_a_child(work, kill_after=None):
    """Run `work` in a process of its own, killed once it has used so many seconds; (wait status, seconds used)."""
    # before any thread of torch has been started
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    while kill_after is not None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        # of the processor, which do not go on while other programs have it
        *_, user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:13]
        if (int(user) + int(system)) / os.sysconf("SC_CLK_TCK") >= kill_after:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    _, status, used = os.wait4(pid, 0)
    return status, used.ru_utime + used.ru_stime


def train_until_killed(model_dir, output_dir, num_steps, chance, at_save):
    """Dies at a step or in a save that lies at most two saves ahead."""
    begun = last_complete_checkpoint(output_dir)
    step = int(begun.rpartition("-")[2]) if begun else 0
    callbacks = []
    if at_save:
        die_when_opened(chance.choice(["config.json", "trainer_state.json"]), step + 1)
    else:
        callbacks = [DieAtStep(min(step + chance.randint(2, 2 * SAVE_STEPS + 2), num_steps - 1))]
    train(model_dir, output_dir, num_steps, callbacks)


def same_to_the_bit(folder):
    """Whether the losses of all steps and the weights at the end are those of the run that was not killed."""
    killed, whole = (json.loads((folder / run / "losses.json").read_text()) for run in ("killed", "whole"))
    after, expected = (load_file(folder / run / "final.safetensors") for run in ("killed", "whole"))
    same_weights = after.keys() == expected.keys() and all(torch.equal(after[n], v) for n, v in expected.items())
    return killed == whole and same_weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--random-moments", type=int, metavar="SEED")
    args = parser.parse_args()
    torch.set_num_threads(1)
    status, seconds = in_a_child(partial(train, args.model, args.folder / "whole", args.steps))
    deaths, half_written = [status], 0
    run = args.model, args.folder / "killed", args.steps
    for kill in range(args.kills):
        chance = random.Random(f"{args.random_moments} {kill}")
        if args.random_moments is None:
            status, _ = in_a_child(partial(train_until_killed, *run, chance, at_save=bool(kill % 2)))
        else:
            status, _ = in_a_child(partial(train, *run), kill_after=chance.uniform(0, seconds / args.kills))
        deaths.append(status)
        # of a run that was killed before its first checkpoint there is no folder
        if run[1].exists():
            half_written += get_last_checkpoint(run[1]) != last_complete_checkpoint(run[1])
    deaths.append(in_a_child(partial(train, *run))[0])
    (args.folder / "deaths.json").write_text(json.dumps({"statuses": deaths, "half_written": half_written}))
    same = same_to_the_bit(args.folder)
    print(f"{args.steps} steps, wait statuses {deaths}, the newest checkpoint half-written {half_written} times")
    print("losses and weights are", "the same to the bit" if same else "NOT the same")
    sys.exit(not same)


if __name__ == "__main__":
    main()
