"""What of training is timed: the forward of a model, its loss and the backward, as `heddle train` makes them; no optimizer."""

from __future__ import annotations

from torch import Tensor, nn

from heddle.compose.hf.encoder import HeddleForSequenceClassification
from heddle.compose.train import autocast, trained_loss


class TrainingStep:
    """A call does the work once and leaves the gradients, which `clear` takes away as an optimizer does between two steps.

    Every token is labelled, with the one behind it; with a readout every sequence, with a class. On CUDA weights are float32 and
    the forward runs in bfloat16 autocast; on a CPU all is float32.
    """

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self._model, self._ids = model.train(), ids
        if isinstance(model, HeddleForSequenceClassification):
            self._labels = ids[:, 0] % model.config.num_labels
        else:
            self._labels = ids.roll(-1, dims=1).reshape(-1)

    def __call__(self) -> None:
        with autocast(self._ids.device, "auto"):
            loss = trained_loss(self._model, self._ids, self._labels)
        loss.backward()  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """No gradient is left."""
        self._model.zero_grad(set_to_none=True)
