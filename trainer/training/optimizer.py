"""Maps a recipe's optimizer to its name in transformers, and checks that it works on this machine."""

from importlib.util import find_spec

from svc.errors import RecipeError
from trainer.recipe.train import Optimizer

_NAMES = {
    Optimizer.ADAMW: "adamw_torch_fused",
    Optimizer.ADAMW_8BIT: "adamw_bnb_8bit",
    Optimizer.PAGED_ADAMW: "paged_adamw_32bit",
    Optimizer.PAGED_ADAMW_8BIT: "paged_adamw_8bit",
}


def choose_optimizer(optimizer: Optimizer, *, scaled: bool) -> str:
    """Return the name that transformers uses for an optimizer.

    Args:
        scaled: whether the loss is scaled, as in float16.
    """
    if optimizer is Optimizer.ADAMW and scaled:
        # accelerate does not notice when the fused optimizer skips a step, which happens with a scaled loss.
        return "adamw_torch"
    return _NAMES[optimizer]


def check_optimizer(optimizer: Optimizer, *, cuda: bool) -> None:
    """Raise RecipeError if an optimizer does not work on this machine.

    On a CPU, bitsandbytes 0.50 silently replaces a paged optimizer with one that is not paged.

    Raises:
        RecipeError: the optimizer requires a GPU, or a package that is not installed.
    """
    if optimizer.is_paged and not cuda:
        unpaged = Optimizer.ADAMW_8BIT if optimizer.is_8bit else Optimizer.ADAMW
        raise RecipeError(
            f"train.optimizer {optimizer} moves its state between GPU and main memory, but training runs on the CPU",
            expected=f"on a CPU, {Optimizer.ADAMW} or {Optimizer.ADAMW_8BIT}",
            todo=f"set train.optimizer to {unpaged}",
        )
    if optimizer is not Optimizer.ADAMW and find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"train.optimizer {optimizer} needs bitsandbytes, which is not installed",
            expected="the bitsandbytes package",
            todo=f"pip install bitsandbytes, or set train.optimizer to {Optimizer.ADAMW}",
        )
