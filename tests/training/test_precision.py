"""Under Trainer's bf16 and in bf16 models, mHC parameters, gradients and optimizer state are float32."""

import copy

import pytest
import torch
from transformers import Trainer, TrainerCallback

from mhc_hf import HyperConnection, MHCForCausalLM
from mhc_hf.training import mhc_param_groups

from .conftest import Rows, hc_parameters, training_arguments


class LookAtGradients(TrainerCallback):
    def __init__(self):
        self.dtypes = set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.dtypes |= {parameter.grad.dtype for parameter in hc_parameters(model).values()}


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_trainer_in_bf16_trains_mhc_in_float32(llama, tmp_path, model_dtype):
    model = MHCForCausalLM.from_base(copy.deepcopy(llama).to(model_dtype))
    seen_in_forward, gradients = set(), LookAtGradients()
    for module in model.modules():
        if isinstance(module, HyperConnection):
            # autocast casts at the operations: what they get is seen at the operations' inputs only
            module.register_forward_pre_hook(lambda m, _: seen_in_forward.update(p.dtype for p in m.parameters()))
    optimizer = torch.optim.AdamW(mhc_param_groups(model, 1e-3))
    arguments = training_arguments(tmp_path, bf16=True, gradient_checkpointing=True)
    Trainer(model, arguments, train_dataset=Rows(), callbacks=[gradients], optimizers=(optimizer, None)).train()
    assert seen_in_forward == gradients.dtypes == {torch.float32}
    for name, parameter in hc_parameters(model).items():
        state = optimizer.state[parameter]
        assert parameter.dtype == state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32, name
        # the start is 1 for alpha, and steps of 1e-3 are below what bf16 tells from 1
        if name.endswith("alpha"):
            assert not torch.equal(parameter, parameter.bfloat16().float()), name


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float16])
def test_fp16_autocast_with_a_scaled_loss_trains_mhc_in_float32(llama, token_ids, model_dtype):
    model = MHCForCausalLM.from_base(copy.deepcopy(llama).to(model_dtype)).train()
    trained = hc_parameters(model)
    # scaled gradients of float16 weights cannot be unscaled: there the hyper-connections are trained alone
    if model_dtype == torch.float16:
        model.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(2):
        with torch.autocast("cpu", torch.float16):
            loss = model(token_ids, labels=token_ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert {p.grad.dtype for p in trained.values()} == {torch.float32}
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    # no step was skipped for an overflow
    assert scaler.get_scale() == 2.0**12
    for name, parameter in trained.items():
        assert parameter.dtype == optimizer.state[parameter]["exp_avg"].dtype == torch.float32, name
        assert not torch.equal(parameter, before[name]), name
