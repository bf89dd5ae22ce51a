"""Errors of runtimes: lack of memory is MemoryError, the rest one sentence; a batch goes on after either."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort
from torch import Tensor

from ens.data.images import Photo, read_photo, write_photo
from ens.export.failures import RuntimeFailure, translating
from ens.export.formats import write_checked
from ens.networks import create_network
from ens.runtime.session import Session, open_session, restore_files, restore_photo

OUT_OF_MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("std::bad_alloc"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ort.RuntimeException("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : While running Conv: bad allocation"),
    ort.Fail("[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer of size 9"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: f"{type(error).__name__} {str(error)[-20:]}")
def test_lack_of_memory_in_any_runtime_falls_back_to_tiles(error: Exception) -> None:
    pixels, said = np.random.default_rng(0).integers(0, 255, (150, 200, 3), np.uint8), list[str]()

    def run(image: Tensor) -> Tensor:
        if image.shape[-1] > 100:
            raise error
        return image

    restored = restore_photo(Session(run, 1, 1, 3, {}), Photo(pixels), on_event=said.append)
    assert np.array_equal(restored.pixels, pixels) and "tiles of 100 px" in said[0]


def test_what_a_library_wrapped_is_still_lack_of_memory() -> None:
    for outer in (ort.Fail("node failed"), RuntimeError("export failed")):
        with pytest.raises(MemoryError, match="failed"), translating():
            try:
                raise MemoryError
            except MemoryError as error:
                raise outer from error


def test_other_errors_of_runtimes_name_themselves_and_pythons_own_pass() -> None:
    assert not issubclass(ort.InvalidArgument, RuntimeError | ValueError), "or there would be nothing to translate"
    with pytest.raises(RuntimeFailure, match=r"^InvalidArgument: \[ONNXRuntimeError\] : 2$"), translating():
        raise ort.InvalidArgument("[ONNXRuntimeError] : 2\nGot invalid dimensions")
    for error in (ValueError("a"), RuntimeError("shapes do not match"), FileNotFoundError(2, "b"), TypeError("c")):
        with pytest.raises(type(error)) as caught, translating():
            raise error
        assert caught.value is error


def test_a_folder_goes_on_after_what_onnx_runtime_refuses(tmp_path: Path) -> None:
    network, sizes = create_network("plksr", dim=8, n_blocks=1, upscaling_factor=1), {"a": 20, "b": 40, "c": 24}
    write_checked(network, tmp_path / "a.onnx", photo=torch.rand(1, 3, 40, 40))
    opened, source = open_session(tmp_path / "a.onnx"), tmp_path / "in"
    source.mkdir()
    for name, side in sizes.items():
        write_photo(source / f"{name}.png", Photo(np.zeros((side, side, 3), np.uint8)))

    def run(image: Tensor) -> Tensor:  # a rank that the file does not take
        return opened.run(image[0] if image.shape[-1] == 40 else image)

    failures = restore_files(Session(run, 1, 1, 3, {}, opened.release), source, tmp_path / "out")
    assert [failure.path.name for failure in failures] == ["b.png"] and "InvalidArgument" in str(failures[0])
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == ["a", "c"]
    assert read_photo(tmp_path / "out" / "c.png").pixels.shape == (24, 24, 3)
