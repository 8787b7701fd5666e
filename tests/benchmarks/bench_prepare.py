"""What preparation costs, as users pay it: the command `softseg prepare`, its start included, in a folder without stores.

Run:     SOFTSEG_TEST_DATA=DATA python tests/benchmarks/bench_prepare.py 3    (without: a short run, once each)
Targets: the 120 volumes of hippocampus_msd (study s003) in a third of nnU-Net v2's time for fingerprint, plan and preprocessing
         with 2 processes (20.7 s on 2 cores), so in 6.9 s

Each figure is the best of some repeats, since what else runs on a machine only adds. The large volumes are made here; they show
what more processors give (the same file, byte for byte) and how much memory a case takes, in multiples of its voxels as float32.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from record import Headline, record

from softseg_dist.data.geometry import Geometry
from softseg_dist.data.volume import read_volume, write_volume

STUDY = Path(__file__).parents[2] / "studies" / "s003_hippocampus.py"
NNUNET_S, TARGET_S = 20.7, 6.9
WORDS = {
    "small_one_s": "hippocampus, nothing prepared, one processor [s]",
    "small_all_s": "hippocampus, nothing prepared, all processors [s]",
    "small_processor_s": "hippocampus, nothing prepared, processor time [s]",
    "small_unchanged_s": "hippocampus, nothing changed [s]",
    "small_one_changed_s": "hippocampus, one file changed [s]",
    "small_gb": "hippocampus, all processes [GB]",
    "large_one_s": "24 volumes of 256 x 256 x 160, one processor [s]",
    "large_all_s": "24 volumes of 256 x 256 x 160, all processors [s]",
    "large_case_peak": "one such case, peak in multiples of its voxels",
    "large_one_gb": "all processes, one processor [GB]",
    "large_all_gb": "all processes, all processors [GB]",
}
HEADLINES = (
    Headline(
        key="small_all_s",
        what="preparing the 120 volumes of hippocampus_msd, from nothing, start included",
        unit="s",
        at_most=TARGET_S,
    ),
    Headline(key="small_processor_s", what="preparing them: processor time, mostly the import of torch", unit="s"),
    Headline(key="small_unchanged_s", what="preparing them again, with nothing changed", unit="s"),
    Headline(key="large_all_s", what="preparing 24 volumes of 256 x 256 x 160 on all processors", unit="s"),
)
LONG = 3  # repeats
SETTLED_S = 5.0  # a source is remembered when it has not been changed for so long
NUM_LARGE, LARGE = 24, (256, 256, 160)
LARGE_STUDY = """
from softseg_dist import Bids, MonteCarlo, Preprocess, Recipe, Study

STUDY = Study(
    name="large",
    question="What does the preparation of large volumes cost?",
    data=Bids("large", image="T1w", labels={"lesion": "seg"}),
    preprocess=Preprocess(dim=3, spacing_mm=(1.2, 1.2, 1.2), crop=(224, 224, 160)),
    splits=MonteCarlo(count=2),
    candidates={"only": Recipe()},
)
"""


@dataclass(frozen=True)
class Preparing:
    """The command for one study; stores go to a folder of their own."""

    study: Path
    root: Path
    stores: Path

    def start(self, num_cpus: int) -> psutil.Popen:
        """Start it on the first processors of this machine."""
        cpus = sorted(os.sched_getaffinity(0))[:num_cpus]
        command = [sys.executable, "-m", "softseg_dist.cli.main", "prepare", str(self.study)]
        where = ["--data-root", str(self.root), "--stores", str(self.stores)]
        return psutil.Popen(["taskset", "-c", ",".join(map(str, cpus)), *command, *where], stdout=subprocess.DEVNULL)

    def seconds(self, num_cpus: int) -> float:
        """Time of one run."""
        started = time.perf_counter()
        assert self.start(num_cpus).wait() == 0
        return time.perf_counter() - started

    def processor_seconds(self) -> float:
        """Processor time of one run that finds nothing, on one processor, where it starts no other process."""
        shutil.rmtree(self.stores, ignore_errors=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.seconds(1)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def fresh_seconds(self, num_cpus: int) -> float:
        """Time of one run that finds nothing."""
        shutil.rmtree(self.stores, ignore_errors=True)
        return self.seconds(num_cpus)

    def peak_bytes(self, num_cpus: int) -> int:
        """High-water of all processes of a run that finds nothing; what several share counts once."""
        shutil.rmtree(self.stores, ignore_errors=True)
        run, peak = self.start(num_cpus), 0
        while run.poll() is None:
            peak = max(peak, sum(map(_private_bytes, [run, *run.children(recursive=True)])))
            time.sleep(0.1)
        return peak

    def digests(self) -> set[str]:
        """Of the store files."""
        return {subprocess.check_output(["sha256sum", path], text=True).split()[0] for path in self.stores.glob("*.arrow")}


def main(repeats: int) -> None:
    """Measure, and print a table."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        small = _hippocampus(Path(folder))
        if small is not None:
            figures |= _small(small, repeats)
        figures |= _large(Path(folder), repeats)
    load = os.getloadavg()[0]
    print(f"{'what':<66}{'measured':>10}{'target':>8}")
    for key, value in figures.items():
        print(f"{WORDS[key]:<66}{value:>10.2f}" + f"{TARGET_S:>8}" * (key == "small_all_s"))
    print(f"{len(os.sched_getaffinity(0))} processors, load {load:.1f}; best of {repeats}; nnU-Net v2: {NNUNET_S} s")
    record("prepare", figures, HEADLINES, short=repeats < LONG or "small_all_s" not in figures)


def _small(preparing: Preparing, repeats: int) -> dict[str, float]:
    num_cpus = len(os.sched_getaffinity(0))
    one = min(preparing.fresh_seconds(1) for _ in range(repeats))
    everything = min(preparing.fresh_seconds(num_cpus) for _ in range(repeats))
    time.sleep(max(0.0, SETTLED_S - (time.time() - _newest(preparing.root))))
    unchanged = min(preparing.seconds(num_cpus) for _ in range(repeats))
    image = next((preparing.root / "hippocampus_msd").rglob("*_T1w.nii.gz"))
    changed = []
    for number in range(1, repeats + 1):
        volume = read_volume(image)
        write_volume(image, volume.data + np.float32(number), volume.geometry)
        changed.append(preparing.seconds(num_cpus))
    return {
        "small_one_s": one,
        "small_all_s": everything,
        "small_processor_s": min(preparing.processor_seconds() for _ in range(repeats)),
        "small_unchanged_s": unchanged,
        "small_one_changed_s": min(changed),
        "small_gb": preparing.peak_bytes(num_cpus) / 1e9,
    }


def _large(folder: Path, repeats: int) -> dict[str, float]:
    geometry = Geometry(LARGE, np.diag([1.0, 1.0, 1.2, 1.0]))
    image = np.random.default_rng(0).normal(100, 20, LARGE).round().astype(np.float32)
    mask = np.zeros(LARGE, dtype=np.uint8)
    mask[80:140, 70:150, 50:90] = 1
    write_volume(folder / "image.nii.gz", image, geometry)
    write_volume(folder / "mask.nii.gz", mask, geometry)
    for number in range(NUM_LARGE):  # their names distinguish them
        anat = Path(f"sub-{number}") / "anat"
        for source, target in (("image", anat), ("mask", Path("derivatives") / "labels" / anat)):
            (folder / "large" / target).mkdir(parents=True)
            name = f"sub-{number}_T1w{'_seg' if source == 'mask' else ''}.nii.gz"
            shutil.copy(folder / f"{source}.nii.gz", folder / "large" / target / name)
    study = folder / "large.py"
    study.write_text(LARGE_STUDY)
    preparing, num_cpus = Preparing(study, folder, folder / "large stores"), len(os.sched_getaffinity(0))
    one = min(preparing.fresh_seconds(1) for _ in range(repeats))
    digests = preparing.digests()
    everything = min(preparing.fresh_seconds(num_cpus) for _ in range(repeats))
    assert preparing.digests() == digests, "the store depends on the number of processes"
    case_bytes = 2 * 4 * image.size
    return {
        "large_one_s": one,
        "large_all_s": everything,
        "large_case_peak": _peak_of_one_case(study, folder) / case_bytes,
        "large_one_gb": preparing.peak_bytes(1) / 1e9,
        "large_all_gb": preparing.peak_bytes(num_cpus) / 1e9,
    }


def _peak_of_one_case(study: Path, root: Path) -> int:
    """What a process grows by while it prepares one case."""
    code = (
        "import resource, sys; from pathlib import Path; from softseg_dist.study_file import load_study;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "study = load_study(sys.argv[1]).study; cases = study.data.cases(Path(sys.argv[2])); before = peak();"
        "study.preprocess.apply(cases[0]); print(1024 * (peak() - before))"
    )
    return int(subprocess.check_output([sys.executable, "-c", code, str(study), str(root)]))


def _hippocampus(folder: Path) -> Preparing | None:
    """A copy that may be changed; None where the images are not at hand."""
    source = Path(os.environ.get("SOFTSEG_TEST_DATA", "")) / "hippocampus_msd"
    if not source.is_dir():
        print("SOFTSEG_TEST_DATA names no folder with hippocampus_msd: only the made volumes are prepared")
        return None
    subprocess.run(["cp", "--recursive", str(source), str(folder)], check=True)
    subprocess.run(["chmod", "--recursive", "u+w", str(folder)], check=True)
    return Preparing(STUDY, folder, folder / "stores")


def _newest(root: Path) -> float:
    return max(path.stat().st_ctime for path in root.rglob("*.nii.gz"))


def _private_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
