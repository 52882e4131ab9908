"""Models of well-known packages, without their weights, compute the same before and after accelerate.

tests/third_party.txt lists the packages. They are installed without their dependencies, so that torch stays the same.
If one is missing its test is skipped, but fails if BIRNN_THIRD_PARTY is set, as CI does.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
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


def asteroid(package: ModuleType, cell: str = "LSTM") -> Model:
    """Returns a speech separator of dual-path RNNs, which have many short sequences."""
    features = torch.randn(2, 16, 50)
    model = package.DPRNN(16, n_src=2, bn_chan=12, hid_size=10, chunk_size=10, n_repeats=2, rnn_type=cell)
    return model, lambda model: model(features)


def espnet(package: ModuleType, cell: str = "LSTM") -> Model:
    """Returns a speech recogniser's encoder: packed sequences, with projections and subsampling between layers."""
    features, lengths = torch.randn(3, 21, 12), torch.tensor([21, 17, 6])
    options = {"num_layers": 3, "hidden_size": 10, "output_size": 8, "subsample": (2, 1, 1)}
    model = package.RNNEncoder(12, rnn_type=cell.lower(), **options)
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


def espnet_cbhg(package: ModuleType) -> Model:
    """Returns the part of Tacotron that makes a linear spectrogram of a mel one: a GRU after convolutions."""
    spectrogram, lengths = torch.randn(3, 15, 8), torch.tensor([15, 9, 2])
    sizes = {"conv_bank_layers": 3, "conv_bank_chans": 8, "conv_proj_chans": 8, "highway_layers": 1}
    model = package.CBHG(8, 6, highway_units=8, gru_units=12, **sizes)
    return model, lambda model: model(spectrogram, lengths)[0]


def torchaudio(package: ModuleType) -> Model:
    """Returns a vocoder that makes samples of a spectrogram, one after another: two GRUs of one direction."""
    samples, spectrogram = torch.randn(2, 1, 4 * (9 - 4)), torch.randn(2, 1, 6, 9)
    sizes = {"n_res_block": 1, "n_rnn": 16, "n_fc": 12, "kernel_size": 5, "n_freq": 6, "n_hidden": 8, "n_output": 8}
    model = package.WaveRNN(upsample_scales=[2, 2], n_classes=5, hop_length=4, **sizes)
    return model, lambda model: model(samples, spectrogram)


MODELS = {  # the module that has the class, what makes the model, and PyTorch's module in it
    "openunmix": ("openunmix.model", openunmix, nn.LSTM),
    "demucs": ("demucs.demucs", demucs, nn.LSTM),
    "asteroid": ("asteroid.masknn.recurrent", asteroid, nn.LSTM),
    "asteroid, GRU": ("asteroid.masknn.recurrent", partial(asteroid, cell="GRU"), nn.GRU),
    "espnet": ("espnet2.asr.encoder.rnn_encoder", espnet, nn.LSTM),
    "espnet, GRU": ("espnet2.asr.encoder.rnn_encoder", partial(espnet, cell="GRU"), nn.GRU),
    "espnet's Tacotron 2": ("espnet.nets.pytorch_backend.tacotron2.encoder", espnet_tacotron2, nn.LSTM),
    "espnet's CBHG, GRU": ("espnet.nets.pytorch_backend.tacotron2.cbhg", espnet_cbhg, nn.GRU),
    "stanza": ("stanza.models.common.packed_lstm", stanza, nn.LSTM),
    "torchaudio, GRU": ("torchaudio.models.wavernn", torchaudio, nn.GRU),
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
    module, make, theirs = MODELS[name]
    try:
        package = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if os.environ.get("BIRNN_THIRD_PARTY"):
            raise
        pytest.skip(f"{error}: pip install --no-deps -r tests/third_party.txt")
    model, call = make(package)
    model.train(training)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rnns = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    assert {type(rnn) for rnn in rnns} == {theirs}
    assert any(rnn.bidirectional for rnn in rnns) or make is torchaudio

    output, gradients = results(model, call)
    model.load_state_dict(state)  # running means
    report = accelerate(model)
    assert len(report.replaced) == len(rnns)
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
