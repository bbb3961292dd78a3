r"""The losses that Hugging Face models compute when they are called with ``labels=``.

Each function returns a `ModelLoss`, to be given to an optimizer in the criterion's place:

| function | models | position $t$ predicts |
|---|---|---|
| `causal_lm` | ``...LMHeadModel``, ``...ForCausalLM`` | label $t + 1$ |
| `masked_lm` | ``...ForMaskedLM``, ``...ForTokenClassification``, encoder-decoders | label $t$ |
| `sequence_classification` | ``...ForSequenceClassification`` | |

Labels of −100 are ignored. ``num_items_in_batch=``, which the Trainer passes under gradient
accumulation, is the number of targets in all micro-batches: a model that heeds it divides its sum
by that number, others by their own. Both are weighted as the model has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adler._recording.model_loss import ModelLoss

__all__ = ["causal_lm", "masked_lm", "sequence_classification"]

_IGNORED = -100


class _Loss(ModelLoss):
    """Averages over the batch, or over ``num_items_in_batch`` where the model heeds it."""

    def factor(
        self, loss: Tensor, outputs: Tensor, targets: tuple[Any, ...], options: Mapping[str, Any]
    ) -> Tensor | None:
        items = options.get("num_items_in_batch")
        if items is None:
            return None
        mean = self.criterion(outputs, *targets)
        share = (targets[0] != _IGNORED).sum().to(loss) / items
        # All ignored: the mean is NaN, and the share 0.
        own = (loss - mean).abs() < (loss - share * mean).abs()
        return torch.where(own, torch.ones_like(share), share)


def causal_lm() -> ModelLoss:
    """Cross-entropy of the next token, of models that shift ``labels`` themselves.

    Examples:
        >>> from adler import AdlerAdam
        >>> from adler.integrations.transformers import causal_lm
        >>> class Bigram(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Embedding(7, 7)
        ...     def forward(self, input_ids, labels):
        ...         logits = self.table(input_ids)
        ...         loss = nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:])
        ...         return {"loss": loss, "logits": logits}
        >>> model = Bigram()
        >>> optimizer = AdlerAdam(model.parameters(), model, causal_lm())
        >>> tokens = torch.randint(7, (2, 5))
        >>> model(input_ids=tokens, labels=tokens)["loss"].backward()
        >>> optimizer.step()
    """
    return _Loss(nn.CrossEntropyLoss(), outputs=_token_logits, targets=_next_tokens)


def masked_lm() -> ModelLoss:
    """Cross-entropy of the label at the same position."""
    return _Loss(nn.CrossEntropyLoss(), outputs=_token_logits, targets=_tokens)


def sequence_classification(problem_type: str = "single_label_classification") -> ModelLoss:
    """The loss of a head over whole sequences.

    Args:
        problem_type: As in the model's config: ``"single_label_classification"``,
            ``"multi_label_classification"`` or ``"regression"``.

    Raises:
        ValueError: If it is none of these.
    """
    if problem_type not in _SEQUENCE:
        raise ValueError(
            f"problem_type={problem_type!r}: expected one of {', '.join(map(repr, _SEQUENCE))}"
        )
    criterion, outputs, targets = _SEQUENCE[problem_type]
    return _Loss(criterion(), outputs=outputs, targets=targets)


# Module-level functions, so that an optimizer can be pickled.


def _logits(result: Any) -> Tensor:
    logits: Tensor = result["logits"]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))  # as the models do


def _token_logits(result: Any) -> Tensor:
    return _logits(result).flatten(0, -2)


def _squeezed_logits(result: Any) -> Tensor:
    logits: Tensor = result["logits"]
    return logits.squeeze()


def _plain_logits(result: Any) -> Tensor:
    logits: Tensor = result["logits"]
    return logits


def _labels(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
    if labels is None:
        raise TypeError("labels: the model was called without: pass them by name, labels=...")
    return labels


def _tokens(*args: Any, **kwargs: Any) -> Tensor:
    return _labels(*args, **kwargs).flatten()


def _next_tokens(*args: Any, **kwargs: Any) -> Tensor:
    shifted: Tensor | None = kwargs.get("shift_labels")
    if shifted is None:
        shifted = nn.functional.pad(_labels(*args, **kwargs), (0, 1), value=_IGNORED)[..., 1:]
    return shifted.flatten()


def _squeezed_labels(*args: Any, **kwargs: Any) -> Tensor:
    return _labels(*args, **kwargs).squeeze()


_SEQUENCE: dict[str, tuple[type[nn.Module], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "single_label_classification": (nn.CrossEntropyLoss, _plain_logits, _tokens),
    "multi_label_classification": (nn.BCEWithLogitsLoss, _plain_logits, _labels),
    "regression": (nn.MSELoss, _squeezed_logits, _squeezed_labels),
}
