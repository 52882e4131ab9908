"""`export` writes a model as an ONNX file, with our modules as ONNX's own operators, which every ONNX runtime has.

`torch.onnx.export(..., dynamo=True)` does so as well; `export` is that with batch and time dynamic.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from birnn_ext.modules import BiRNN
from birnn_ext.portable import NotInOnnx, check_onnx
from birnn_ext.recurrent import Recurrent

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    **options: Any,
) -> ONNXProgram:
    """Writes a model, in evaluation mode, as an ONNX file.

    Each layer of a `birnn_ext.LSTM` becomes one LSTM operator of the ONNX standard, one of a `GRU` or `RNN` the
    operator of that name, and `lengths` its sequence_lens; for ``output="last"`` the last layer becomes two, of one
    direction each. In the file, as in PyTorch, lengths are int64 and states are (D * num_layers, B, H). bfloat16 layers
    compute in float32, as the operators have no bfloat16.

    PyTorch's own modules are not translated so; `birnn_ext.accelerate` makes them ours.

    Args:
        model: a `birnn_ext.LSTM`, `GRU`, `RNN` or `BiRNN`, or any module that contains them.
        path: of the file to write.
        args: example arguments of the model, tensors or nested tuples of them. None makes up an input for one of ours.
        kwargs: further ones, by name.
        dynamic_shapes: as in `torch.onnx.export`. None leaves every dimension of every tensor dynamic that the model
            does not fix; dimensions that may vary should not be 1 in the examples.
        input_names: as in `torch.onnx.export`.
        output_names: likewise; an LSTM's are output, h_n and c_n if none are given, others' output and h_n.
        options: further arguments of `torch.onnx.export`, such as opset_version.

    Returns:
        What `torch.onnx.export` does.

    Raises:
        ImportError: onnx or onnxscript is missing; ``pip install 'birnn_ext[onnx]'``.
        NotImplementedError: a module has proj_size, zoneout or layer_norm, or is asked for reset or return_cell_states,
            by the model, too, for which ONNX's operator has nothing.
        TypeError: a recurrent module is float64, for which ONNX Runtime has none; or args are missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"birnn_ext.onnx.export needs {' and '.join(missing)}: pip install 'birnn_ext[onnx]'")
    import onnxscript.optimizer

    kwargs = dict(kwargs or {})
    modes = {module: module.training for module in model.modules()}
    if args is None:
        args = _example(model)
    if output_names is None and isinstance(model, Recurrent):
        none = kwargs.get("output") == "last" and model.bidirectional
        output_names = ["output", *([] if none else [f"{name[0]}_n" for name in model.CELL.states])]
    model.eval()
    try:
        _check_model(model, kwargs)
        with torch.no_grad():
            program: Any = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=_all_dynamic(model, args, kwargs) if dynamic_shapes is None else dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                **{"verbose": False, **options},
            )
    except torch.onnx.OnnxExporterError as error:
        if isinstance(error.__cause__, NotInOnnx):
            raise error.__cause__ from None
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
    # This makes constants of the weights in ONNX's order, whatever their size.
    onnxscript.optimizer.optimize_ir(program.model, input_size_limit=2**62, output_size_limit=2**62)
    _name_fixed_sizes(program)
    program.save(path)
    written: ONNXProgram = program
    return written


def _check_model(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raises an error for what ONNX's operator can't express, or ONNX Runtime can't run, before the long export."""
    for module in model.modules():
        if not isinstance(module, Recurrent):
            continue
        if module.weight_ih_l0.dtype == torch.float64:
            name = module.CELL.name
            raise TypeError(f"birnn_ext.onnx.export: ONNX Runtime has no {name} in float64; export model.float()")
        of_call = kwargs if module is model else {}
        check_onnx(module, of_call.get("reset"), bool(of_call.get("return_cell_states")))


def _name_fixed_sizes(program: Any) -> None:
    """Writes the sizes that the model turned out to fix as numbers, in the file's description of its inputs."""
    ranges = program.exported_program.range_constraints.items()
    fixed = {str(symbol): int(sizes.lower) for symbol, sizes in ranges if sizes.lower == sizes.upper}
    for value in program.model.graph.inputs:
        for d, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value in fixed:
                value.shape[d] = fixed[size.value]


def _example(model: nn.Module) -> tuple[Tensor]:
    rnn = getattr(model, model.cell) if isinstance(model, BiRNN) else model
    if not isinstance(rnn, Recurrent):
        raise TypeError(f"birnn_ext.onnx.export: args must be example arguments of {type(model).__name__}, got None")
    weight = rnn.weight_ih_l0
    return (torch.zeros(2, 3, rnn.input_size, dtype=weight.dtype, device=weight.device),)


def _all_dynamic(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Makes dynamic shapes with which torch.export finds out itself which dimensions the model fixes."""

    def dynamic(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            if 1 in value.shape:
                warnings.warn(
                    f"birnn_ext.onnx.export: {name} has a dimension of size 1 in the example, {tuple(value.shape)}, "
                    "which the file may keep; use an example of size 2 or more for batch and time, or dynamic_shapes",
                    stacklevel=4,
                )
            return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO)
        if isinstance(value, (tuple, list)):
            return type(value)(dynamic(name, v) for v in value)
        return None

    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return {name: dynamic(name, value) for name, value in bound.arguments.items()}
