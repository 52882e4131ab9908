"""`Base`, an nn.RNNBase that runs a cell, without PyTorch's copy of its weights in one piece of memory.

PyTorch's modules keep that and lists that refer to it in attributes, in pickles and in a property that other code
reads. This class answers in their place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from birnn_ext.cell import Cell


class Base(nn.RNNBase):
    """A module whose weights are its parameters as they are at each call, and nothing besides."""

    CELL: Cell

    # Modules that were pickled before an option existed, or that were PyTorch's, find its default here.
    recompute = False
    learned_state = False

    weight_ih_l0: Tensor
    h_0: Tensor

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """The weights as they are now, for code of PyTorch's and of others that reads them here."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        drop_flat_weights(self)


def drop_flat_weights(module: nn.RNNBase) -> None:
    """Removes what a module keeps of the time when it was PyTorch's, or was pickled as one."""
    vars(module).pop("_flat_weights", None)
    vars(module)["_flat_weight_refs"] = []  # tensors with weak references can't be swapped
