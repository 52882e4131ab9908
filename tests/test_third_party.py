"""Models of well-known packages, without their weights, compute the same before and after accelerate.

tests/third_party.txt lists the packages. They are installed without their dependencies, so that torch stays the same.
If one is missing its test is skipped, but fails if BIRNN_THIRD_PARTY is set, as CI does.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from birnn_ext import accelerate, op_calls, restore

pytestmark = pytest.mark.slow

Model = tuple[nn.Module, Callable[[nn.Module], Tensor]]  # a model, and a function that calls it


def openunmix(package: ModuleType) -> Model:
    """Returns a music source separator: three bidirectional layers on a spectrogram (B, channels, bins, frames)."""
    spectrogram = torch.rand(3, 2, 65, 20)
    return package.OpenUnmix(nb_bins=65, hidden_size=32, nb_layers=3), lambda model: model(spectrogram)


def demucs(package: ModuleType) -> Model:
    """Returns a music source separator in the time domain, with LSTMs in its residual branches and in the middle."""
    audio = torch.randn(2, 2, 4000)
    model = package.Demucs(["voice", "rest"], channels=8, depth=4, lstm_layers=2, dconv_lstm=2, dconv_attn=9)
    return model, lambda model: model(audio)


def asteroid(package: ModuleType) -> Model:
    """Returns a speech separator of dual-path RNNs, which have many short sequences."""
    features = torch.randn(2, 16, 50)
    model = package.DPRNN(16, n_src=2, bn_chan=12, hid_size=10, chunk_size=10, n_repeats=2, rnn_type="LSTM")
    return model, lambda model: model(features)


def espnet(package: ModuleType) -> Model:
    """Returns a speech recogniser's encoder: packed sequences, with projections and subsampling between layers."""
    features, lengths = torch.randn(3, 21, 12), torch.tensor([21, 17, 6])
    model = package.RNNEncoder(12, num_layers=3, hidden_size=10, output_size=8, subsample=(2, 1, 1))
    return model, lambda model: model(features, lengths)[0]


def espnet_tacotron2(package: ModuleType) -> Model:
    """Returns a speech synthesiser's encoder of text."""
    text, lengths = torch.randint(1, 30, (3, 15)), torch.tensor([15, 9, 2])
    model = package.Encoder(30, embed_dim=16, elayers=2, eunits=12, econv_chans=16, dropout_rate=0.3)
    return model, lambda model: model(text, lengths)[0]


def stanza(package: ModuleType) -> Model:
    """Returns the wrapper of its taggers and parsers, which takes packed sequences.

    It has no dropout: for a PackedSequence we draw masks for the padded batch, unlike nn.LSTM.
    """
    words = torch.randn(4, 12, 16)
    model = package.PackedLSTM(16, 10, 2, batch_first=True, bidirectional=True)
    return model, lambda model: model(words, [12, 12, 5, 1])[0].data


MODELS = {
    "openunmix.model": openunmix,
    "demucs.demucs": demucs,
    "asteroid.masknn.recurrent": asteroid,
    "espnet2.asr.encoder.rnn_encoder": espnet,
    "espnet.nets.pytorch_backend.tacotron2.encoder": espnet_tacotron2,
    "stanza.models.common.packed_lstm": stanza,
}


def results(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Returns the output, and the gradients of all parameters that it depends on."""
    torch.manual_seed(1)  # for dropout
    output = call(model)
    gradients = torch.autograd.grad(output.square().mean(), list(model.parameters()), allow_unused=True)
    return output.detach(), [g for g in gradients if g is not None]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_accelerate_keeps_outputs_and_gradients(name, training):
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if os.environ.get("BIRNN_THIRD_PARTY"):
            raise
        pytest.skip(f"{error}: pip install --no-deps -r tests/third_party.txt")
    model, call = MODELS[name](package)
    model.train(training)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    lstms = [module for module in model.modules() if isinstance(module, nn.LSTM)]
    assert any(lstm.bidirectional for lstm in lstms)

    output, gradients = results(model, call)
    model.load_state_dict(state)  # running means
    report = accelerate(model)
    assert len(report.replaced) == len(lstms)
    assert report.left == {}
    calls = op_calls()
    ours, our_gradients = results(model, call)
    assert op_calls()["cpu_forward"] > calls["cpu_forward"]
    assert op_calls()["cpu_backward"] > calls["cpu_backward"]
    assert (ours - output).abs().max() <= 1e-5 * output.abs().max()
    assert len(our_gradients) == len(gradients) >= 4
    largest = max(g.abs().max() for g in gradients)
    for ours, theirs in zip(our_gradients, gradients, strict=True):
        # a gradient that should be 0, such as a bias's before batch norm, has the rounding errors of larger ones
        assert (ours - theirs).abs().max() <= 1e-4 * max(theirs.abs().max(), 1e-2 * largest)

    model.load_state_dict(state)
    assert sorted(restore(model)) == sorted(report.replaced)
    again, gradients_again = results(model, call)
    assert torch.equal(again, output)
    assert all(map(torch.equal, gradients_again, gradients))
