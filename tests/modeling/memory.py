"""What a forward keeps for backward, as the allocator sees it."""

from torch.profiler import ProfilerActivity, profile


def allocated_bytes(model, token_ids):
    """Bytes that forward has allocated and not freed when the loss is there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = model(token_ids, labels=token_ids, use_cache=False).loss
    del loss
    return sum(event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
