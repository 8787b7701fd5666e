"""What `softseg evaluate` of folders of predictions costs: hippocampus_msd, two classes, one folder of soft maps and one of masks.

Run:     python tests/benchmarks/bench_evaluate.py [--subjects 120]
Target: all 120 cases of both folders, from the start of the command to its report, in under 60 s on 2 cores; again, with nothing
left to judge, the time of the report
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import Headline, record
from scipy import ndimage

from softseg_dist import Bids
from softseg_dist.data.volume import write_volume

HEADLINES = (
    Headline(
        key="softseg_evaluate_s", what="`softseg evaluate` of 120 hippocampi, two folders, with its report", unit="s", at_most=60
    ),
)
DATA = (
    'Bids("hippocampus_msd", image="T1w", labels={"anterior": "label-hippocampus_dseg:1", "posterior": "label-hippocampus_dseg:2"})'
)
STUDY = f'''"""Whose maps of the hippocampus are better?"""
from softseg_dist import Bids, MonteCarlo, Recipe, Study

STUDY = Study(name="hippocampi", question="Whose maps of the hippocampus are better?", splits=MonteCarlo(), subjects=SUBJECTS,
              candidates={{"masks": Recipe()}}, control="masks", data={DATA})
'''


def main(subjects: int) -> None:
    """Write two folders of predictions, then measure the command, and the same command again."""
    root = Path(os.environ.get("SOFTSEG_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (root / "hippocampus_msd").is_dir():
        print("skipped: SOFTSEG_TEST_DATA does not name a folder with hippocampus_msd")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "study.py").write_text(STUDY.replace("SUBJECTS", str(subjects)))
        _predict(root, folder, subjects)
        command = [sys.executable, "-m", "softseg_dist.cli.main", "evaluate", "study.py", "--data-root", str(root.absolute())]
        command += ["--predictions", "masks=masks", "--predictions", "soft=soft"]
        seconds = {}
        for what in ("softseg evaluate", "again"):
            before = time.perf_counter()
            subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
            seconds[what] = time.perf_counter() - before
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds["its processor"], memory_gb = used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6
    print(f"{subjects} subjects, 2 folders")
    print("".join(f"{part:>18}" for part in seconds) + f"{'memory':>18}")
    print("".join(f"{value:>16.1f} s" for value in seconds.values()) + f"{memory_gb:>15.1f} GB")
    figures = {f"{part.replace(' ', '_')}_s": value for part, value in seconds.items()} | {"memory_gb": memory_gb}
    record("evaluate", figures, HEADLINES, short=subjects < 120)


def _predict(root: Path, folder: Path, subjects: int) -> None:
    """Soft maps: the masks, blurred; masks of integers: those, moved by a voxel."""
    data = Bids(
        "hippocampus_msd", image="T1w", labels={n: f"label-hippocampus_dseg:{k}" for k, n in ((1, "anterior"), (2, "posterior"))}
    )
    for case in data.cases(root)[:subjects]:
        loaded = case.load()
        masks = loaded.raters[0]
        for label, mask in zip(data.classes, masks, strict=True):
            blurred = ndimage.gaussian_filter(mask, 0.7).clip(0, 1)
            write_volume(folder / "soft" / f"{case.name}_label-{label}_softseg.nii.gz", blurred, loaded.geometry)
        whole = np.roll(masks[0] + 2 * masks[1], 1, axis=0).astype(np.uint8)
        write_volume(folder / "masks" / f"{case.name}.nii.gz", whole, loaded.geometry)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--subjects", type=int, default=120)
    main(parser.parse_args().subjects)
