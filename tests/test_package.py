"""The package's own order: who imports whom, how long a function is, what old pickles find."""

from __future__ import annotations

import ast
import base64
import graphlib
import io
import lzma
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import all_near
from torch import nn

import birnn_ext
from birnn_ext import LSTM, BiRNN

PACKAGE = Path(birnn_ext.__file__).parent
TREES = {
    ".".join(("birnn_ext", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): ast.parse(
        path.read_text()
    )
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = {*TREES, "birnn_ext._C"}


def imported(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Modules of the package that a file imports anywhere, for type checkers alone, too; and the names from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield (submodule, None) if submodule in MODULES else (node.module, alias.name)


def test_no_circle_of_imports():
    graph = {name: {module for module, _ in imported(tree)} - {name} for name, tree in TREES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_the_checks_of_imports_see_circles_and_names():
    tree = ast.parse("if x:\n    from birnn_ext.ops import _f\n    from birnn_ext import layer\nimport birnn_ext.onnx")
    assert {*imported(tree)} == {("birnn_ext.ops", "_f"), ("birnn_ext.layer", None), ("birnn_ext.onnx", None)}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


ALONE = """
import importlib, os, sys, types, torch
for name in sys.argv[2:]:
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, name
        continue
    package = types.ModuleType("birnn_ext")  # without what its __init__ imports
    package.__path__ = [sys.argv[1]]
    sys.modules["birnn_ext"] = package
    importlib.import_module(name)
    os._exit(0)
print("imported all")
"""


def test_each_module_imports_alone():
    names = [name for name in TREES if name.count(".") == 1 and not name.endswith(("__main__", ".mnist"))]
    assert {"birnn_ext.modules", "birnn_ext.route", "birnn_ext.onnx", "birnn_ext.integrations"} <= set(names)
    done = subprocess.run([sys.executable, "-c", ALONE, str(PACKAGE), *names], capture_output=True, text=True)
    assert "imported all" in done.stdout, done.stderr


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def defined(tree: ast.AST) -> set[str]:
    """Underscored names that a file gives: functions, classes, variables, attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if is_private(name)}


def test_no_underscored_name_crosses_a_file():
    pytorchs = {*dir(nn.LSTM(1, 1))}
    of = {name: defined(tree) for name, tree in TREES.items()}
    crossing = []
    for name, tree in TREES.items():
        others = set().union(*(names for other, names in of.items() if other != name)) - of[name] - pytorchs
        crossing += [(name, what) for _, what in imported(tree) if what and is_private(what)]
        attributes = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        crossing += [(name, attribute) for attribute in attributes if attribute in others]
    assert not crossing


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def private_of_torch(tree: ast.AST) -> list[str]:
    """Names that PyTorch has underscored, but for methods of modules and tensors."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("torch.")]
        elif isinstance(node, ast.Attribute) and dotted(node).startswith(("torch.", "forward_ad.")):
            found.append(dotted(node))
    return [name for name in found if any(is_private(part) for part in name.split("."))]


def test_private_interfaces_of_pytorch_stand_in_one_file():
    of = {name: private_of_torch(tree) for name, tree in TREES.items()}
    assert of.pop("birnn_ext._torch_private")
    assert not {name: found for name, found in of.items() if found}


class Length(NamedTuple):
    name: str
    lines: int


def lengths(tree: ast.AST) -> Iterator[Length]:
    """Lines of each function, without those of its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = node.body[0]
            said = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            lines = (text.end_lineno or 0) - text.lineno + 1 if said else 0
            yield Length(node.name, (node.end_lineno or 0) - node.lineno + 1 - lines)


def test_functions_are_short():
    found = {name: [one for one in lengths(tree) if one.lines > 60] for name, tree in TREES.items()}
    assert not {name: functions for name, functions in found.items() if functions}
    assert max(one.lines for one in lengths(ast.parse("def f():\n    '''a\n    b'''\n    return 1"))) == 2


# A BiRNN and an LSTM with options, pickled by the version before this order of the files (birnn_ext 0.1.0, torch 2.14),
# their parameters multiples of 1/4, as LZMA in base 85.
OLD_PICKLE = (
    "T>t<81poj4|NsC0{{TP%4tVy}u_E=^hgp6mES^?{wgc@VOOHe^f%L@mr-Wl8x_uQbGT0hRk-2B`PJSH&CgDvyZOg?xodeQmDUR8y"
    ")P-?j&FY3wa!<SMlXk(5?ruCKTWXs53dISOW<gise=~;dG$o2xW0f^Mt3j1RiauI2G<yg(V$l-cqZAh*O5Q*sqAbv1|2N5acFwYM"
    "e=PKCHb=yl0N>oaEb<FVV7lop#<1D8h9BkzniOqZ9@7ULF`vgCq*j!!vB7Z@AWfhUh#DGAE1mj;S2s6X>inf!$`)JSZo}*>owCVj"
    "?rHNfXU-XfT@9m^xruGNqNl#1HzO5Y5*BJ?&#?NXyjNs7lVHJIJkf6ACWn@@X%l_j7JyW=G<;2B$tiCdffh!+e<2?mAS+egFgFI="
    "2yRxdo*1w|MIp2Ih!1kKi~=Q|p-?ZmE_ICOgoM|^+YIL&KxHc;I*NJ-!JNz>U@T_N2PIJ3fJV?-r=%2@_ukEdbvs!V@W7eIdZAIO"
    "Wy990K!pweIU*#VG0d|Fxc2t?5;qwcVNA~aRJCxAXIA<`qHih3O1Q@sfwe6^;?G4}e3Oo93A`|^AzBlrAnL{EqRCv0Cz*RrM*BZH"
    "buvtT%Y)49M~0h!-%YV*hp>bsUH5?zNtIZMZzP|87pFxX8(S*L2e*K3D-jmU)Uqrc0DinQBI-q33B1oZB<tKfwsPnNOpRU>fA%_?"
    "sHIJBf_2qXxbrhZF#7xnHL-l-?fGaPc-}=9Kx)Mx|NG@}u`621rpLFrY;{w!p05y5C@HjXTji$t>~pGC7!yE=53ySg)wYPc&Dzg<"
    "NmJF(^uop}6eDW4@;Y@t@xdVzmiWF02)J?z!FCuGgaDZ=qUF2-d?Z~hQgLafw{x)U1$sishfW?+&x8McAindTnD7i%#^rvp+zLqW"
    "vGEhzD(CbqrxL<n)*sfU0L1F%yJ&CO3ywpBJJWcrgOV2s-r!xa;_>xUHrnsVPzf}w(6$A5<gBfhN}sSqiJTlPzki916?9EQ5eniO"
    "g@NW&`05P!MY6l>t(f$>&a0^NezNAQB@}-(EN`ehN&m~7yF4`i0Z6iOag;~ox6K(2c&F9RS#tqfm^+rg{!P)n3ZR1D?6_DL2Rfq`"
    "N7!q@`n>v>z)1Id0u}R@k8lS0FBQ%hc%0T9Ev&US`5_Y0xjo)hIAjWN((h_ypmRe$;6a63yUw<Hl^nU)as5;b>ThOr!Mc<AGoQ@5"
    "TDh0y_WR$94UDY}@@Yg(kS`EyKpF+I7k=Yu>ety08&gNP5Lom2n+H4oG=@6)ngEap+QB-aUiOVk6UTN_au{d*z&zJL#-5r2g4Gw0"
    "aeFA&Nc0AmYB&u4^B}Q^XptW*0;|tPV9ZjuLx^u@b(4M$FG~$%dK;MK85M(3Uz#R#3G3;zCt4Z<W6{Xq_O*Buq%Zu(6D$w>;NH9J"
    "Z&@ax|0~{Cr}mc*lbL8CXXZ2xc*Jy&Qm87zGn(B_Kg!Eu9jARFiIvnz%50uIKd#{ikMi%T+&@3hPsbzCy?3{qvWpO~#z;6<uGOmE"
    "y5H&~XgXtWwvq{RukdG%D<T4{X7sa*M=w`fM^^!o=Xl<4E^rfC&nqH-ak(NulW_~~s+&!0Z5;20yKo9IAMtZ}8GrgQ?f6Z&z5{sA"
    "w8IAylf1@KyQ7cyV+!??;aG=v!Gu*j0H+vE3^^O(@5@Yabvh6E6$*|xi}$e7X~VUJL4@UL%NAwPrmoYJocp4!^~gLCVb;l`olXkt"
    "92zx#s5PbaxIZ9Z0eC%m@QuDFG%cF~%)K>M#V51rfk>VPq?+V7ugI{xmmq@w|HilBE&"
)


def test_a_model_pickled_by_an_earlier_version_loads():
    model = pickle.loads(lzma.decompress(base64.b85decode(OLD_PICKLE)))
    classifier, lstm = model.eval()
    assert (type(classifier), type(classifier.lstm), type(lstm)) == (BiRNN, LSTM, LSTM)
    assert (lstm.recompute, lstm.zoneout, lstm.layer_norm, lstm.learned_state) == (True, (0.25, 0.5), True, True)
    x = torch.arange(6.0).view(3, 2, 1) / 4
    # as that version computed
    all_near([classifier(x.transpose(0, 1))], [torch.tensor([[-0.475972414], [-0.474019527]])])
    y, _ = lstm(x)
    all_near([y[:, 0, 0]], [torch.tensor([-0.109675124, -0.074609071, -0.065850154])])
    file = io.BytesIO()
    torch.save(model, file)
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(again[1](x)[0], y)
