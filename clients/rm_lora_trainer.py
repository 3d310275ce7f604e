"""RM-LoRA with the Trainer of transformers: the method of `fedkit.clients.rm_lora` in the Trainer's loop.

``RMLoraTrainer(model, arguments, ..., rm_lora=config)`` is a Trainer. For another Trainer, such as TRL's, put the
mixin first: ``class Mine(RMLoraTrainerMixin, SFTTrainer)``.

However many batches make up an optimizer step, the penalty's gradient is added once, after the last batch and
before clipping, and the mask is drawn once, after clipping. The masks of a step depend only on ``args.seed`` and
the step's number, so that they are the same after a run is resumed, and in all processes of a distributed run.

Deviations from the released code
---------------------------------
Those of `fedkit.clients.rm_lora`, except that the optimizer and its weight decay are the Trainer's. The loss that
is logged is that of the task alone. Does not work with DeepSpeed and FSDP, which keep the factors in shards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fedkit.row_masks import RowDraw

from .broken_torchvision import naming_torchvision
from .masked_step import MaskedStep
from .orthogonality import Orthogonality, effective_rank
from .rm_lora import RMLoraConfig

with naming_torchvision():
    from transformers import Trainer, TrainerCallback

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class RMLoraCallback(TrainerCallback):
    """Masks each optimizer step of any Trainer; for the penalty, use `RMLoraTrainerMixin`.

    Parameters
    ----------
    config : RMLoraConfig
        Settings of RM-LoRA.
    rows : RowDraw, optional
        The components that the server wants trained: `fedkit.message.rows_of`.
    """

    def __init__(self, config: RMLoraConfig, rows: RowDraw | None = None) -> None:
        self.config, self.rows = config, rows
        self.penalty: Orthogonality | None = None  # of the model that is trained, for the mixin
        self._masked: MaskedStep | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Find the factors of the model, which `model_init` may have built anew for this training."""
        self.penalty = self.config.regularizer(more["model"])
        self._masked = self.config.masked_step(more["model"], args.seed, self.rows)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Mask the gradients of this step, after accumulation and clipping."""
        if self._masked:
            self._masked.before(state.global_step, more["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Restore the inactive components, if they are held back whole."""
        if self._masked:
            self._masked.after(more["optimizer"])


class RMLoraTrainerMixin(_Base):
    """Adds the penalty and the mask to a Trainer; `rm_lora` and `rows` as in `RMLoraCallback`."""

    def __init__(self, *args: Any, rm_lora: RMLoraConfig, rows: RowDraw | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rm_lora = rm_lora
        self._rm_lora = RMLoraCallback(rm_lora, rows)
        self.add_callback(self._rm_lora)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the task's loss; after the last batch of a step, also add the penalty's gradient."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        penalty = self._rm_lora.penalty
        if penalty and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler  # scales losses in float16, and so gradients
            scale = 1.0 if scaler is None else scaler.get_scale()
            penalty.add_gradient(self.rm_lora.orth_reg_weight * scale)
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and return the Trainer's output with "effective-rank" among its metrics."""
        output = super().train(*args, **kwargs)
        if self.model is not None:
            output.metrics["effective-rank"] = effective_rank(self.model)
        return output


class RMLoraTrainer(RMLoraTrainerMixin, Trainer):
    """The Trainer of transformers, with RM-LoRA."""
