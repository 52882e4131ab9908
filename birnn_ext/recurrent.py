"""`Recurrent`, the base of our modules: a drop-in for one of PyTorch's recurrent modules, on our operators."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from birnn_ext import portable
from birnn_ext._torch_private import within_torch_func
from birnn_ext.arguments import Call, Elsewhere, States, arranged, autocast_dtype
from birnn_ext.base import Base
from birnn_ext.layer import LayerWeights, Options, Results, Sequences, State, Variant, run_last, run_layer
from birnn_ext.route import Way, choose_route

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # the last two with bias only


class Recurrent(Base):
    """What our modules share.

    In place of PyTorch's flattened weights they read the parameters as they are at each call. A class derived from this
    has PyTorch's module as a further base, after this one, and a forward with arguments of its own.
    """

    def __init__(self, *sizes: Any, options: dict[str, Any], **kwargs: Any) -> None:
        """Makes PyTorch's module, with options of `Cell.options`, and the parameters that these ask for."""
        super().__init__(*sizes, **kwargs)
        device, dtype = kwargs["device"], kwargs["dtype"]
        for name, value in options.items():
            setattr(self, name, value)
        for name, size in self._own_parameters():
            self.register_parameter(name, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
        self._reset_own_parameters()

    def _own_parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names the parameters that PyTorch's module does not have, with their sizes."""
        if self.learned_state:
            rows = self.num_layers * (2 if self.bidirectional else 1)
            for name in self.CELL.states:
                yield name, (rows, (self.proj_size or self.hidden_size) if name == "h_0" else self.hidden_size)

    def reset_parameters(self) -> None:
        """Initialises PyTorch's parameters as PyTorch does, and the others with the values that change nothing."""
        super().reset_parameters()
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        if self.learned_state:  # else these names may be a subclass's own
            for name in self.CELL.states:
                nn.init.zeros_(getattr(self, name))

    def _weight_kinds(self) -> tuple[str, ...]:
        """Names the kinds of parameters of a layer's direction, in PyTorch's order."""
        return _WEIGHTS if self.bias else _WEIGHTS[:2]

    def _weight_names(self, layer: int, d: int) -> list[str]:
        """Names the parameters of one layer and direction, in the order of their kinds."""
        names: list[str] = self._all_weights[layer * (2 if self.bidirectional else 1) + d]
        return names

    def extra_repr(self) -> str:
        """Describes the module as PyTorch does, with our options that are not at their defaults."""
        default = self.CELL.options.items()
        ours = [f"{name}={getattr(self, name)}" for name, value in default if getattr(self, name) != value]
        return ", ".join([super().extra_repr(), *ours])

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flattened copy of the weights. Kept for code that calls it on PyTorch's module."""

    def _slow_forward(self, *input: Any, **kwargs: Any) -> Any:
        """Calls forward within a trace, where PyTorch calls this method.

        torch.onnx.export(dynamo=False) adds the defaults of the arguments of the model itself by position, those of
        keyword-only ones, too.
        """
        parameters = inspect.signature(self.forward).parameters.values()
        names = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
        others = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        beyond = input[len(others) :]
        if torch.onnx.is_in_onnx_export() and len(beyond) == len(names):
            input, kwargs = input[: len(others)], {**kwargs, **dict(zip(names, beyond, strict=True))}
        return super()._slow_forward(*input, **kwargs)  # type: ignore[no-untyped-call]

    def __prepare_scriptable__(self) -> nn.RNNBase:
        """Returns what torch.jit.script compiles in place of this module."""
        name = self.CELL.name
        ours: Any = next(cls for cls in type(self).__mro__ if "CELL" in vars(cls))
        if type(self).forward is not ours.forward:
            raise NotImplementedError(
                f"{name}: torch.jit.script would leave out the forward of {type(self).__name__}; trace it instead"
            )
        warnings.warn(
            f"torch.jit.script compiles an nn.{name} of the same parameters in place of a birnn_ext.{name}, and leaves "
            "it in the model that held ours; birnn_ext.accelerate(model) brings ours back",
            stacklevel=2,
        )
        return portable.scriptable(self)

    def _run(self, call: Call) -> tuple[Tensor, States | None, Tensor | None]:
        """Runs all layers: returns y (T, B, D * P) or, with output="last", (B, D * P), the final states, and cells."""
        x, states = call.sequences.x, call.states or (None,) * len(self.CELL.states)
        dtype = autocast_dtype(x)
        if dtype is None:
            return self._run_layers(call, call.sequences, states)
        sequences = call.sequences._replace(x=x.to(dtype))
        y, final, cells = self._run_layers(call, sequences, tuple(None if s is None else s.to(dtype) for s in states))
        if x.is_cpu and not self.CELL.cpu_autocast:
            wider = torch.promote_types(dtype, (x if states[0] is None else states[0]).dtype)
            y, final = y.to(wider), None if final is None else tuple(s.to(wider) for s in final)
        return y, final, cells

    def _run_layers(
        self, call: Call, sequences: Sequences, states: State
    ) -> tuple[Tensor, States | None, Tensor | None]:
        """Does so with sequences and states that have the type to compute in."""
        cell = self.CELL
        if not self._needs_python_between(call):
            weights = self._weights(self._flat_weights_names)
            route = choose_route(sequences.x, (*weights, *states), recompute=self.recompute)
            if route.way is Way.LAYER:
                y, *final = cell.stack(
                    sequences.x, weights, self.bias, *states, sequences.lengths, self.num_layers, call.last,
                    self.recompute,
                )  # fmt: skip
                return y, None if call.last and self.bidirectional else tuple(final), None
        directions = 2 if self.bidirectional else 1
        recorded = self if call.recorded else None
        finals, cells = [], None
        for layer in range(self.num_layers):
            last_layer = layer == self.num_layers - 1
            given = tuple(None if s is None else s.unflatten(0, (-1, directions))[layer] for s in states)
            options = Options(call.cells and last_layer, self.recompute, recorded)
            y, of_layer, cells = self._layer(layer, call.last and last_layer, sequences, given, options)
            if self.dropout > 0 and not last_layer:
                y = F.dropout(y, self.dropout, self.training)
            finals.append(of_layer)
            sequences = Sequences(y, sequences.lengths, sequences.reset)
        if call.last and self.bidirectional:
            return y, None, None
        if not (call.last or call.recorded) and (y.requires_grad or within_torch_func()):
            y = y.clone()  # the layer keeps its y for the backward pass, and users may change theirs in place
        if cells is not None:
            cells = cells.flatten(2).to(y.dtype, copy=cells.requires_grad)  # likewise
        return y, tuple(torch.cat(each) for each in zip(*finals, strict=True)), cells

    def _layer(self, layer: int, last: bool, sequences: Sequences, state: State, options: Options) -> Results:
        """Runs one layer: returns y (T, B, D * P) or, if last, (B, D * P), its final states, and the cells."""
        variant = self._variant(sequences.x, sequences.reset, options.cells)
        weights = self._layer_weights(layer, sequences.x.dtype)
        if last:
            return *run_last(self.CELL, sequences, weights, state, variant, options), None
        y, final, cells = run_layer(self.CELL, sequences, weights, state, variant, options)
        return y.flatten(2), final, cells

    def _needs_python_between(self, call: Call) -> bool:
        """Tells whether there is something to do between layers, or in one of them, that a stack's operator can't."""
        drops = self.training and self.dropout > 0 and self.num_layers > 1
        return drops or call.cells or call.recorded or call.sequences.reset is not None

    def _variant(self, x: Tensor, reset: Tensor | None, want_cells: bool) -> Variant | None:
        """Returns what a layer with input x (T, B, .) does beyond PyTorch's; None for nothing."""
        return None

    def _weights(self, names: Sequence[str]) -> list[Tensor]:
        """Reads parameters as they are now, which must all be of one dtype and on one device."""
        # nn.Module finds parameters here, too, but takes a microsecond for each.
        parameters: dict[str, Any] = self._parameters
        weights: list[Tensor] = [parameters[name] if name in parameters else getattr(self, name) for name in names]
        first = self.weight_ih_l0
        own, device = first.dtype, first.device
        for name, w in zip(names, weights, strict=True):
            if w.dtype != own or w.device != device:
                where = f"{own} on {device} as weight_ih_l0"
                raise ValueError(f"{self.CELL.name}: {name} must be {where}, got {w.dtype} on {w.device}")
        return weights

    def _layer_weights(self, layer: int, dtype: torch.dtype) -> LayerWeights:
        """Reads a layer's parameters, and casts them to x's dtype where autocast has cast x."""
        weights = self._weights(
            [name for d in range(2 if self.bidirectional else 1) for name in self._weight_names(layer, d)]
        )
        if weights[0].dtype != dtype:
            weights = [w.to(dtype) for w in weights]
        return LayerWeights(weights, self._weight_kinds())


def run_call(module: Recurrent, call: Call | Elsewhere) -> tuple[Any, ...]:
    """Runs a call whose arguments are read, and arranges its results as forward returns them."""
    if isinstance(call, Elsewhere):
        result: tuple[Any, ...] = call.result
        return result
    return arranged(module, call, *module._run(call))
