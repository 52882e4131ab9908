"""The fuzzer's corpus and some random cases pass. `make fuzz N=10000` runs thousands."""

from __future__ import annotations

import dataclasses
import os
import re

import pytest
from fuzz_case import Case, check
from fuzz_strategy import cases
from helpers import TOLERANCE
from hypothesis import HealthCheck, given, settings

# Past failures and corner cases. A case that was the fuzzer's own mistake stays, too.
CORPUS = [
    # no sequence of the batch has a step, so no output depends on an input
    Case(T=1, bias=False, lengths=(0,), used=1),
    # x is expanded over the batch, and one sequence has no steps
    Case(T=1, B=2, bias=False, autocast="bfloat16", x_layout="expanded", lengths=(0, 1), used=0),
    Case(T=1, H=2, bias=False, dtype="float16", zoneout=(0.3, 0.2), used=0),
    Case(T=0), Case(I=0), Case(H=0), Case(B=0, layers=2, bidirectional=True, hx="plain"),
    # only the reverse direction's weights require gradients, or only the last layer's
    Case(T=3, B=2, I=3, H=5, bidirectional=True, grads=0b111_1000_0000), Case(T=3, B=2, I=3, H=5, layers=2, grads=0b111_1000_0000),
    # infinities and NaN stand beyond the sequences' ends
    Case(T=4, B=3, I=2, H=17, layers=2, bidirectional=True, lengths=(4, 0, 2), padding="nan", x_layout="gaps", output="last"),
    Case(T=4, B=3, I=2, H=9, bidirectional=True, dtype="bfloat16", lengths=(3, 2, 1), padding="inf", recompute=True),
    Case(T=5, B=2, I=3, H=8, layers=2, bidirectional=True, packed="unsorted", lengths=(1, 5), batch_first=True, hx="transposed"),
    Case(T=5, B=3, I=3, H=8, proj_size=3, layer_norm=True, zoneout=(0.2, 0.5), recurrent_dropout=0.3, learned_state=True, cells=True),
    # extended options that leave no layer with a variant
    Case(T=4, B=2, I=3, H=5, layers=2, bidirectional=True, learned_state=True), Case(T=3, B=2, I=3, H=5, layers=2, recurrent_dropout=0.3, training=False),
    # masks are drawn for the sorted sequences of a packed batch
    Case(B=3, H=2, bias=False, zoneout=(0.3, 0.2), lengths=(2, 1, 2), packed="unsorted", used=0),
    Case(T=4, B=3, I=2, H=5, bidirectional=True, reset=((0, 0), (2, 2), (1, 1)), lengths=(2, 3, 4), packed="unsorted", cells=True),
    # float16 with large weights: the gradient of one unit's h_0 has 6 times nn.LSTM's error, others have less than it
    Case(T=3, B=7, I=2, layers=2, bidirectional=True, dtype="float16", hx="plain", gain=3.0, used=1, seed=461),
    # the gradient of x is one float16 value, a sum of 264 terms that cancel
    Case(T=1, B=4, H=33, bidirectional=True, bias=False, dtype="float16", x_layout="expanded", lengths=(0, 0, 0, 1), gain=3.0, grads=1, used=1, seed=290),
    Case(T=5, B=3, I=3, H=8, bidirectional=True, reset=((0, 0), (2, 1), (4, 2)), lengths=(5, 2, 0), cells=True, used=8),
    # on the CPU a GRU's results under autocast are float32
    Case(T=1, cell="gru", bias=False, batched=False, autocast="bfloat16", training=False, used=0),
    # resets of a GRU: of the first step, at a sequence's end, and beyond it
    Case(T=5, B=3, I=3, H=8, cell="gru", layers=2, bidirectional=True, hx="plain", reset=((0, 0), (2, 1), (4, 2), (1, 1)), lengths=(5, 2, 0)),
    Case(T=4, B=3, I=2, H=5, cell="gru", bidirectional=True, reset=((0, 0), (2, 2), (1, 1)), lengths=(2, 3, 4), packed="unsorted", output="last"),
    Case(T=4, B=3, I=2, H=17, cell="gru", layers=2, bidirectional=True, lengths=(4, 0, 2), padding="nan", x_layout="gaps", output="last"),
    Case(T=0, cell="gru"), Case(B=0, cell="gru", layers=2, bidirectional=True, hx="plain"), Case(T=3, B=2, I=3, H=5, cell="gru", learned_state=True),
    # the same of plain cells
    Case(T=5, B=3, I=3, H=8, cell="rnn_tanh", layers=2, bidirectional=True, hx="plain", reset=((0, 0), (2, 1), (4, 2), (1, 1)), lengths=(5, 2, 0)),
    Case(T=4, B=3, I=2, H=5, cell="rnn_relu", bidirectional=True, dtype="float64", reset=((0, 0), (2, 2), (1, 1)), lengths=(2, 3, 4), packed="unsorted", output="last"),
    Case(T=4, B=3, I=2, H=17, cell="rnn_tanh", layers=2, bidirectional=True, lengths=(4, 0, 2), padding="nan", x_layout="gaps", output="last"),
    Case(T=0, cell="rnn_tanh"), Case(B=0, cell="rnn_relu", layers=2, bidirectional=True, hx="plain"), Case(T=3, B=2, I=3, H=5, cell="rnn_tanh", learned_state=True),
]  # fmt: skip


@pytest.mark.parametrize("case", CORPUS, ids=repr)
def test_corpus(case, device):
    check(dataclasses.replace(case, device=device))


def test_random_cases(device):
    """FUZZ_CASES sets their number (by default 40). Each run has the same cases; `make fuzz` draws new ones."""
    count = int(os.environ.get("FUZZ_CASES", "40" if device == "cpu" else "10"))

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(cases(device))
    def run(case: Case) -> None:
        check(case)

    run()


def test_a_failure_names_a_line_that_reproduces_it(monkeypatch):
    """With impossible tolerances every case fails."""
    monkeypatch.setattr("fuzz_case.TOLERANCES", dict.fromkeys(TOLERANCE, -1.0))
    monkeypatch.setattr("fuzz_case.WORSE_THAN_TORCH", -1)
    monkeypatch.setenv("BIRNN_CPU_ISA", "generic")
    case = Case(T=3, B=2, lengths=(3, 1), padding="nan")
    with pytest.raises(AssertionError, match=r"output y: relative error") as caught:
        check(case)
    line = re.search(r"reproduce by: (.*)", str(caught.value)).group(1)
    assert line == "BIRNN_CPU_ISA=generic python tests/fuzz \"Case(T=3, B=2, lengths=(3, 1), padding='nan')\""
    assert eval(re.search(r'"(.*)"', line).group(1), {"Case": Case}) == case
