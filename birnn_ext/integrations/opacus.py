"""Gives Opacus per-sample gradients of our modules, for differentially private training. Importing both is enough.

Opacus's hooks see a layer's positional tensors and the gradient of its first output. A recurrent module also has
initial states, lengths and final states, and without them Opacus would silently clip wrong gradients. So this module
takes part in each call of one: all that the call returns passes through an identity, whose backward pass gets the
gradients of all results at once. Then ``torch.func.vmap(torch.func.grad(...))`` runs all samples in the kernels, and
Opacus gets the result.

All arguments of our modules work, PackedSequences included, except dropout between layers,
recurrent dropout and zoneout, whose masks can't be drawn a second time. ModuleValidator reports these.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from birnn_ext.acceleration import OURS
from birnn_ext.arguments import hx_of
from birnn_ext.recurrent import Recurrent


def why_not(module: Recurrent) -> str | None:
    """Returns why a module can't have per-sample gradients; None if it can."""
    name, options = module.CELL.name, module.CELL.options
    if not any(type(module).forward is ours.forward for ours in OURS.values()):
        return (
            f"birnn_ext.{name}: {type(module).__name__} has a forward of its own, whose samples Opacus can't tell apart"
        )
    masks = [option for option in ("recurrent_dropout", "zoneout") if option in options]
    between = module.dropout and module.num_layers > 1
    if between or any(getattr(module, option) != options[option] for option in masks):
        named = " and ".join(", ".join(["dropout", *masks]).rsplit(", ", 1))
        return (
            f"birnn_ext.{name}: {named} must be 0 with Opacus, which computes the samples' gradients in a second pass, "
            f"with other masks; put nn.Dropout between {name}s of one layer each"
        )
    return None


class _Outputs(torch.autograd.Function):
    """The identity on all results of a call. Its backward pass hands over the gradients of all of them."""

    @staticmethod
    def forward(ctx: Any, take: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.take = take
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.take(*gradients)
        return None, *gradients


def _watch(hooks: Any, module: Recurrent, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """A forward hook that makes Opacus count the call, and asks for the gradients of all its results."""
    x, hx, options = _padded_arguments(module, *args, **kwargs)
    batch = 0 if module.batch_first else 1

    calls = len(getattr(module, "activations", ()))
    hooks.capture_activations_hook(module, (x.movedim(batch, 0 if hooks.batch_first else 1),), result)
    if len(getattr(module, "activations", ())) == calls:
        return None  # this is evaluation, or our own second pass

    device = x.device.type
    autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), False)
    states = module.CELL.states
    given = {"x": x, **({} if hx is None else dict(zip(states, _tuple(hx), strict=True))), **options}
    inputs = {name: t.detach() for name, t in given.items() if isinstance(t, Tensor)}
    options = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
    outputs = _outputs(module, result)
    # the dimension in which each has its samples
    input_dims = {name: {"x": batch, "reset": batch, "lengths": 0}.get(name, 1) for name in inputs}
    output_dims = {name: batch if name in ("y", "cells") else 1 for name in outputs}
    if options.get("output") == "last":
        output_dims["y"] = 0

    def loss(parameters: dict[str, Tensor], inputs: dict[str, Tensor], cotangents: dict[str, Tensor]) -> Tensor:
        """Returns a scalar of one sample that has the same gradients as the loss."""
        given: dict[str, Any] = {name: t.unsqueeze(input_dims[name]) for name, t in inputs.items()}
        first = tuple(given.pop(name) for name in states) if "h_0" in given else None
        called = functional_call(module, parameters, (given.pop("x"), hx_of(first)), {**options, **given})
        found = _outputs(module, called)
        products = [(found[name] * g.unsqueeze(output_dims[name])).sum() for name, g in cotangents.items()]
        return torch.stack(products).sum()

    def take(*gradients: Tensor) -> None:
        """Computes the samples' gradients from those of the outputs, and hands them to Opacus."""
        if not hooks.hooks_enabled:
            return  # this is ghost clipping's second backward pass
        cotangents = {
            name: _padded(t._replace(data=g), module) if isinstance(t, PackedSequence) else g
            for (name, t), g in zip(outputs.items(), gradients, strict=True)
        }
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        detached = {name: p.detach() for name, p in parameters.items()}
        functorch = hooks.force_functorch
        hooks.hooks_enabled = hooks.force_functorch = False
        try:
            with autocast:
                samples = vmap(grad(loss), in_dims=(None, input_dims, output_dims))(detached, inputs, cotangents)
            scale = x.shape[batch] if hooks.loss_reduction == "mean" else 1
            module._grad_samples = {p: samples[name] * scale for name, p in parameters.items()}
            hooks.hooks_enabled = True
            hooks.capture_backprops_hook(module, None, (x,), hooks.loss_reduction, hooks.batch_first)
        finally:
            hooks.hooks_enabled, hooks.force_functorch = True, functorch

    data = _Outputs.apply(take, *(t.data if isinstance(t, PackedSequence) else t for t in outputs.values()))
    for (name, t), passed in zip(list(outputs.items()), data, strict=True):
        outputs[name] = t._replace(data=passed) if isinstance(t, PackedSequence) else passed
    final = hx_of(tuple(outputs[f"{name[0]}_n"] for name in states) if "h_n" in outputs else None)
    return (outputs["y"], final, outputs["cells"]) if "cells" in outputs else (outputs["y"], final)


def _tuple(hx: Any) -> tuple[Tensor, ...]:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _padded_arguments(
    module: Recurrent, input: Any, hx: Any = None, **options: Any
) -> tuple[Tensor, Any, dict[str, Any]]:
    """Separates a call's arguments as the module's forward does, and pads a PackedSequence."""
    x = input
    if isinstance(input, PackedSequence):  # only a padded batch separates the samples
        x, options["lengths"] = (t.to(input.data.device) for t in pad_packed_sequence(input, module.batch_first))
        if options.get("reset") is not None:
            options["reset"] = _padded(options["reset"], module)
    if x.dim() != 3:
        raise ValueError(f"birnn_ext.{module.CELL.name}: with Opacus input must be batched, 3-D, got {x.dim()}-D")
    return x, hx, options


def _outputs(module: Recurrent, result: Any) -> dict[str, Any]:
    """Returns the results of a module's forward, by name."""
    y, hx, *cells = result
    named = {"y": y}
    if hx is not None:
        named.update((f"{name[0]}_n", state) for name, state in zip(module.CELL.states, _tuple(hx), strict=True))
    return {**named, **({"cells": cells[0]} if cells else {})}


def _padded(packed: PackedSequence, module: Recurrent) -> Tensor:
    return pad_packed_sequence(packed, module.batch_first)[0]


def grad_sampler(module: Recurrent, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Returns a call's per-sample gradients, which are computed already. Opacus calls this."""
    samples: dict[nn.Parameter, Tensor] = vars(module).pop("_grad_samples")
    return samples


def register(grad_sample_module: ModuleType) -> None:
    """Adds our modules to Opacus's module ``opacus.grad_sample.grad_sample_module``."""
    of = getattr(grad_sample_module, "GradSampleHooks", grad_sample_module.GradSampleModule)
    theirs = of.iterate_submodules

    def iterate_submodules(hooks: Any, module: nn.Module) -> Iterator[nn.Module]:
        """Yields the modules that Opacus hooks."""
        if not isinstance(module, Recurrent):
            yield from theirs(hooks, module)
        elif any(p.requires_grad for p in module.parameters()):
            why = why_not(module)
            if why:
                raise NotImplementedError(why)
            hooks.GRAD_SAMPLERS[type(module)] = grad_sampler
            handle = module.register_forward_hook(partial(_watch, hooks), with_kwargs=True)
            hooks._module.autograd_grad_sample_hooks.append(handle)

    of.iterate_submodules = iterate_submodules
    of.GRAD_SAMPLERS.update(dict.fromkeys(OURS.values(), grad_sampler))


def register_validator(module_validator: ModuleType) -> None:
    """Adds our check to ``opacus.validators.module_validator``."""

    def validate(module: Recurrent) -> list[Exception]:
        why = why_not(module)
        return [module_validator.UnsupportedModuleError(why)] if why else []

    module_validator.ModuleValidator.VALIDATORS.update(dict.fromkeys(OURS.values(), validate))
