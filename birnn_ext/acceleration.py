"""`accelerate` makes a model's `torch.nn.LSTM` modules ours, whoever wrote the model; `restore` undoes it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from birnn_ext.modules import LSTM
from birnn_ext.portable import beyond_nn_lstm, nn_lstm_state


@dataclass
class Acceleration:
    """What `accelerate` did; printing it gives a line for each module.

    Attributes:
        replaced: names of the modules that are ours now, as in ``model.named_modules()``; "" is the model itself.
        left: names of the nn.LSTM modules that are as they were, and why.
    """

    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {name or '(the model itself)'}" for name in self.replaced]
        lines += [f"left {name or '(the model itself)'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "found no nn.LSTM"


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def accelerate(model: nn.Module) -> Acceleration:
    """Turns every `torch.nn.LSTM` in a model into a `birnn_ext.LSTM`, in place.

    The modules stay the same objects, with the same Parameters, buffers, hooks and state_dict keys: only their class
    changes. So modules that are shared or that other code refers to, optimizers and checkpoints are not disturbed.
    Subclasses are left alone, as their own code may rely on what nn.LSTM does.

    Args:
        model: any module, which may itself be an nn.LSTM.

    Returns:
        Which modules were replaced, and which were left and why; printing it gives a line for each. A module that the
        model holds under several names is named once.

    Raises:
        TypeError: model is not a module.
    """
    _check_model(model)
    report = Acceleration()
    for name, module in model.named_modules():
        if not isinstance(module, nn.LSTM) or isinstance(module, LSTM):
            continue
        if type(module) is not nn.LSTM:
            report.left[name] = f"its class {type(module).__name__} is a subclass of nn.LSTM"
        elif "forward" in vars(module):
            report.left[name] = "its forward has been replaced, by a hook of another library perhaps"
        else:
            module.__class__ = LSTM
            cast(LSTM, module)._drop_flat_weights()
            module.accelerated = True
            report.replaced.append(name)
    return report


def restore(model: nn.Module) -> list[str]:
    """Turns every `birnn_ext.LSTM` in a model into a `torch.nn.LSTM`, in place.

    What `accelerate` has turned is as it was before, and a model that was written with ours becomes one for tools that
    know nn.LSTM by its type, such as quantization. As with `accelerate` the modules stay the same objects. A model that
    calls them with what nn.LSTM has no argument for, ``lengths`` or ``output="last"``, no longer runs; `BiRNN` does.

    Args:
        model: any module, which may itself be one of ours.

    Returns:
        The names of the modules that were turned. A warning names those that can't be: their class has been changed
        since, by a parametrization for instance, or they have an option that nn.LSTM lacks, such as zoneout.

    Raises:
        TypeError: model is not a module.
    """
    _check_model(model)
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, LSTM):
            continue
        no = beyond_nn_lstm(module)
        if type(module) is not LSTM or no:
            why = (
                f"nn.LSTM has no {', '.join(no)}"
                if no
                else f"something has changed its class to {type(module).__name__} since; undo that first "
                "(parametrizations: remove them)"
            )
            warnings.warn(f"birnn_ext.restore: {name or 'the model itself'} is left, as {why}", stacklevel=2)
        else:
            module.__dict__ = nn_lstm_state(module)
            module.__class__ = nn.LSTM  # type: ignore[assignment]  # mypy does not see that the class may change
            module._init_flat_weights()
            names.append(name)
    return names
