"""Modules: `LSTM`, `GRU` and `RNN`, drop-ins for PyTorch's, and `BiRNN`, the tutorial's classifier on top of one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from birnn_ext import portable
from birnn_ext._torch_private import let_dynamo_trace
from birnn_ext.arguments import Call, check_probability, read_call
from birnn_ext.cell import GRU_CELL, LSTM_CELL, RNN_RELU_CELL, RNN_TANH_CELL, Cell
from birnn_ext.layer import Variant
from birnn_ext.recurrent import Recurrent, run_call
from birnn_ext.signatures import LSTMState, with_h_overloads, with_lstm_overloads

_LAYER_NORM = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")  # the last one with bias only


def _kept(x: Tensor, p: float, *shape: int) -> Tensor:
    """Draws a mask on x's device that is False with probability p. It does so out of place, as torch.func.vmap asks."""
    return torch.rand(shape, device=x.device) >= p


class LSTM(Recurrent, nn.LSTM):
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

    CELL = LSTM_CELL

    recurrent_dropout = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    layer_norm = False

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
            options={
                "recompute": recompute,
                "recurrent_dropout": recurrent_dropout,
                "zoneout": (zoneout_h, zoneout_c),  # always a pair
                "layer_norm": layer_norm,
                "learned_state": learned_state,
            },
        )

    def _own_parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for layer in range(self.num_layers):
            for d in range(2 if self.bidirectional else 1):
                for name in self._weight_names(layer, d):
                    if "_ln_" in name:
                        wide = "_ln_ih_" in name or "_ln_hh_" in name
                        yield name, (4 * self.hidden_size if wide else self.hidden_size,)
        yield from super()._own_parameters()

    def _weight_kinds(self) -> tuple[str, ...]:
        """Names the kinds of parameters of a layer's direction: nn.LSTM's in its order, then layer norm's."""
        kinds = super()._weight_kinds()
        if self.proj_size:
            kinds += ("weight_hr",)
        if self.layer_norm:
            kinds += _LAYER_NORM if self.bias else _LAYER_NORM[:-1]
        return kinds

    def _weight_names(self, layer: int, d: int) -> list[str]:
        names = super()._weight_names(layer, d)
        if not self.layer_norm:
            return names
        kinds = _LAYER_NORM if self.bias else _LAYER_NORM[:-1]
        return [*names, *(f"{kind}_l{layer}{'_reverse' if d else ''}" for kind in kinds)]

    def _reset_own_parameters(self) -> None:
        super()._reset_own_parameters()
        if not self.layer_norm:  # then these names may be a subclass's own
            return
        for name, parameter in self.named_parameters():
            if name.startswith("weight_ln_"):
                nn.init.ones_(parameter)
            elif name.startswith("bias_ln_"):
                nn.init.zeros_(parameter)

    @with_lstm_overloads
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: LSTMState | None = None,
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
        return run_call(self, read_call(self, LSTM.forward, input, hx, lengths, output, reset, return_cell_states))

    if TYPE_CHECKING:  # that of nn.Module says Any
        __call__ = forward

    def _needs_python_between(self, call: Call) -> bool:
        drops = self.training and self.recurrent_dropout > 0
        beyond = self.zoneout != (0, 0) or self.layer_norm or self.proj_size > 0
        return drops or beyond or super()._needs_python_between(call)

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


class GRU(Recurrent, nn.GRU):
    """A drop-in for `torch.nn.GRU`: same arguments, parameters, initialisation, state_dict and results.

    Its time steps run in birnn_ext's fused kernels. In place of nn.GRU's flattened weights it reads the parameters as
    they are at each call, so pruning, parametrizations, sharing and swapping of weights just work.

    The method: K. Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014, with W_hn h + b_hn
    within the product with the reset gate, as cuDNN and `torch.nn.GRU` have it.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units per direction.
        num_layers: stacked layers; layer k > 0 reads the outputs of layer k-1.
        bias: whether layers have b_ih and b_hh.
        batch_first: input and output are (B, T, .) instead of (T, B, .). States are not affected.
        dropout: probability with which outputs of all layers but the last are zeroed in training mode.
        bidirectional: D = 2 directions instead of 1.
        device: of the parameters.
        dtype: of the parameters; float64, float32, float16 or bfloat16.
        recompute: compute the gates anew in the backward pass: less memory, more time, as in `LSTM`.
        learned_state: a parameter ``h_0`` (D * num_layers, H), zeros at first, is the initial state of every sequence
            where forward is given none.
        refused: other arguments, such as proj_size, raise nn.GRU's errors.

    Raises:
        ValueError, TypeError: as `torch.nn.GRU`.
    """

    CELL = GRU_CELL

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        learned_state: bool = False,
        **refused: NoReturn,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
            options={"recompute": recompute, "learned_state": learned_state},
            **refused,
        )

    @with_h_overloads
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["all", "last"] = "all",
        reset: Tensor | PackedSequence | None = None,
    ) -> tuple[Any, ...]:
        """Runs all layers.

        Args:
            input: (T, B, I), with batch_first (B, T, I), unbatched (T, I), or a PackedSequence.
            hx: h_0 (D * num_layers, B, H), unbatched without B; None stands for zeros, or for the learned state.
            lengths: (B,), as for `LSTM.forward`.
            output: "all" returns every step, "last" each sequence's own last one, as for `LSTM.forward`.
            reset: bool, as for `LSTM.forward`: where it is True, that step begins a new sequence. A call with it runs
                twice the steps, as there is a step that clears the state, or leaves it, before each. Unlike an LSTM's
                it can't clear a state that became NaN or infinite on the way, only a given one.

        Returns:
            ``(output, h_n)``, as `torch.nn.GRU`, with output (T, B, D * H), arranged as the input and 0 beyond a
            sequence's end, and h_n (D * num_layers, B, H). With output="last", output is (B, D * H), and a
            bidirectional GRU returns ``(output, None)``.

        Raises:
            ValueError: a wrong number of dimensions, `output`, `lengths` or `reset` that fit nothing, or arguments that
                exclude each other, as reset and learned_state do.
            RuntimeError: sizes of input or hx, their devices or hx's dtype that do not fit, as `torch.nn.GRU`.
            TypeError: an argument of a wrong type or dtype.
        """
        return run_call(self, read_call(self, GRU.forward, input, hx, lengths, output, reset))

    if TYPE_CHECKING:  # that of nn.Module says Any
        __call__ = forward


class RNN(Recurrent, nn.RNN):
    """A drop-in for `torch.nn.RNN`: same arguments, parameters, initialisation, state_dict and results.

    Its time steps run in birnn_ext's fused kernels. In place of nn.RNN's flattened weights it reads the parameters as
    they are at each call, so pruning, parametrizations, sharing and swapping of weights just work.

    The method: J. L. Elman, "Finding Structure in Time", 1990.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units per direction.
        num_layers: stacked layers; layer k > 0 reads the outputs of layer k-1.
        nonlinearity: "tanh" or "relu".
        bias: whether layers have b_ih and b_hh.
        batch_first: input and output are (B, T, .) instead of (T, B, .). States are not affected.
        dropout: probability with which outputs of all layers but the last are zeroed in training mode.
        bidirectional: D = 2 directions instead of 1.
        device: of the parameters.
        dtype: of the parameters; float64, float32, float16 or bfloat16.
        recompute: keep the input alone for the backward pass where a layer is not one operator, as in `LSTM`. Where it
            is one, this changes nothing: input and output are all that is kept.
        learned_state: a parameter ``h_0`` (D * num_layers, H), zeros at first, is the initial state of every sequence
            where forward is given none.
        refused: other arguments, such as proj_size, raise nn.RNN's errors.

    Raises:
        ValueError, TypeError: as `torch.nn.RNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        learned_state: bool = False,
        **refused: NoReturn,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers=num_layers,
            nonlinearity=nonlinearity,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
            options={"recompute": recompute, "learned_state": learned_state},
            **refused,
        )

    @property
    def CELL(self) -> Cell:  # type: ignore[override]
        """The cell of the module's nonlinearity."""
        return RNN_RELU_CELL if self.mode == "RNN_RELU" else RNN_TANH_CELL

    @with_h_overloads
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["all", "last"] = "all",
        reset: Tensor | PackedSequence | None = None,
    ) -> tuple[Any, ...]:
        """Runs all layers.

        Args:
            input: (T, B, I), with batch_first (B, T, I), unbatched (T, I), or a PackedSequence.
            hx: h_0 (D * num_layers, B, H), unbatched without B; None stands for zeros, or for the learned state.
            lengths: (B,), as for `LSTM.forward`.
            output: "all" returns every step, "last" each sequence's own last one, as for `LSTM.forward`.
            reset: bool, as for `LSTM.forward`: where it is True, that step begins a new sequence. A call with it runs
                step by step, so torch.compile and torch.export then unroll the steps, and fix their number.

        Returns:
            ``(output, h_n)``, as `torch.nn.RNN`, arranged as by `GRU.forward`.

        Raises:
            ValueError: a wrong number of dimensions, `output`, `lengths` or `reset` that fit nothing, or arguments that
                exclude each other, as reset and learned_state do.
            RuntimeError: sizes of input or hx, their devices or hx's dtype that do not fit, as `torch.nn.RNN`.
            TypeError: an argument of a wrong type or dtype.
        """
        return run_call(self, read_call(self, RNN.forward, input, hx, lengths, output, reset))

    if TYPE_CHECKING:  # that of nn.Module says Any
        __call__ = forward


let_dynamo_trace(Recurrent)

_BY_NAME: dict[str, type[LSTM | GRU | RNN]] = {"lstm": LSTM, "gru": GRU, "rnn": RNN}


class BiRNN(nn.Module):
    """The many-to-one classifier of the well-known PyTorch tutorial: a bidirectional LSTM and a linear layer.

    Parameters are named as the tutorial's (``lstm.*``, ``fc.*``), so checkpoints go both ways. With a GRU they are
    ``gru.*``, with a plain RNN (tanh) ``rnn.*``.

    Args:
        input_size: I, features of each step.
        hidden_size: H, units per direction.
        num_layers: stacked layers.
        num_classes: outputs.
        cell: "lstm", "gru" or "rnn".

    Raises:
        ValueError, TypeError: as `LSTM`, `GRU` and `RNN`; cell is none of the three.
    """

    cell = "lstm"  # of models that were pickled before there was another
    if TYPE_CHECKING:
        lstm: LSTM | nn.LSTM
        gru: GRU | nn.GRU
        rnn: RNN | nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        num_classes: int,
        cell: Literal["lstm", "gru", "rnn"] = "lstm",
    ) -> None:
        super().__init__()
        if cell not in tuple(_BY_NAME):  # which also compares what is not hashable
            raise ValueError(f'BiRNN: cell must be "lstm", "gru" or "rnn", got {cell!r}')
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.cell = cell
        self.add_module(cell, _BY_NAME[cell](input_size, hidden_size, num_layers, batch_first=True, bidirectional=True))
        self.fc = nn.Linear(hidden_size * 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores sequences by the recurrent module's output at their last step.

        Args:
            x: (B, T, I), of the parameters' dtype and device.

        Returns:
            Class scores, not normalised, (B, num_classes).

        Raises:
            ValueError, RuntimeError, TypeError: as `LSTM.forward`.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            last = self._last(x)
        elif hasattr(self, "lstm"):  # torch.jit.script leaves out the branches of the others
            last = self.lstm(x)[0][:, -1]
        elif hasattr(self, "gru"):
            last = self.gru(x)[0][:, -1]
        else:
            last = self.rnn(x)[0][:, -1]
        scores: Tensor = self.fc(last)
        return scores

    def _last(self, x: Tensor) -> Tensor:
        rnn = getattr(self, self.cell)
        last: Tensor = rnn(x, output="last")[0] if isinstance(rnn, Recurrent) else rnn(x)[0][:, -1]
        return last  # the second of these if `restore` has made it PyTorch's

    def __prepare_scriptable__(self) -> BiRNN:
        """Returns a twin with the module of PyTorch's that torch.jit.script would otherwise leave in this one."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        rnn = self._modules[self.cell]
        if isinstance(rnn, Recurrent):
            twin._modules[self.cell] = portable.scriptable(rnn)
        return twin

    if TYPE_CHECKING:  # that of nn.Module says Any
        __call__ = forward
