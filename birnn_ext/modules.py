"""Modules: `LSTM`, a drop-in for `torch.nn.LSTM`, and `BiRNN`, the tutorial's classifier on top of it."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from birnn_ext._compile import let_dynamo_trace
from birnn_ext.ops import lstm_layer

State = tuple[Tensor, Tensor]


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast turns x into; None where it leaves x alone, as it does with float64 and integers."""
    device = x.device.type
    # a device such as meta has no autocast, and asking about it is an error
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device) if x.is_floating_point() and x.dtype != torch.float64 else None


class LSTM(nn.LSTM):
    """A drop-in for `torch.nn.LSTM`: same arguments, parameters, initialisation, state_dict and results.

    Its time steps run in birnn_ext's fused kernels. In place of nn.LSTM's flattened weights it reads the parameters as
    they are at each call, so pruning, parametrizations, sharing and swapping of weights just work.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units per direction.
        num_layers: stacked layers; layer k > 0 reads the outputs of layer k-1.
        bias: whether layers have b_ih and b_hh.
        batch_first: input and output are (B, T, .) instead of (T, B, .). States are not affected.
        dropout: probability with which outputs of all layers but the last are zeroed in training mode.
        bidirectional: D = 2 directions instead of 1.
        proj_size: not implemented; must be 0.
        device, dtype: of the parameters; float64, float32, float16 or bfloat16.
        recompute: keep only inputs, outputs and cell states for the backward pass, and compute the gates anew there:
            less memory, more time. Where a layer is not one operator (CUDA, 16-bit types) it keeps its input alone, and
            runs again in the backward pass.

    Raises:
        NotImplementedError: proj_size is not 0.
        ValueError, TypeError: as `torch.nn.LSTM`.
    """

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
    ) -> None:
        if proj_size != 0:
            raise NotImplementedError(f"birnn_ext.LSTM: proj_size must be 0, got {proj_size}")
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
        )
        self.recompute = recompute

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
        super().__setstate__(state)
        self._drop_flat_weights()

    def _drop_flat_weights(self) -> None:
        """Of what was an nn.LSTM."""
        vars(self).pop("_flat_weights", None)
        self._flat_weight_refs = []  # tensors with weak references can't be swapped

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            "birnn_ext.LSTM can't be compiled by torch.jit.script; use torch.compile or torch.export, or script a "
            "model of torch.nn.LSTM, which has the same state_dict (birnn_ext.restore undoes birnn_ext.accelerate)"
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        output: Literal["all", "last"] = "all",
    ) -> tuple[Tensor | PackedSequence, State | tuple[Tensor, None] | None]:
        """Runs all layers.

        Args:
            input: (T, B, I), with batch_first (B, T, I), unbatched (T, I), or a PackedSequence.
            hx: (h_0, c_0), each (D * num_layers, B, H), unbatched (D * num_layers, H); None stands for zeros.
            lengths: (B,) int64 on the input's device, in any order: sequence b is its first lengths[b] steps, as if
                packed with enforce_sorted=False; 0 <= lengths[b] <= T. Not with a PackedSequence or unbatched input.
            output: "all" returns every step. "last" returns what ``output[:, -1]`` (batch_first; else ``output[-1]``)
                would be, with lengths at each sequence's own last step, without computing what that does not need: of
                the last layer's reverse direction only one step.

        Returns:
            ``(output, (h_n, c_n))`` as `torch.nn.LSTM`: output (T, B, D * H), arranged as the input; h_n and c_n
            (D * num_layers, B, H). With output="last": ``(output, (h_n, c_n))`` with output (B, D * H) if this LSTM is
            unidirectional, and ``(output, None)`` if it is bidirectional, as the reverse direction's final states are
            what "last" does without. Beyond a sequence's end the output is 0.

        Raises:
            ValueError: a wrong number of dimensions, `output` or `lengths` that fit nothing.
            RuntimeError: sizes of input or hx that do not fit, as `torch.nn.LSTM`.
            TypeError: an argument of a wrong type or dtype.
        """
        if output not in ("all", "last"):
            raise ValueError(f'LSTM: output must be "all" or "last", got {output!r}')
        if hx is not None and not (
            isinstance(hx, (tuple, list)) and len(hx) == 2 and all(isinstance(state, Tensor) for state in hx)
        ):
            raise TypeError("LSTM: hx must be None or a pair of tensors (h_0, c_0)")
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("LSTM: lengths must be None with a PackedSequence, which has its own")
            return self._forward_packed(input, hx, output)

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
            self._check_lengths(lengths, x)
        y, states = self._run(x, hx, lengths, output == "last")

        if not batched:
            y = y.squeeze(0 if output == "last" else 1)
            if states is not None:
                states = (states[0].squeeze(1), states[1].squeeze(1))
        elif self.batch_first and output == "all":
            y = y.transpose(0, 1)
        return y, states

    def _forward_packed(self, packed: PackedSequence, hx: State | None, output: str):
        """Works on the padded batch in packed (sorted) order; hx and all results but a packed one are in the user's."""
        x, lengths = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes))
        if hx is not None:
            self._check_sizes(x, hx)  # before it is put into order: that may hide a wrong size
            hx = self.permute_hidden(hx, packed.sorted_indices)
        y, states = self._run(x, hx, lengths.to(x.device, non_blocking=True), output == "last")
        if states is not None:
            states = self.permute_hidden(states, packed.unsorted_indices)
        if output == "last":
            return (y if packed.unsorted_indices is None else y[packed.unsorted_indices]), states
        y = pack_padded_sequence(y, lengths)
        return PackedSequence(y.data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), states

    def _check_state_dims(self, hx: State, batched: bool) -> None:
        if hx[0].dim() != (3 if batched else 2) or hx[1].dim() != hx[0].dim():
            dims, kind = (3, "batched 3-D") if batched else (2, "unbatched 2-D")
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {dims}-D "
                f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )

    @staticmethod
    def _check_lengths(lengths: Tensor, x: Tensor) -> None:
        if not isinstance(lengths, Tensor):
            raise TypeError(f"LSTM: lengths must be a tensor, got {type(lengths).__name__}")
        if lengths.shape != x.shape[1:2]:
            raise ValueError(f"LSTM: lengths must have shape ({x.shape[1]},), got {tuple(lengths.shape)}")
        if lengths.dtype != torch.int64:
            raise TypeError(f"LSTM: lengths must be int64, got {lengths.dtype}")
        if lengths.device != x.device:
            raise ValueError(f"LSTM: lengths must be on the input's device {x.device}, got {lengths.device}")

    def _run(self, x: Tensor, hx: State | None, lengths: Tensor | None, last: bool) -> tuple[Tensor, State | None]:
        """x (T, B, I), hx (D * num_layers, B, H) -> y (T, B, D * H) or, if last, (B, D * H), and the final states."""
        if x.shape[0] == 0:
            raise RuntimeError("LSTM: Expected sequence length to be larger than 0 in RNN")
        self._check_sizes(x, hx)
        directions = 2 if self.bidirectional else 1
        dtype = _autocast_dtype(x)
        if dtype is not None:
            x = x.to(dtype)
            hx = None if hx is None else (hx[0].to(dtype), hx[1].to(dtype))
        h_ns, c_ns = [], []
        for layer in range(self.num_layers):
            h0, c0 = (None, None) if hx is None else (s.unflatten(0, (-1, directions))[layer] for s in hx)
            if last and layer == self.num_layers - 1:
                y, h_n, c_n = self._last_output(layer, x, h0, c0, lengths)
            else:
                y, h_n, c_n = self._layer(layer, range(directions), x, h0, c0, lengths)
                y = y.flatten(2)
            if self.dropout > 0 and layer < self.num_layers - 1:
                y = F.dropout(y, self.dropout, self.training)
            h_ns.append(h_n)
            c_ns.append(c_n)
            x = y
        if last and self.bidirectional:
            return x, None
        if not last and (x.requires_grad or torch._C._are_functorch_transforms_active()):
            x = x.clone()  # the layer keeps its y for the backward pass, and users may change theirs in place
        return x, (torch.cat(h_ns), torch.cat(c_ns))

    def _check_sizes(self, x: Tensor, hx: State | None) -> None:
        weight = self.weight_ih_l0
        if x.shape[2] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[2]}"
            )
        autocasts = _autocast_dtype(x) is not None and _autocast_dtype(weight) is not None
        if x.dtype != weight.dtype and not autocasts:
            raise ValueError(
                f"LSTM: RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        if x.device != weight.device:
            raise ValueError(f"LSTM: input must be on the weights' device {weight.device}, got {x.device}")
        if hx is None:
            return
        expected = (self.num_layers * (2 if self.bidirectional else 1), x.shape[1], self.hidden_size)
        for name, state in zip(("hidden[0]", "hidden[1]"), hx, strict=True):
            if state.shape != expected:
                raise RuntimeError(f"Expected {name} size {expected}, got {list(state.shape)}")
            if state.dtype != x.dtype and not (autocasts and _autocast_dtype(state) is not None):
                raise ValueError(f"LSTM: {name} must be {x.dtype} as the input, got {state.dtype}")
            if state.device != x.device:
                raise ValueError(f"LSTM: {name} must be on the input's device {x.device}, got {state.device}")

    def _layer(self, layer: int, directions: range, x: Tensor, h0: Tensor | None, c0: Tensor | None, lengths):
        """One layer's given directions: x (T, B, .) -> y (T, B, D, H), h_n, c_n (D, B, H)."""
        per_layer = 2 if self.bidirectional else 1
        names = [name for d in directions for name in self._all_weights[layer * per_layer + d]]
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
        return lstm_layer(x, weights, self.bias, h0, c0, lengths, self.recompute)

    def _last_output(self, layer: int, x: Tensor, h0: Tensor | None, c0: Tensor | None, lengths: Tensor | None):
        """The last layer's output at each sequence's last step, (B, D * H), and the forward direction's h_n, c_n.

        The reverse direction begins at that step, so one step of it is all that is needed.
        """

        def state_of(d: int) -> tuple[Tensor | None, Tensor | None]:
            return (None, None) if h0 is None else (h0[d : d + 1], c0[d : d + 1])

        y, h_n, c_n = self._layer(layer, range(1), x, *state_of(0), lengths)
        outputs = [h_n[0] if lengths is None else h_n[0].masked_fill((lengths == 0).unsqueeze(-1), 0)]
        if self.bidirectional:
            if lengths is None:
                at_last = x[-1:]
            else:
                batch = torch.arange(x.shape[1], device=x.device)
                at_last = x[(lengths - 1).clamp(min=0), batch].unsqueeze(0)
            y, _, _ = self._layer(
                layer, range(1, 2), at_last, *state_of(1), None if lengths is None else lengths.clamp(max=1)
            )
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
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, num_classes: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.lstm = LSTM(input_size, hidden_size, num_layers, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(hidden_size * 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, I) -> class scores (B, num_classes), from the LSTM's output at the last step."""
        last, _ = self.lstm(x, output="last")
        return self.fc(last)
