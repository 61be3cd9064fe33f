"""Criteria that `torch.nn` does not have in the form that people need them."""

from torch import Tensor, nn

from gaccum_exp.errors import BadInputError


class TokenCrossEntropy(nn.CrossEntropyLoss):
    """Cross entropy over tokens, with the classes in the last dimension, as language models have them.

    `nn.CrossEntropyLoss` wants them in the second, (batch, classes, length). Which of the two a tensor
    has cannot be told from its shape where length and vocabulary happen to be equal, so it is said by
    the choice of criterion. All arguments are those of `nn.CrossEntropyLoss`; its mean divides by the
    labels that are not `ignore_index` (-100).
    """

    class_dim = -1
    """Where the classes are in the model's output."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits (..., classes) for integer labels (...).

        Raises:
            BadInputError: shapes that do not fit, or labels that are no integers.
        """
        if logits.shape[:-1] != labels.shape or labels.is_floating_point():
            raise BadInputError(
                f"criterion {type(self).__name__} takes logits (..., classes) and integer labels (...); "
                f"the model puts out {tuple(logits.shape)}, the labels are {tuple(labels.shape)} "
                f"{str(labels.dtype).removeprefix('torch.')}"
            )
        loss = super().forward(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        return loss.view(labels.shape) if self.reduction == "none" else loss
