"""What `ens export` writes beside the ONNX file, on a run of the smallest study."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from ens import pipeline
from ens.config import load_study
from ens.export.formats import ExportError
from ens.run_folder import RunFolder
from ens.runtime.process import Control
from ens.runtime.session import open_session

STUDY = """
task: {name: denoise, sigma_255: 25}
teacher: builtin:denoise_demo
library: builtin:denoise_demo
slots: {latent: [conv×1], encoder_level3: [conv×1]}
data: {train: "builtin:train-photos", validation: "builtin:validation-photos", crop_px: 64, limit: 2}
search: {engine: exhaustive, objectives: [psnr_drop_db, macs], budget: 4, batch_size: 4}
"""


def searched(folder: Path) -> RunFolder:
    (folder / "tiny.yaml").write_text(STUDY, encoding="utf-8")
    run = RunFolder.start(load_study(folder / "tiny.yaml"), folder / "run")
    pipeline.search(run)
    return run


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    run = searched(tmp_path)
    for options in ({"formats": ("pt2",)}, {"size": (64, 64)}):
        for name in ("int8", "bundle"):
            with pytest.raises(ExportError, match="made of the ONNX file with free sides"):
                pipeline.export(run, "1-1", companions=[name], **options)  # type: ignore[arg-type]
    assert not (run.path / "export").exists()


@pytest.mark.slow
def test_one_export_writes_int8_bundle_and_plain_code(tmp_path: Path) -> None:
    run, said = searched(tmp_path), list[str]()
    paths = pipeline.export(run, "1-1", Control(say=said.append), companions=["plain", "int8", "bundle"])
    assert [path.relative_to(run.path / "export").as_posix() for path in paths] == [
        "1-1.onnx", "1-1.int8.onnx", "1-1.bundle", "1-1.plain/hybrid.py"]
    model, int8, bundle, plain = paths
    card = yaml.safe_load(int8.with_name(f"{int8.name}.yaml").read_text(encoding="utf-8"))
    assert float(card["int8_psnr_cost_db"]) <= 0.2 and float(card["int8_times_as_fast_threads_1"].split()[0]) > 0
    assert card["model"] == int8.name and f"{card['int8_psnr_cost_db']} dB" in " ".join(said)
    assert (bundle / model.name).read_bytes() == model.read_bytes() and (bundle / "samples" / "2.png").exists()
    image = torch.rand(1, 3, 70, 50)
    exact, coarse = open_session(model).restore(image), open_session(int8).restore(image)
    assert 0 < (exact - coarse).norm() / exact.norm() < 0.05
    namespace: dict[str, object] = {"__name__": __name__, "__file__": str(plain)}
    exec(compile(plain.read_text(encoding="utf-8"), str(plain), "exec"), namespace)
    with torch.no_grad():
        own = namespace["load_network"]()(image)  # type: ignore[operator]
    torch.testing.assert_close(own, exact, atol=1e-4, rtol=0)
