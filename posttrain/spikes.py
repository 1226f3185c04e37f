"""Loss spikes: which steps are not to change the weights.

In: the loss and the gradient norm of each step. Out: whether to skip it, and a stop where skipping does not help.
"""

import statistics
from collections import deque

from posttrain.errors import UserError

WINDOW = 128  # steps that a new one is held against
FIRST = 32  # steps before any is judged
PATIENCE = 16  # skipped steps on end after which it is no spike


class SpikeGuard:
    """Refuses a step whose loss or gradient norm is more than `width` standard deviations above the mean of the last
    128 steps that were taken: OLMo-core's rule (SkipStepOptimizer, with a width of 6), in the spirit of PaLM's, which
    skipped the batches around a spike (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1).

    A width of 0 refuses none. UserError after 16 refusals on end.
    """

    def __init__(self, width: float):
        self.width, self.skipped = width, 0
        self.losses, self.norms = deque(maxlen=WINDOW), deque(maxlen=WINDOW)

    def refuses(self, loss: float, norm: float) -> bool:
        """Whether to skip this step; a step that is taken is remembered."""
        if not self.width:
            return False
        high = self._stands_out(self.losses, loss) or self._stands_out(self.norms, norm)
        if not high:
            self.losses.append(loss)
            self.norms.append(norm)
        self.skipped = self.skipped + 1 if high else 0
        if self.skipped > PATIENCE:
            raise UserError(
                f"skip_spikes: {self.skipped} steps on end were skipped (loss {loss:.4g}, gradient norm {norm:.4g}; "
                f"means of the last {len(self.losses)}: {statistics.fmean(self.losses):.4g} and "
                f"{statistics.fmean(self.norms):.4g}): this is no spike. Lower learning_rate, raise skip_spikes, or "
                "look at these rows"
            )
        return high

    def _stands_out(self, seen: deque, value: float) -> bool:
        return len(seen) >= FIRST and value > statistics.fmean(seen) + self.width * statistics.stdev(seen)

    def state(self) -> dict:
        return {"losses": list(self.losses), "norms": list(self.norms), "skipped": self.skipped}

    def load_state(self, state: dict) -> None:
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])
        self.skipped = state["skipped"]
