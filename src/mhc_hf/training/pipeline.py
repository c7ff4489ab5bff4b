"""Pipeline parallel training of a widened model on `torch.distributed.pipelining`: one object a rank.

Shapes: B batch, S sequence, n streams, C channels of one stream. Between ranks travels [B / num_microbatches, S, n*C].
"""

from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from ..modeling import MHCForCausalLM
from .stages import split_into_stages

# schedule -> stages a rank, and how stages lie on ranks: round and round, or down and back up
LAYOUTS = {
    "GPipe": (1, "loop"),
    "1F1B": (1, "loop"),
    "Interleaved1F1B": (2, "loop"),
    "ZBVZeroBubble": (2, "v"),
    "DualPipeV": (2, "v"),
}
IGNORED_LABEL = -100
# earlier versions of PyTorch greet the next stage by a message, and in a V that is the same rank once: gloo has no such
GREETS_ITSELF = not hasattr(PipelineStage, "_warmup_forward_vote")


class TrainingPipeline:
    """This rank's share of a widened model, and the schedule that it runs in step with the others.

    Args:
        model: a widened causal language model, the same on every rank; on the CPU, if it is larger than a device. Its
            parameters that other ranks own are freed: from here on it is the pipeline's.
        schedule: "GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble" or "DualPipeV".
        num_microbatches: into how many parts a batch is cut, >= 1; each schedule says what it needs.
        device: where this rank computes; None leaves the model where it is.
        group: process group of the pipeline; None takes all ranks.
    Attributes:
        module: what this rank trains; `mhc_param_groups(pipeline.module, lr)` goes into its optimizer.
    Raises:
        ValueError: the model cannot be cut so (see `split_into_stages`), the schedule is unknown or finds
            `num_microbatches` unfit, or tied embeddings would lie on two ranks.
        RuntimeError: a V-shaped schedule over gloo with a PyTorch that cannot run it there.
    """

    def __init__(
        self,
        model: MHCForCausalLM,
        schedule: str,
        num_microbatches: int,
        device: torch.device | str | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        if schedule not in LAYOUTS:
            raise ValueError(f"`schedule` must be one of {', '.join(map(repr, LAYOUTS))}, got {schedule!r}.")
        if isinstance(num_microbatches, bool) or not isinstance(num_microbatches, int) or num_microbatches < 1:
            raise ValueError(f"`num_microbatches` must be an integer >= 1, got {num_microbatches!r}.")
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        stages_per_rank, style = LAYOUTS[schedule]
        if style == "v" and GREETS_ITSELF and dist.get_backend(group) == "gloo":
            raise RuntimeError(
                f"`schedule={schedule!r}` over gloo needs a newer PyTorch than {torch.__version__}: here a rank would "
                'have to send to itself. Take NCCL, torch 2.13, or "GPipe", "1F1B" or "Interleaved1F1B".'
            )
        num_stages = stages_per_rank * num_ranks
        stages = split_into_stages(model, num_stages)
        rank_of_stage = [_rank_of(index, num_ranks, style) for index in range(num_stages)]
        if getattr(model.config, "tie_word_embeddings", False) and rank_of_stage[0] != rank_of_stage[-1]:
            raise ValueError(
                f"`schedule={schedule!r}` puts embeddings and head on different ranks, and this model ties them. "
                'Take "ZBVZeroBubble" or "DualPipeV", or a model with tie_word_embeddings=False.'
            )
        self.model = model
        self.group = group
        self.num_microbatches = num_microbatches
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.holds_input = rank_of_stage[0] == rank
        self.holds_loss = rank_of_stage[-1] == rank
        self._last_rank = _global_rank(group, rank_of_stage[-1])
        own = [index for index in range(num_stages) if rank_of_stage[index] == rank]
        self.module = nn.ModuleList(stages[index] for index in own).to(self.device)
        _free_parameters_except(model, self.module)
        torch_stages = [PipelineStage(stages[index], index, num_stages, self.device, group=group) for index in own]
        # the loss is scaled, not the gradients: those of tied weights and of accumulated steps would be scaled twice
        self._schedule: Any = get_schedule_class(schedule)(
            torch_stages[0] if stages_per_rank == 1 else torch_stages,
            num_microbatches,
            loss_fn=self._share_of_loss,
            scale_grads=False,
        )
        self._num_targets = 1

    def step(self, input_ids: Tensor, labels: Tensor, **context: Tensor) -> Tensor:
        """Forward and backward of one batch; gradients add up in `module`'s parameters. Every rank takes part.

        Args:
            input_ids: [B, S], the same on every rank; B divisible by `num_microbatches`, shapes the same at every step.
            labels: [B, S], as for the model: not shifted, -100 where no loss is wanted.
            context: attention_mask [B, S] and the like, cut into micro-batches along B.
        Returns:
            The loss, on every rank: the mean over all labels of the batch, however they lie in micro-batches.
        Raises:
            ValueError: B is not divisible by `num_microbatches`, or no label is left.
        """
        if len(input_ids) % self.num_microbatches:
            raise ValueError(
                f"`input_ids` must have a batch size divisible by num_microbatches={self.num_microbatches}, got "
                f"{list(input_ids.shape)}. Drop the last batch of an epoch, or pad it with rows of labels -100."
            )
        self._num_targets = int((labels[:, 1:] != IGNORED_LABEL).sum())
        if not self._num_targets:
            raise ValueError(f"`labels` must leave something to predict, got {IGNORED_LABEL} throughout.")
        context = {name: tensor.to(self.device) for name, tensor in context.items()}
        inputs = (input_ids.to(self.device),) if self.holds_input else ()
        losses: list[Tensor] = []
        targets = dict(target=labels.to(self.device), losses=losses) if self.holds_loss else {}
        self._schedule.step(*inputs, **targets, return_outputs=False, **context)
        loss = torch.stack(losses).sum().detach() if self.holds_loss else torch.zeros((), device=self.device)
        dist.broadcast(loss, src=self._last_rank, group=self.group)
        return loss

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write the whole model as one checkpoint that `from_pretrained` loads anywhere. Every rank takes part.

        The weights are gathered on the CPU of the first rank.
        """
        share = {
            name: tensor.cpu()
            for stage in self.module
            for name, tensor in stage.checkpoint().items()  # type: ignore[operator]
        }
        is_first = dist.get_rank(self.group) == 0
        shares: list[Any] | None = [None] * dist.get_world_size(self.group) if is_first else None
        dist.gather_object(share, shares, dst=_global_rank(self.group, 0), group=self.group)
        if shares is not None:
            whole = {name: tensor for part in shares for name, tensor in part.items()}
            self.model.save_pretrained(folder, state_dict=whole)
        dist.barrier(self.group)

    def _share_of_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What a micro-batch adds to the batch's mean loss."""
        return self.model.loss_function(
            logits,
            labels,
            vocab_size=logits.shape[-1],
            num_items_in_batch=self._num_targets,
            ignore_index=IGNORED_LABEL,
        )


def _rank_of(stage: int, num_ranks: int, style: str) -> int:
    turn, step = divmod(stage, num_ranks)
    return num_ranks - 1 - step if style == "v" and turn % 2 else step


def _global_rank(group: dist.ProcessGroup | None, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def _free_parameters_except(model: nn.Module, own: nn.Module) -> None:
    """Leave of the parameters of `model` that are not in `own` their shape and dtype only."""
    kept = {id(parameter) for parameter in own.parameters()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in kept:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
