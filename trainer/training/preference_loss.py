"""Computes the losses of preference tuning from the log-probabilities of answers. There is one loss per comparison, in
nats. Imports torch.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.recipe.preference import DpoLoss, Preference

_LARGEST_LOGPROB = -1e-6  # per token, in nats: an answer's odds are infinite if it is certain


def dpo_losses(chosen: Tensor, rejected: Tensor, tokens: tuple[Tensor, Tensor], preference: Preference) -> Tensor:
    """Return DPO's loss for each pair.

    Args:
        chosen, rejected: log of the ratio of each answer's probability to its probability under the model before
            training, of shape [pairs].
        tokens: number of tokens in each chosen and in each rejected answer.
    """
    beta, wrong = preference.beta, preference.label_smoothing
    difference = beta * (chosen - rejected)
    match preference.loss:
        case DpoLoss.SIGMOID:
            return -logsigmoid(difference)
        case DpoLoss.ROBUST:
            return (wrong * logsigmoid(-difference) - (1 - wrong) * logsigmoid(difference)) / (1 - 2 * wrong)
        case DpoLoss.IPO:  # per token, as its authors confirmed to TRL
            return (chosen / tokens[0] - rejected / tokens[1] - 1 / (2 * beta)) ** 2


def orpo_losses(chosen: Tensor, rejected: Tensor, preference: Preference) -> Tensor:
    """Return ORPO's loss for each pair: the chosen answer's negative log-likelihood plus `beta` times the odds ratio
    loss (Hong et al. 2024, eq. 6 and 7).

    Args:
        chosen, rejected: mean log-probability of each answer's tokens, of shape [pairs].
    """
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - preference.beta * logsigmoid(log_odds)


def _log_odds(logprob: Tensor) -> Tensor:
    """Return log(p / (1 - p)) for p = exp(logprob)."""
    logprob = logprob.clamp(max=_LARGEST_LOGPROB)
    return logprob - torch.log(-torch.expm1(logprob))


def kto_losses(answers: Tensor, shift: Tensor, desirable: Tensor, preference: Preference) -> Tensor:
    """Return KTO's loss for each answer (Ethayarajh et al. 2024, eq. 8).

    Args:
        answers: tensor of shape [answers], with log(p / p0) for each answer. p is the answer's probability under the
            model, and p0 its probability under the model before training.
        shift: mean log ratio of mismatched answers (answers to other prompts), without gradient. If positive, it
            measures how far the model as a whole has shifted, and is subtracted from each log ratio.
        desirable: boolean label of each answer, true if the answer is desirable.
    """
    distance = preference.beta * (answers - shift.clamp(min=0))
    wanted = preference.desirable_weight * (1 - torch.sigmoid(distance))
    unwanted = preference.undesirable_weight * (1 - torch.sigmoid(-distance))
    return torch.where(desirable, wanted, unwanted)
