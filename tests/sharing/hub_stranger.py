"""Loads from a Hub and pushes to it where mhc_hf cannot be imported, then where it can.

python hub_stranger.py FOLDER RESULTS
"""

import sys

import torch
from huggingface_hub import HfApi
from stranger import TOKENS, NotInstalled, load


@torch.no_grad()
def main(folder, results):
    stranger = NotInstalled()
    sys.meta_path.insert(0, stranger)
    model = load("team/llama-3.2-mhc")
    found = {"loaded": (type(model).__module__, model(TOKENS).logits)}
    model.push_to_hub("team/pushed-by-a-stranger")
    found["pushed and loaded"] = load("team/pushed-by-a-stranger")(TOKENS).logits
    HfApi().create_repo("team/uploaded")
    HfApi().upload_folder(repo_id="team/uploaded", folder_path=folder)
    found["uploaded and loaded"] = load("team/uploaded")(TOKENS).logits

    sys.meta_path.remove(stranger)
    import mhc_hf

    model = load("team/llama-3.2-mhc")
    assert isinstance(model, mhc_hf.MHCForCausalLM)
    model.push_to_hub("team/pushed-by-the-package")
    torch.save(found, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
