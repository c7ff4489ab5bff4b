"""The hidden states that a model gives back: of the base's size, though n streams travel between its layers.

Shapes: B batch, S sequence, n streams, C hidden size.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from .layer import collapse_streams


def give_hidden_states_of_the_base(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a family's base model with every one of its hidden states [B, S, C].

    Between layers that is the mean of the streams: what the last layer makes of them, and after a conversion the base's
    own hidden state. Whoever stacks, pools or probes hidden states needs no change.
    """

    @wraps(forward)
    def collapsing(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("output_hidden_states")
        if not (self.config.output_hidden_states if asked is None else asked):
            return forward(self, *args, **kwargs)
        return_dict = kwargs.pop("return_dict", None)
        out = forward(self, *args, return_dict=True, **kwargs)
        out.hidden_states = tuple(_collapse(state, self.config) for state in out.hidden_states)
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    return collapsing


def _collapse(state: Tensor | None, config: Any) -> Tensor | None:
    # transformers leaves None for those that were not asked for; the first and the last are [B, S, C] already
    if state is None or state.shape[-1] != config.hc_mult * config.hidden_size:
        return state
    return collapse_streams(state, config.hc_mult)
