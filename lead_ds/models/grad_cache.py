"""GradCache: the gradient of a loss over a large batch in the memory of a part of it (Gao et al., arXiv 2101.06983).

The batch's loss needs every text's vectors at once, but no activations. So the parts of a batch run forward keeping
nothing but their vectors. The loss of all of them gives each vector its gradient. Then part by part runs again, this
time with its activations, and takes its share of the gradient back. What it costs is one more forward.

Written as one graph whose parts recompute themselves (`torch.utils.checkpoint`, not re-entrant), rather than as a
second loop with a surrogate loss. DeepSpeed sees one forward and one backward per micro-batch. Every parameter's
gradient is complete when its hook fires, and so ZeRO of any stage reduces it once. Masks of dropout are drawn again
from the random state of the first pass.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lead_ds.data.tokens.passes import Tokens


def recomputed(read: Callable[[Tokens], Tensor], tokens: Tokens) -> Tensor:
    """`read(tokens)`, whose activations are not kept but made again in the backward pass."""

    def read_last(tokens: Tokens) -> Tensor:
        said = read(tokens)
        # Times one: backward asks for this saved tensor first and so recomputes before ZeRO-3 has gathered any layer for
        # backward; recomputing would let go of it again.
        return said * said.new_ones(())

    # To the end, always: stopping as soon as everything is back would leave ZeRO-3 layers gathered.
    with set_checkpoint_early_stop(False):
        return checkpoint(read_last, tokens, use_reentrant=False)
