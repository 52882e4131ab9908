from __future__ import annotations

import pytest
import torch

import birnn_ext


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Adds to saved results what was measured, and on which machine."""
    machine_info["birnn_ext"] = birnn_ext.build_info()
    machine_info["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
