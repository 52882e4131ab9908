"""Modules: `LSTM`, a drop-in for `torch.nn.LSTM`, and `BiRNN`, the tutorial's classifier on top of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from birnn_ext import portable
from birnn_ext._torch_private import let_dynamo_trace, within_torch_func
from birnn_ext.arguments import Call, Elsewhere, State, arranged, autocast_dtype, check_probability, read_call
from birnn_ext.flat_weights import WithoutFlatWeights
from birnn_ext.layer import LayerWeights, Options, Results, Sequences, Variant, run_last, run_layer
from birnn_ext.layer import State as LayerState
from birnn_ext.route import Way, choose_route
from birnn_ext.signatures import with_overloads

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # the last two with bias only
_LAYER_NORM = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")  # the last one with bias only


def _kept(x: Tensor, p: float, *shape: int) -> Tensor:
    """Draws a mask on x's device that is False with probability p. It does so out of place, as torch.func.vmap asks."""
    return torch.rand(shape, device=x.device) >= p


class LSTM(WithoutFlatWeights):
    """A drop-in for `torch.nn.LSTM`: same arguments, parameters, initialisation, state_dict and results.

    Its time steps run in birnn_ext's fused kernels. In place of nn.LSTM's flattened weights it reads the parameters as
    they are at each call, so pruning, parametrizations, sharing and swapping of weights just work.

    The method: S. Hochreiter, J. Schmidhuber, "Long Short-Term Memory", 1997, with the forget gates of F. A. Gers et
    al., "Learning to Forget", 2000; in both directions, M. Schuster, K. K. Paliwal, "Bidirectional Recurrent Neural
    Networks", 1997.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units per direction.
        num_layers: stacked layers; layer k > 0 reads the outputs of layer k-1.
        bias: whether layers have b_ih and b_hh.
        batch_first: input and output are (B, T, .) instead of (T, B, .). States are not affected.
        dropout: probability with which outputs of all layers but the last are zeroed in training mode.
        bidirectional: D = 2 directions instead of 1.
        proj_size: P, if it is not 0, is the size of h: h_t = W_hr (o tanh(c_t)) (Sak et al., arXiv:1402.1128). It must
            be smaller than hidden_size. In what follows, P is hidden_size where there is no projection.
        device: of the parameters.
        dtype: of the parameters; float64, float32, float16 or bfloat16.
        recompute: keep only inputs, outputs and cell states for the backward pass, and compute the gates anew there:
            less memory, more time. Where a layer is not one operator (CUDA, what follows here) it keeps its input
            alone, and runs again in the backward pass. After T. Chen et al., "Training Deep Nets with Sublinear
            Memory Cost", 2016.
        recurrent_dropout: probability with which, in training mode, values of h are dropped on their way to the next
            step, scaled as by nn.Dropout; the same ones in all steps of a sequence (Gal & Ghahramani,
            arXiv:1512.05287).
        zoneout: probabilities with which values of h and of c stay as they were in the step before, or one for both;
            in each step anew. In evaluation mode the mean over all that might happen is taken (Krueger et al.,
            arXiv:1606.01305).
        layer_norm: normalise W_ih x, W_hh h, and c on its way to the output, over all their values (Ba et al.,
            arXiv:1607.06450, equations 20 to 22; eps 1e-5). Adds parameters: factors ``weight_ln_ih_l{k}``,
            ``weight_ln_hh_l{k}`` (4H) and ``weight_ln_c_l{k}`` (H), and with bias ``bias_ln_c_l{k}`` (H), each with
            ``_reverse`` for the other direction; the gates' biases stay b_ih + b_hh.
        learned_state: parameters ``h_0`` (D * num_layers, P) and ``c_0`` (D * num_layers, H), zeros at first, are the
            initial state of every sequence where forward is given none.

    Raises:
        ValueError, TypeError: as `torch.nn.LSTM`; a probability is not one.
    """

    # Modules that were pickled before an option existed, or that were an nn.LSTM, find its default here.
    recompute = False
    recurrent_dropout = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    layer_norm = False
    learned_state = False

    weight_ih_l0: Tensor
    h_0: Tensor
    c_0: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        layer_norm: bool = False,
        learned_state: bool = False,
    ) -> None:
        zoneout_h, zoneout_c = zoneout if isinstance(zoneout, (tuple, list)) and len(zoneout) == 2 else (zoneout,) * 2
        check_probability("recurrent_dropout", recurrent_dropout)
        check_probability("zoneout", zoneout_h)
        check_probability("zoneout", zoneout_c)
        super().__init__(
            input_size,
            hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=proj_size,
            device=device,
            dtype=dtype,
        )
        self.recompute = recompute
        self.recurrent_dropout = recurrent_dropout
        self.zoneout = (zoneout_h, zoneout_c)  # always a pair
        self.layer_norm = layer_norm
        self.learned_state = learned_state
        directions = 2 if bidirectional else 1
        new: dict[str, tuple[int, ...]] = {
            name: (4 * hidden_size if "_ln_ih_" in name or "_ln_hh_" in name else hidden_size,)
            for layer in range(num_layers)
            for d in range(directions)
            for name in self._weight_names(layer, d)
            if "_ln_" in name
        }
        if learned_state:
            rows = num_layers * directions
            new.update(h_0=(rows, proj_size or hidden_size), c_0=(rows, hidden_size))
        for name, shape in new.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Initialises nn.LSTM's parameters as nn.LSTM does, and the others with the values that change nothing."""
        super().reset_parameters()
        self._reset_own_parameters()

    def _weight_kinds(self) -> tuple[str, ...]:
        """Names the kinds of parameters of a layer's direction: nn.LSTM's in its order, then layer norm's."""
        kinds: tuple[str, ...] = _WEIGHTS if self.bias else _WEIGHTS[:2]
        if self.proj_size:
            kinds += ("weight_hr",)
        if self.layer_norm:
            kinds += _LAYER_NORM if self.bias else _LAYER_NORM[:-1]
        return kinds

    def _weight_names(self, layer: int, d: int) -> list[str]:
        """Names the parameters of one layer and direction, in the order of their kinds."""
        names: list[str] = self._all_weights[layer * (2 if self.bidirectional else 1) + d]
        if not self.layer_norm:
            return names
        kinds = _LAYER_NORM if self.bias else _LAYER_NORM[:-1]
        return [*names, *(f"{kind}_l{layer}{'_reverse' if d else ''}" for kind in kinds)]

    def _reset_own_parameters(self) -> None:
        if not (self.layer_norm or self.learned_state):  # then these names may be a subclass's own
            return
        for name, parameter in self.named_parameters():
            if name.startswith("weight_ln_"):
                nn.init.ones_(parameter)
            elif name.startswith("bias_ln_") or name in ("h_0", "c_0"):
                nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        """Describes the module as nn.LSTM does, with our options that are not at their defaults."""
        default = {
            "recompute": False, "recurrent_dropout": 0, "zoneout": (0, 0), "layer_norm": False, "learned_state": False,
        }  # fmt: skip
        ours = [f"{name}={getattr(self, name)}" for name, value in default.items() if getattr(self, name) != value]
        return ", ".join([super().extra_repr(), *ours])

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flattened copy of the weights. Kept for code that calls it on an nn.LSTM."""

    def __prepare_scriptable__(self) -> nn.LSTM:
        """Returns what torch.jit.script compiles in place of an LSTM."""
        if type(self).forward is not LSTM.forward:
            raise NotImplementedError(
                f"LSTM: torch.jit.script would leave out the forward of {type(self).__name__}; trace it instead"
            )
        warnings.warn(
            "torch.jit.script compiles an nn.LSTM of the same parameters in place of a birnn_ext.LSTM, and leaves it "
            "in the model that held ours; birnn_ext.accelerate(model) brings ours back",
            stacklevel=2,
        )
        return portable.scriptable(self)

    @with_overloads
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["all", "last"] = "all",
        reset: Tensor | PackedSequence | None = None,
        return_cell_states: bool = False,
    ) -> tuple[Any, ...]:
        """Runs all layers.

        Args:
            input: (T, B, I), with batch_first (B, T, I), unbatched (T, I), or a PackedSequence.
            hx: (h_0, c_0), (D * num_layers, B, P) and (D * num_layers, B, H), unbatched without B; None stands for
                zeros, or for the learned state.
            lengths: (B,) int64 on the input's device, in any order: sequence b is its first lengths[b] steps, as if
                packed with enforce_sorted=False; 0 <= lengths[b] <= T. Not with a PackedSequence or unbatched input. A
                list or tuple of integers and a tensor on the CPU are taken, too, checked at once, and copied to the
                input's device, once for all layers. To a GPU that is a copy of 8 B bytes at each call, for which
                nobody waits; CUDA graphs can't be captured with it. torch.compile takes a list's values for constants.
            output: "all" returns every step. "last" returns what ``output[:, -1]`` (batch_first; else ``output[-1]``)
                would be, with lengths at each sequence's own last step, without computing what that does not need: of
                the last layer's reverse direction only one step.
            reset: (T, B) bool, with batch_first (B, T), unbatched (T,), with a PackedSequence one of bools (N,) that is
                packed likewise, from lengths in the same order: where it is True, that step begins a new sequence. The
                state is 0 before it, and the reverse direction's after it, so that all is as if the parts were
                sequences by themselves.
            return_cell_states: return the cell states of all steps of the last layer, too. Not with output="last".

        Returns:
            ``(output, (h_n, c_n))``, as `torch.nn.LSTM`, with output (T, B, D * P), arranged as the input, h_n
            (D * num_layers, B, P) and c_n (D * num_layers, B, H). With output="last", output is (B, D * P), and a
            bidirectional LSTM returns ``(output, None)``, as the reverse direction's final states are what "last" does
            without. With return_cell_states ``(output, (h_n, c_n), cells)``, with cells (T, B, D * H) arranged as the
            output. Beyond a sequence's end output and cells are 0.

        Raises:
            ValueError: a wrong number of dimensions, `output`, `lengths` or `reset` that fit nothing, or arguments that
                exclude each other, as reset and learned_state do.
            RuntimeError: sizes of input or hx, their devices or hx's dtype that do not fit, as `torch.nn.LSTM`.
            TypeError: an argument of a wrong type or dtype.
        """
        call = read_call(self, LSTM.forward, input, hx, lengths, output, reset, return_cell_states)
        if isinstance(call, Elsewhere):
            result: tuple[Any, ...] = call.result
            return result
        return arranged(self, call, *self._run(call))

    if TYPE_CHECKING:  # that of nn.Module says Any
        __call__ = forward

    def _run(self, call: Call) -> tuple[Tensor, State | None, Tensor | None]:
        """Runs all layers: returns y (T, B, D * P) or, with output="last", (B, D * P), the final states, and cells."""
        sequences, hx = call.sequences, call.hx
        dtype = autocast_dtype(sequences.x)
        if dtype is not None:
            sequences = sequences._replace(x=sequences.x.to(dtype))
            hx = None if hx is None else (hx[0].to(dtype), hx[1].to(dtype))
        if not self._needs_python_between(call):
            weights = self._weights(self._flat_weights_names)
            route = choose_route(sequences.x, (*weights, *(hx or ())), recompute=self.recompute)
            if route.way is Way.LAYER:
                y, h_n, c_n = torch.ops.birnn_ext.lstm(
                    sequences.x, weights, self.bias, *(hx or (None, None)), sequences.lengths, self.num_layers,
                    call.last, self.recompute,
                )  # fmt: skip
                return y, None if call.last and self.bidirectional else (h_n, c_n), None
        directions = 2 if self.bidirectional else 1
        recorded = self if call.recorded else None
        h_ns, c_ns, cells = [], [], None
        for layer in range(self.num_layers):
            final = layer == self.num_layers - 1
            state: LayerState = (None, None)
            if hx is not None:
                state = (hx[0].unflatten(0, (-1, directions))[layer], hx[1].unflatten(0, (-1, directions))[layer])
            options = Options(call.cells and final, self.recompute, recorded)
            y, h_n, c_n, cells = self._layer(layer, call.last and final, sequences, state, options)
            if self.dropout > 0 and not final:
                y = F.dropout(y, self.dropout, self.training)
            h_ns.append(h_n)
            c_ns.append(c_n)
            sequences = Sequences(y, sequences.lengths, sequences.reset)
        if call.last and self.bidirectional:
            return y, None, None
        if not (call.last or call.recorded) and (y.requires_grad or within_torch_func()):
            y = y.clone()  # the layer keeps its y for the backward pass, and users may change theirs in place
        if cells is not None:
            cells = cells.flatten(2).to(y.dtype, copy=cells.requires_grad)  # likewise
        return y, (torch.cat(h_ns), torch.cat(c_ns)), cells

    def _layer(self, layer: int, last: bool, sequences: Sequences, state: LayerState, options: Options) -> Results:
        """Runs one layer: returns y (T, B, D * P) or, if last, (B, D * P), h_n and c_n (D, B, .), and the cells."""
        variant = self._variant(sequences.x, sequences.reset, options.cells)
        weights = self._layer_weights(layer, sequences.x.dtype)
        if last:
            return *run_last(sequences, weights, state, variant, options), None
        y, h_n, c_n, cells = run_layer(sequences, weights, state, variant, options)
        return y.flatten(2), h_n, c_n, cells

    def _needs_python_between(self, call: Call) -> bool:
        """Tells whether there is something to do between layers, or in one of them, that the operator lstm can't."""
        drops = self.training and (self.recurrent_dropout > 0 or (self.dropout > 0 and self.num_layers > 1))
        beyond = self.zoneout != (0, 0) or self.layer_norm or self.proj_size > 0
        return drops or beyond or call.cells or call.recorded or call.sequences.reset is not None

    def _weights(self, names: Sequence[str]) -> list[Tensor]:
        """Reads parameters as they are now, which must all be of one dtype and on one device."""
        # nn.Module finds parameters here, too, but takes a microsecond for each.
        parameters: dict[str, Any] = self._parameters
        weights: list[Tensor] = [parameters[name] if name in parameters else getattr(self, name) for name in names]
        first = self.weight_ih_l0
        own, device = first.dtype, first.device
        for name, w in zip(names, weights, strict=True):
            if w.dtype != own or w.device != device:
                raise ValueError(f"LSTM: {name} must be {own} on {device} as weight_ih_l0, got {w.dtype} on {w.device}")
        return weights

    def _layer_weights(self, layer: int, dtype: torch.dtype) -> LayerWeights:
        """Reads a layer's parameters, and casts them to x's dtype where autocast has cast x."""
        weights = self._weights(
            [name for d in range(2 if self.bidirectional else 1) for name in self._weight_names(layer, d)]
        )
        if weights[0].dtype != dtype:
            weights = [w.to(dtype) for w in weights]
        return LayerWeights(weights, self._weight_kinds())

    def _variant(self, x: Tensor, reset: Tensor | None, want_cells: bool) -> Variant | None:
        """Draws the masks of a layer with input x (T, B, .); None if it does nothing beyond nn.LSTM."""
        zoneout = self.zoneout != (0, 0)
        dropout = self.recurrent_dropout > 0 and self.training
        if not (dropout or zoneout or self.layer_norm or self.proj_size or want_cells or reset is not None):
            return None
        steps, batch, _ = x.shape
        directions, outputs = 2 if self.bidirectional else 1, self.proj_size or self.hidden_size
        h_mask = None
        if dropout:
            h_mask = _kept(x, self.recurrent_dropout, directions, batch, outputs).to(x.dtype)
            if self.recurrent_dropout < 1:
                h_mask = h_mask / (1 - self.recurrent_dropout)
        if not (zoneout and self.training):
            return Variant(reset, h_mask, zoneout_h_mean=self.zoneout[0], zoneout_c_mean=self.zoneout[1])
        zoneout_h, zoneout_c = (
            ~_kept(x, p, steps, batch, directions, n) if p else None
            for p, n in zip(self.zoneout, (outputs, self.hidden_size), strict=True)
        )
        return Variant(reset, h_mask, zoneout_h, zoneout_c)


let_dynamo_trace(LSTM)


class BiRNN(nn.Module):
    """The many-to-one classifier of the well-known PyTorch tutorial: a bidirectional LSTM and a linear layer.

    Parameters are named as the tutorial's (``lstm.*``, ``fc.*``), so checkpoints go both ways.

    Args:
        input_size: I, features of each step.
        hidden_size: H, units per direction.
        num_layers: stacked LSTM layers.
        num_classes: outputs.

    Raises:
        ValueError, TypeError: as `LSTM`.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, num_classes: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.lstm = LSTM(input_size, hidden_size, num_layers, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(hidden_size * 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores sequences by the LSTM's output at their last step.

        Args:
            x: (B, T, I), of the parameters' dtype and device.

        Returns:
            Class scores, not normalised, (B, num_classes).

        Raises:
            ValueError, RuntimeError, TypeError: as `LSTM.forward`.
        """
        # torch.jit.script leaves out the branches that it can't read.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            last = self.lstm(x)[0][:, -1]
        elif isinstance(self.lstm, LSTM):
            last, _ = self.lstm(x, output="last")
        else:  # `restore` has made it an nn.LSTM
            last = self.lstm(x)[0][:, -1]
        scores: Tensor = self.fc(last)
        return scores

    def __prepare_scriptable__(self) -> BiRNN:
        """Returns a twin with the nn.LSTM that torch.jit.script would otherwise leave in this one."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        if isinstance(self.lstm, LSTM):
            twin.lstm = portable.scriptable(self.lstm)  # type: ignore[assignment]
        return twin

    if TYPE_CHECKING:  # that of nn.Module says Any
        __call__ = forward
