"""Sessions: every kind of file restores alike; depth, gray and alpha are kept; bad files do not stop the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from ens.data.images import Photo, read_photo, write_photo
from ens.export.formats import write_checked
from ens.export.hybrid import save_hybrid
from ens.networks import create_network
from ens.networks.checkpoints import CheckpointError, save_checkpoint
from ens.networks.steps import Network
from ens.runtime.session import Session, SessionError, open_session, restore_files, restore_photo
from ens.runtime.tiling import restore_tiled


def network() -> Network:
    torch.manual_seed(0)
    return create_network("plksr", dim=8, n_blocks=1, upscaling_factor=2)


def session(upscale: int = 1, channels: int = 3) -> Session:
    """Brightens nothing, enlarges by repetition: what comes out is known exactly."""
    return Session(nn.Upsample(scale_factor=upscale), 8, upscale, channels, {})


def photo(channels: int, dtype: type[np.uint8] | type[np.uint16], *, alpha: bool = False) -> Photo:
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    pixels = rng.integers(0, top, (13, 21, channels), dtype, endpoint=True)
    return Photo(pixels, rng.integers(0, top, (13, 21), dtype, endpoint=True) if alpha else None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, teacher = tmp_path_factory.mktemp("files"), network()
    paths = {name: folder / name for name in ("a.onnx", "hybrid.safetensors", "own.safetensors", "released.pth")}
    write_checked(teacher, paths["a.onnx"], photo=torch.rand(1, 3, 40, 40), facts={"task": "denoise"})
    save_hybrid(paths["hybrid.safetensors"], teacher, choices={}, facts={"task": "denoise"})
    save_checkpoint(paths["own.safetensors"], teacher, facts={"task": "denoise"})
    save_checkpoint(paths["released.pth"], teacher)
    return paths


def test_every_kind_of_file_restores_like_the_network(files: dict[str, Path]) -> None:
    image, teacher = torch.rand(2, 3, 19, 30), network().eval()
    with torch.no_grad():
        expected = teacher(image)
    for name, path in files.items():
        opened = open_session(path, threads=1)
        assert (opened.size_multiple, opened.upscale, opened.channels) == (1, 2, 3)
        assert (opened.restore(image) - expected).norm() <= 1e-5 * expected.norm(), name
        assert name == "released.pth" or opened.facts["task"] == "denoise"


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_tiny_images_are_restored(files: dict[str, Path], size: tuple[int, int]) -> None:
    for name in ("a.onnx", "released.pth"):
        assert open_session(files[name]).restore(torch.rand(1, 3, *size)).shape == (1, 3, 2 * size[0], 2 * size[1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("network_channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
def test_depth_gray_and_alpha_are_kept(dtype: type[np.uint8] | type[np.uint16], channels: int, network_channels: int,
                                       alpha: bool) -> None:
    source = photo(channels, dtype, alpha=alpha)
    restored = restore_photo(session(channels=network_channels), source)
    assert restored.pixels.dtype == dtype
    assert np.array_equal(restored.pixels, source.pixels)
    assert (restored.alpha is None) if source.alpha is None else np.array_equal(restored.alpha, source.alpha)


def test_alpha_grows_with_the_picture() -> None:
    source = photo(3, np.uint16, alpha=True)
    restored = restore_photo(session(upscale=2), source, tile_px=16, overlap_px=8)
    assert np.array_equal(restored.pixels, source.pixels.repeat(2, 0).repeat(2, 1))
    assert restored.alpha is not None and restored.alpha.shape == (26, 42) and restored.alpha.dtype == np.uint16


def test_a_network_of_six_channels_is_no_photo_network() -> None:
    with pytest.raises(ValueError, match="6 channels"):
        restore_photo(session(channels=6), photo(3, np.uint8))


def test_one_bad_file_is_reported_and_the_rest_go_on(tmp_path: Path) -> None:
    source, target, done = tmp_path / "in", tmp_path / "out", list[str]()
    source.mkdir()
    for name, dtype in (("a.png", np.uint8), ("c.tif", np.uint16), ("d.png", np.uint16)):
        write_photo(source / name, photo(3, dtype))
    (source / "b.png").write_bytes((source / "a.png").read_bytes()[:60])
    (source / "e.jpg").write_bytes(b"")
    (source / "notes.txt").write_text("no image", encoding="utf-8")
    failures = restore_files(session(), source, target, on_progress=lambda n, total, name: done.append(name))
    assert [error.path.name for error in failures] == ["b.png", "e.jpg"]
    assert done == ["a.png", "b.png", "c.tif", "d.png", "e.jpg"]
    assert sorted(path.name for path in target.iterdir()) == ["a.png", "c.tif", "d.png"]
    for name in ("a.png", "c.tif", "d.png"):
        assert np.array_equal(read_photo(target / name).pixels, read_photo(source / name).pixels)


def test_progress_tells_what_is_done_of_an_image_in_tiles(tmp_path: Path) -> None:
    write_photo(tmp_path / "a.png", Photo(np.zeros((200, 80, 3), np.uint8)))
    seen: list[tuple[int, str]] = []
    assert not restore_files(session(), tmp_path / "a.png", tmp_path / "out.png", tile_px=64,
                             on_progress=lambda done, total, name: seen.append((done, name)))
    assert seen[0] == (0, "a.png, 24%") and seen[-1] == (1, "a.png") and len(seen) > 3
    assert [name for _, name in seen[:-1]] == sorted(name for _, name in seen[:-1])


def test_a_restored_image_that_is_nan_leaves_no_file(tmp_path: Path) -> None:
    write_photo(tmp_path / "in.png", photo(3, np.uint8))
    broken = Session(lambda image: image / 0 * 0, 8, 1, 3, {})
    failures = restore_files(broken, tmp_path / "in.png", tmp_path / "out.png")
    assert "NaN" in str(failures[0]) and not (tmp_path / "out.png").exists()


def test_one_file_goes_to_a_file_or_into_a_folder(tmp_path: Path) -> None:
    write_photo(tmp_path / "in.png", photo(3, np.uint8))
    assert restore_files(session(), tmp_path / "in.png", tmp_path / "new" / "out.tif") == []
    assert restore_files(session(), tmp_path / "in.png", tmp_path / "new") == []
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["in.png", "out.tif"]


def test_sources_are_never_overwritten(tmp_path: Path) -> None:
    write_photo(tmp_path / "in.png", photo(3, np.uint8))
    for source, target in ((tmp_path, tmp_path), (tmp_path / "in.png", tmp_path / "in.png"),
                           (tmp_path / "in.png", tmp_path)):
        with pytest.raises(ValueError, match="overwritten"):
            restore_files(session(), source, target)


def test_a_folder_without_images_is_said(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="no images"):
        restore_files(session(), tmp_path / "in", tmp_path / "out")


def test_a_folder_is_not_restored_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_photo(tmp_path / "in" / "a.png", photo(3, np.uint8))
    write_photo(tmp_path / "out.png", photo(3, np.uint8))
    with pytest.raises(ValueError, match=r"in is a folder, so the target is one too; .*out\.png is a file"):
        restore_files(session(), tmp_path / "in", tmp_path / "out.png")


@pytest.mark.parametrize(("content", "words"), [
    (b"<!DOCTYPE html><html></html>", "is a web page"), (b"", "is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a git-lfs pointer")])
def test_an_onnx_file_that_is_something_else_says_what(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        open_session(tmp_path / "m.onnx")


def test_files_of_another_kind_are_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    (tmp_path / "cut.onnx").write_bytes(files["a.onnx"].read_bytes()[:1000])
    with pytest.raises(SessionError, match="damaged"):
        open_session(tmp_path / "cut.onnx")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_session(tmp_path / "none.onnx")
    with pytest.raises(SessionError, match=r"\.onnx, .*\.safetensors"):
        open_session(tmp_path / "net.tflite")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_session(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="threads"):
        open_session(files["a.onnx"], threads=0)


def test_an_onnx_file_of_somebody_else_is_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    import onnx

    model = onnx.load(files["a.onnx"])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(SessionError, match="not exported by ens"):
        open_session(tmp_path / "other.onnx")


def test_weights_that_other_tools_put_beside_an_onnx_file_are_found_or_named(
        tmp_path: Path, files: dict[str, Path]) -> None:
    onnx.save(onnx.load(files["a.onnx"]), tmp_path / "b.onnx", save_as_external_data=True, location="b.data",
              size_threshold=200)
    image, expected = torch.rand(1, 3, 16, 16), open_session(files["a.onnx"])
    assert torch.equal(open_session(tmp_path / "b.onnx").run(image), expected.run(image))
    (tmp_path / "b.data").rename(tmp_path / "elsewhere.data")
    with pytest.raises(SessionError, match=r"b.onnx: its weights are in a file of their own.*b\.data$"):
        open_session(tmp_path / "b.onnx")


@pytest.mark.parametrize("tile", [1, 16, 32])
def test_a_tile_no_larger_than_the_usual_overlap_takes_a_smaller_one(tmp_path: Path, tile: int) -> None:
    write_photo(tmp_path / "in.png", photo(3, np.uint8))
    assert restore_files(session(), tmp_path / "in.png", tmp_path / "out.png", tile_px=tile) == []
    assert np.array_equal(read_photo(tmp_path / "out.png").pixels, read_photo(tmp_path / "in.png").pixels)


def test_tiles_that_cannot_be_are_refused_before_anything_is_restored(tmp_path: Path) -> None:
    write_photo(tmp_path / "in.png", photo(3, np.uint8))
    with pytest.raises(ValueError, match="smaller than the tile of 32 px, got 32"):
        restore_files(session(), tmp_path / "in.png", tmp_path / "out" / "a.png", tile_px=32, overlap_px=32)
    assert not (tmp_path / "out").exists()


def test_a_tile_that_the_grid_enlarges_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        write_photo(tmp_path / "in" / name, photo(3, np.uint8))
    coarse, said = Session(nn.Identity(), 128, 1, 3, {}), list[str]()
    assert restore_files(coarse, tmp_path / "in", tmp_path / "out", tile_px=200, on_event=said.append) == []
    assert said == ["tiles of 256 px instead of 200: they start at multiples of 128 px and overlap by 50"]


def test_what_a_target_cannot_hold_is_found_before_the_network_runs(tmp_path: Path) -> None:
    write_photo(tmp_path / "in.png", photo(3, np.uint16))
    ran = list[int]()
    counting = Session(lambda image: ran.append(1) or image, 8, 1, 3, {})
    failures = restore_files(counting, tmp_path / "in.png", tmp_path / "out.jpg")
    assert "holds 8 bits" in str(failures[0]) and not ran and not (tmp_path / "out.jpg").exists()


def test_a_folder_run_says_what_it_passed_over_and_metadata_are_carried(tmp_path: Path) -> None:
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    (tmp_path / "in" / "notes.txt").write_text("no image", encoding="utf-8")
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    exif = PIL.Image.Exif()
    exif[0x010F] = "maker"
    PIL.Image.fromarray(photo(3, np.uint8).pixels).save(tmp_path / "in" / "a.png", exif=exif)
    said = list[str]()
    assert restore_files(session(), tmp_path / "in", tmp_path / "out", on_event=said.append) == []
    assert len(said) == 1 and all(name in said[0] for name in ("deeper", "notes.txt", "gone.png"))
    with PIL.Image.open(tmp_path / "out" / "a.png") as restored:
        assert restored.getexif()[0x010F] == "maker"


def test_memory_that_runs_out_names_the_image_and_the_rest_go_on(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    released = list[int]()
    for name, side in (("a.png", 20), ("b.png", 60), ("c.png", 20)):
        write_photo(tmp_path / "in" / name, Photo(np.zeros((side, side, 3), np.uint8)))

    def run(image: Tensor) -> Tensor:
        if image.shape[-1] > 50:
            raise MemoryError
        return image

    failures = restore_files(Session(run, 1, 1, 3, {}, lambda: released.append(1)), tmp_path / "in", tmp_path / "out")
    assert [failure.path.name for failure in failures] == ["b.png"] and "memory ran out" in str(failures[0])
    assert len(released) == 3 and len(list((tmp_path / "out").iterdir())) == 2


def test_a_session_scores_in_the_tiles_that_it_restores_in() -> None:
    """A network with statistics of what it is given: in tiles it gives something else than in one piece."""
    session = Session(lambda image: image - image.mean((2, 3), keepdim=True), 8, 1, 3, {})
    image = torch.rand(1, 3, 100, 140)
    tiled = session.tiled(48, 16)
    assert torch.equal(tiled.restore(image), restore_tiled(session.run, image, tile_px=48, overlap_px=16,
                                                           size_multiple=8))
    assert not torch.allclose(tiled.restore(image), session.restore(image))
    assert torch.equal(tiled.restore(image[..., :40, :40]), session.restore(image[..., :40, :40]))
    assert str(tiled.tiles) == "tiles of 48 px that overlap by 16 px" and session.tiled(None, None).tiles is None
