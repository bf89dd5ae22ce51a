"""What every test shares: one thread, no network, reproducible hypothesis."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("ens", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ens")
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _offline() -> Iterator[None]:
    """A test that reaches out of this machine fails."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ConnectionRefusedError(f"tests are offline, one asked for {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield
