"""Modules: `LSTM`, a drop-in for `torch.nn.LSTM`, and `BiRNN`, the tutorial's classifier on top of it."""

from __future__ import annotations

import copy
import numbers
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from birnn_ext import portable
from birnn_ext._compile import let_dynamo_trace
from birnn_ext.ops import lstm_layer
from birnn_ext.variants import Variant, Weights, lstm_variant_layer

State = tuple[Tensor, Tensor]


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast turns x into; None where it leaves x alone, as it does with float64 and integers."""
    device = x.device.type
    # meta has no autocast, and asking about it is an error; torch 2.10's compile can't ask which have
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device) if x.is_floating_point() and x.dtype != torch.float64 else None


_LAYER_NORM = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")  # the last one with bias only


def _kept(x: Tensor, p: float, *shape: int) -> Tensor:
    """A random mask on x's device, False with probability p. Out of place, as torch.func.vmap wants it."""
    return torch.rand(shape, device=x.device) >= p


def _check_probability(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError(f"LSTM: {name} must be a number in [0, 1], got {value!r}")


def _check_length_values(lengths: Tensor | Sequence[int], steps: int) -> None:
    if torch.compiler.is_compiling():  # it would guard on each; the operator checks them, too
        return
    for b, length in enumerate(lengths.tolist() if isinstance(lengths, Tensor) else lengths):
        if not 0 <= length <= steps:
            raise ValueError(f"LSTM: lengths must be between 0 and T = {steps}, got lengths[{b}] = {length}")


class LSTM(nn.LSTM):
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
            less memory, more time. Where a layer is not one operator (CUDA, 16-bit types, what follows here) it keeps
            its input alone, and runs again in the backward pass. After T. Chen et al., "Training Deep Nets with
            Sublinear Memory Cost", 2016.
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

    # Modules that were pickled, or made nn.LSTM, before these existed go without.
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
        _check_probability("recurrent_dropout", recurrent_dropout)
        _check_probability("zoneout", zoneout_h)
        _check_probability("zoneout", zoneout_c)
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
        """Gives all parameters new initial values: nn.LSTM's as nn.LSTM does, the others the values that do nothing."""
        super().reset_parameters()
        self._reset_own_parameters()

    def _weight_names(self, layer: int, d: int) -> list[str]:
        """Of one layer and direction: nn.LSTM's in its order, then layer norm's."""
        names: list[str] = self._all_weights[layer * (2 if self.bidirectional else 1) + d]
        if not self.layer_norm:
            return names
        kinds = _LAYER_NORM if self.bias else _LAYER_NORM[:-1]
        return [*names, *(f"{kind}_l{layer}{'_reverse' if d else ''}" for kind in kinds)]

    def _reset_own_parameters(self) -> None:
        if not (self.layer_norm or self.learned_state):  # a subclass that was accelerated may use these names
            return
        for name, parameter in self.named_parameters():
            if name.startswith("weight_ln_"):
                nn.init.ones_(parameter)
            elif name.startswith("bias_ln_") or name in ("h_0", "c_0"):
                nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        """nn.LSTM's, and what is not its default of the rest."""
        default = {
            "recompute": False, "recurrent_dropout": 0, "zoneout": (0, 0), "layer_norm": False, "learned_state": False,
        }  # fmt: skip
        ours = [f"{name}={getattr(self, name)}" for name, value in default.items() if getattr(self, name) != value]
        return ", ".join([super().extra_repr(), *ours])

    # What nn.LSTM does to keep its flattened weights, which we don't have.

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flattened copy of the weights. Kept for code that calls it on an nn.LSTM."""

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """The weights as they are now, for code of nn.LSTM's and of others that reads them here."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._drop_flat_weights()

    def _drop_flat_weights(self) -> None:
        """Of what was an nn.LSTM."""
        vars(self).pop("_flat_weights", None)
        self._flat_weight_refs = []  # tensors with weak references can't be swapped

    def __prepare_scriptable__(self) -> nn.LSTM:
        """What torch.jit.script compiles in place of an LSTM."""
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

    @overload
    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["all"] = "all",
        reset: Tensor | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[Tensor, State]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        lengths: None = None,
        output: Literal["all"] = "all",
        reset: PackedSequence | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[PackedSequence, State]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["all"] = "all",
        reset: Tensor | None = None,
        return_cell_states: Literal[True],
    ) -> tuple[Tensor, State, Tensor]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        lengths: None = None,
        output: Literal["all"] = "all",
        reset: PackedSequence | None = None,
        return_cell_states: Literal[True],
    ) -> tuple[PackedSequence, State, PackedSequence]: ...
    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["last"],
        reset: Tensor | PackedSequence | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[Tensor, State | None]: ...

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
        tracer = portable.fx_tracer(input, hx, lengths, reset)
        if tracer is not None:
            if type(self).forward is not LSTM.forward:  # a leaf would be called with what this has made of the input
                raise NotImplementedError(
                    f"LSTM: torch.fx can't trace through the forward of {type(self).__name__}; name it a leaf in a "
                    "torch.fx.Tracer's is_leaf_module"
                )
            keywords = {"lengths": lengths, "output": output, "reset": reset, "return_cell_states": return_cell_states}
            leaf: tuple[Any, ...] = portable.as_leaf(tracer, self, (input, hx), keywords)
            return leaf
        if output not in ("all", "last"):
            raise ValueError(f'LSTM: output must be "all" or "last", got {output!r}')
        if return_cell_states and output == "last":
            raise ValueError('LSTM: return_cell_states must be False with output="last"')
        if reset is not None and self.learned_state:
            raise ValueError("LSTM: reset must be None with learned_state=True: it clears the state to 0")
        if hx is not None and not (
            isinstance(hx, (tuple, list)) and len(hx) == 2 and all(isinstance(state, Tensor) for state in hx)
        ):
            raise TypeError("LSTM: hx must be None or a pair of tensors (h_0, c_0)")
        if portable.is_recording():
            portable.check_recordable(self, reset, return_cell_states)
            if lengths is None and output == "all" and not self.learned_state:
                return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("LSTM: lengths must be None with a PackedSequence, which has its own")
            return self._forward_packed(input, hx, output, reset, return_cell_states)

        if not isinstance(input, Tensor):
            raise TypeError(f"LSTM: input must be a tensor or a PackedSequence, got {type(input).__name__}")
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        if hx is not None:
            self._check_state_dims(hx, batched)
            if not batched:
                hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        if lengths is not None:
            if not batched:
                raise ValueError("LSTM: lengths must be None with unbatched (2-D) input")
            lengths = self._lengths_for(lengths, x)
        begins = None
        if reset is not None:
            begins = self._check_reset(reset, input)
            begins = begins.unsqueeze(1) if not batched else begins.transpose(0, 1) if self.batch_first else begins
        y, states, cells = self._run(x, hx, lengths, output == "last", begins, return_cell_states)

        if not batched:
            y = y.squeeze(0 if output == "last" else 1)
            cells = cells if cells is None else cells.squeeze(1)
            if states is not None:
                states = (states[0].squeeze(1), states[1].squeeze(1))
        elif self.batch_first and output == "all":
            y = y.transpose(0, 1)
            cells = cells if cells is None else cells.transpose(0, 1)
        return (y, states) if cells is None else (y, states, cells)

    if TYPE_CHECKING:  # nn.Module's says Any
        __call__ = forward

    def _forward_packed(
        self, packed: PackedSequence, hx: State | None, output: str, reset: Any, return_cell_states: bool
    ) -> tuple[Any, ...]:
        """Works on the padded batch in packed (sorted) order; hx and all results but a packed one are in the user's."""
        if reset is not None:
            if not isinstance(reset, PackedSequence):
                raise TypeError(f"LSTM: reset must be a PackedSequence with a packed input, got {type(reset).__name__}")
            same = reset.data.shape == packed.data.shape[:1] and torch.equal(reset.batch_sizes, packed.batch_sizes)
            theirs, ours = reset.sorted_indices, packed.sorted_indices
            in_order = theirs is ours if theirs is None or ours is None else torch.equal(theirs, ours)
            if not (same and in_order):
                raise ValueError("LSTM: reset must be packed as the input, with data of shape (N,)")
            self._check_reset(reset.data, packed.data)
            reset = pad_packed_sequence(PackedSequence(reset.data, reset.batch_sizes))[0]
        if packed.data.dim() != 2:
            raise ValueError(f"LSTM: data of a packed input must have shape (N, I), got {tuple(packed.data.shape)}")
        x, lengths = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes))
        if hx is not None:
            self._check_sizes(x, hx)  # before it is put into order: that may hide a wrong size
            hx = self.permute_hidden(hx, packed.sorted_indices)
        y, states, cells = self._run(
            x, hx, lengths.to(x.device, non_blocking=True), output == "last", reset, return_cell_states
        )
        if states is not None:
            states = self.permute_hidden(states, packed.unsorted_indices)
        if output == "last":
            return (y if packed.unsorted_indices is None else y[packed.unsorted_indices]), states

        def pack(padded: Tensor) -> PackedSequence:
            data = pack_padded_sequence(padded, lengths).data
            return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)

        return (pack(y), states) if cells is None else (pack(y), states, pack(cells))

    def _check_state_dims(self, hx: State, batched: bool) -> None:
        if hx[0].dim() != (3 if batched else 2) or hx[1].dim() != hx[0].dim():
            dims, kind = (3, "batched 3-D") if batched else (2, "unbatched 2-D")
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {dims}-D "
                f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )

    @staticmethod
    def _lengths_for(lengths: Tensor | Sequence[int], x: Tensor) -> Tensor:
        """Lengths for x (T, B, I), on its device. Those on the host are checked there; nothing waits for a device."""
        if isinstance(lengths, (list, tuple)):
            for b, length in enumerate(lengths):
                if isinstance(length, bool) or not isinstance(length, numbers.Integral):
                    raise TypeError(f"LSTM: lengths must be integers, got lengths[{b}] of {type(length).__name__}")
            _check_length_values(lengths, x.shape[0])  # before int64 has to hold them
            lengths = torch.tensor(lengths, dtype=torch.int64)
        elif not isinstance(lengths, Tensor):
            raise TypeError(f"LSTM: lengths must be a tensor or a list of integers, got {type(lengths).__name__}")
        if lengths.shape != x.shape[1:2]:
            raise ValueError(f"LSTM: lengths must have shape ({x.shape[1]},), got {tuple(lengths.shape)}")
        if lengths.dtype != torch.int64:
            raise TypeError(f"LSTM: lengths must be int64, got {lengths.dtype}")
        if lengths.device == x.device:
            return lengths
        if lengths.device.type != "cpu":
            raise ValueError(
                f"LSTM: lengths must be on the input's device {x.device} or on the CPU, got {lengths.device}"
            )
        _check_length_values(lengths, x.shape[0])
        return lengths.to(x.device, non_blocking=True)

    @staticmethod
    def _check_reset(reset: object, input: Tensor) -> Tensor:
        if not isinstance(reset, Tensor):
            raise TypeError(f"LSTM: reset must be a tensor, got {type(reset).__name__}")
        if reset.shape != input.shape[:-1]:
            raise ValueError(f"LSTM: reset must have shape {tuple(input.shape[:-1])}, got {tuple(reset.shape)}")
        if reset.dtype != torch.bool:
            raise TypeError(f"LSTM: reset must be bool, got {reset.dtype}")
        if reset.device != input.device:
            raise ValueError(f"LSTM: reset must be on the input's device {input.device}, got {reset.device}")
        return reset

    def _run(
        self,
        x: Tensor,
        hx: State | None,
        lengths: Tensor | None,
        last: bool,
        reset: Tensor | None = None,
        return_cells: bool = False,
    ) -> tuple[Tensor, State | None, Tensor | None]:
        """x (T, B, I), hx as in forward -> y (T, B, D * P) or, if last, (B, D * P), the final states, and the cells."""
        if x.shape[0] == 0:
            raise RuntimeError("LSTM: Expected sequence length to be larger than 0 in RNN")
        if hx is None and self.learned_state:
            h_0, c_0 = (state.unsqueeze(1).expand(-1, x.shape[1], -1) for state in (self.h_0, self.c_0))
            hx = (h_0, c_0)
        recording = portable.is_recording()
        if hx is None and recording:
            hx = portable.zero_state(self, x)
        self._check_sizes(x, hx)
        directions = 2 if self.bidirectional else 1
        dtype = _autocast_dtype(x)
        if dtype is not None:
            x = x.to(dtype)
            hx = None if hx is None else (hx[0].to(dtype), hx[1].to(dtype))
        h_ns, c_ns, cells = [], [], None
        for layer in range(self.num_layers):
            h0, c0 = (None, None) if hx is None else (s.unflatten(0, (-1, directions))[layer] for s in hx)
            want_cells = return_cells and layer == self.num_layers - 1
            variant = self._variant(x, reset, want_cells)
            if last and layer == self.num_layers - 1:
                y, h_n, c_n = self._last_output(layer, x, h0, c0, lengths, variant)
            else:
                y, h_n, c_n, cells = self._layer(layer, range(directions), x, h0, c0, lengths, variant, want_cells)
                y = y.flatten(2)
            if self.dropout > 0 and layer < self.num_layers - 1:
                y = F.dropout(y, self.dropout, self.training)
            h_ns.append(h_n)
            c_ns.append(c_n)
            x = y
        if last and self.bidirectional:
            return x, None, None
        if not (last or recording) and (x.requires_grad or torch._C._are_functorch_transforms_active()):
            x = x.clone()  # the layer keeps its y for the backward pass, and users may change theirs in place
        if cells is not None:
            cells = cells.flatten(2).to(x.dtype, copy=cells.requires_grad)  # likewise
        return x, (torch.cat(h_ns), torch.cat(c_ns)), cells

    def _variant(self, x: Tensor, reset: Tensor | None, want_cells: bool) -> Variant | None:
        """What a layer with input x (T, B, .) does beyond nn.LSTM, with masks drawn; None for nothing."""
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

    def _check_sizes(self, x: Tensor, hx: State | None) -> None:
        weight = self.weight_ih_l0
        if x.layout != torch.strided:
            raise RuntimeError(f"LSTM: input must be dense, got layout {x.layout}")
        if x.shape[2] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[2]}"
            )
        if x.is_quantized:
            raise TypeError(
                f"LSTM: input must not be quantized, got {x.dtype}; to have an LSTM quantized, make it an nn.LSTM by "
                "birnn_ext.restore(model) before torch.ao.quantization.prepare"
            )
        autocasts = _autocast_dtype(x) is not None and _autocast_dtype(weight) is not None
        if x.dtype != weight.dtype and not autocasts:
            raise ValueError(
                f"LSTM: RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        if x.device != weight.device:
            raise RuntimeError(f"LSTM: input must be on the weights' device {weight.device}, got {x.device}")
        if hx is None:
            return
        for name, state, size in zip(
            ("hidden[0]", "hidden[1]"), hx, (self.proj_size or self.hidden_size, self.hidden_size), strict=True
        ):
            expected = (self.num_layers * (2 if self.bidirectional else 1), x.shape[1], size)
            if state.shape != expected:
                raise RuntimeError(f"Expected {name} size {expected}, got {list(state.shape)}")
            if state.dtype != x.dtype and not (autocasts and _autocast_dtype(state) is not None):
                raise RuntimeError(f"LSTM: {name} must be {x.dtype} as the input, got {state.dtype}")
            if state.device != x.device:
                raise RuntimeError(f"LSTM: {name} must be on the input's device {x.device}, got {state.device}")

    def _layer(
        self,
        layer: int,
        directions: range,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        variant: Variant | None,
        want_cells: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """One layer's given directions: x (T, B, .) -> y (T, B, D, P), h_n and c_n (D, B, .), cells (T, B, D, H)."""
        names = [name for d in directions for name in self._weight_names(layer, d)]
        weights = [getattr(self, name) for name in names]
        first = self.weight_ih_l0
        dtype, device = first.dtype, first.device
        for name, w in zip(names, weights, strict=True):
            if w.dtype != dtype or w.device != device:
                raise ValueError(
                    f"LSTM: {name} must be {dtype} on {device} as weight_ih_l0, got {w.dtype} on {w.device}"
                )
        if dtype != x.dtype:  # autocast
            weights = [w.to(x.dtype) for w in weights]
        if portable.is_recording() and h0 is not None and c0 is not None:  # `_run` has made them
            return *portable.lstm_layer(self, x, weights, h0, c0, lengths), None
        if variant is None:
            return *lstm_layer(x, weights, self.bias, h0, c0, lengths, self.recompute), None

        kinds = [name.rpartition("_l")[0] for name in names[: len(names) // len(directions)]]
        of = {kind: torch.stack(weights[k :: len(kinds)]) for k, kind in enumerate(kinds)}
        ln_c = None
        if self.layer_norm:
            factor = of["weight_ln_c"]
            ln_c = torch.stack([factor, of["bias_ln_c"] if self.bias else torch.zeros_like(factor)], 1)
        bias = of["bias_ih"] + of["bias_hh"] if self.bias else None
        w_hr, ln_ih, ln_hh = (of.get(kind) for kind in ("weight_hr", "weight_ln_ih", "weight_ln_hh"))
        stacked = Weights(of["weight_ih"], of["weight_hh"], bias, w_hr, ln_ih, ln_hh, ln_c)
        return lstm_variant_layer(x, stacked, h0, c0, lengths, variant, want_cells, self.recompute)

    def _last_output(
        self,
        layer: int,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        variant: Variant | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The last layer's output at each sequence's last step, (B, D * P), and the forward direction's h_n, c_n.

        The reverse direction begins at that step, so one step of it is all that is needed.
        """

        def state_of(d: int) -> tuple[Tensor | None, Tensor | None]:
            return (None, None) if h0 is None or c0 is None else (h0[d : d + 1], c0[d : d + 1])

        share = None if variant is None else variant.direction(0)
        _, h_n, c_n, _ = self._layer(layer, range(1), x, *state_of(0), lengths, share)
        outputs = [h_n[0] if lengths is None else h_n[0].masked_fill((lengths == 0).unsqueeze(-1), 0)]
        if self.bidirectional:
            if lengths is None:
                at_last = x[-1:]
            else:
                batch = torch.arange(x.shape[1], device=x.device)
                at_last = x[(lengths - 1).clamp(min=0), batch].unsqueeze(0)
            share = None if variant is None else variant.first_reverse_step(lengths)
            at_most_1 = None if lengths is None else lengths.clamp(max=1)
            y, *_ = self._layer(layer, range(1, 2), at_last, *state_of(1), at_most_1, share)
            outputs.append(y[0, :, 0])
        return torch.cat(outputs, -1), h_n, c_n


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
        # The compiler leaves the other branches out, which it can't read.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            last = self.lstm(x)[0][:, -1]
        elif isinstance(self.lstm, LSTM):
            last, _ = self.lstm(x, output="last")
        else:  # an nn.LSTM, by `restore`
            last = self.lstm(x)[0][:, -1]
        scores: Tensor = self.fc(last)
        return scores

    def __prepare_scriptable__(self) -> BiRNN:
        """A twin that has the nn.LSTM, as torch.jit.script would put it into this one."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        if isinstance(self.lstm, LSTM):
            twin.lstm = portable.scriptable(self.lstm)  # type: ignore[assignment]
        return twin

    if TYPE_CHECKING:  # nn.Module's says Any
        __call__ = forward
