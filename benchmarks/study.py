# SPDX-License-Identifier: Apache-2.0
"""The study behind README's results: rows of benchmarks/study_rows.py, on the same seeds, measured alike.

    python benchmarks/study.py --tune                       # once: rate and weight of every method, on seed 100
    python benchmarks/study.py --stage 1 --seeds 0          # then stage by stage, a seed in one stretch
    python benchmarks/study.py --references                 # once: noise and the teacher, 10,000 samples each
    python benchmarks/study.py --pictures                   # samples of every row, while --work has the students
    python benchmarks/study.py --report                     # tables and plots from the numbers that are there

Every row is a run of train_place.py or train_lift.py, one process of one thread at the lowest priority, and of
evaluate_fid.py on what it made: 10,000 samples (DDIM, 25 steps, eta 0) against the 10,000 test images on the features
of assets/classifier. What the teacher says in a step is the same for all rows of a seed and is kept on disk
(benchmarks/recorded.py). Numbers go to benchmarks/study/*.json after every row: command, commit, versions, processor,
CPU seconds. Rows that are there are not run again, so a study that was stopped goes on with the same command. Work
files go to --work and may be deleted at any time.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # before torch: one thread, asleep while it waits, and nothing from the network
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from study_rows import (  # noqa: E402
    COMMON,
    LATENT_TEACHERS,
    LIFT,
    ROWS,
    SAMPLES,
    SETTINGS,
    STAGES,
    TEACHERS,
    TUNED_LIKE,
    TUNED_ON,
    TUNING_SEED,
    Family,
)

from utils.command_line import UsageError, run, start  # noqa: E402


def parse_args() -> argparse.Namespace:
    """The command line, checked. Raises UsageError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="run the grids of all methods")
    parser.add_argument("--references", action="store_true", help="measure noise and the teacher")
    parser.add_argument("--stage", type=int, choices=STAGES, help="run the rows of a stage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the stage (default: 0 1 2)")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS], help="only these (default: all)"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="only these, of --tune or the stage (default: all)")
    parser.add_argument("--report", action="store_true", help="write tables and plots beside the numbers")
    parser.add_argument("--pictures", action="store_true", help="draw samples of the first of --seeds beside them")
    parser.add_argument("--work", type=Path, default=Path("study"), help="students, records (default: study)")
    args = parser.parse_args()
    if not (args.tune or args.references or args.stage or args.pictures or args.report):
        raise UsageError("nothing to do: give --tune, --references, --stage, --pictures or --report.")
    if TUNING_SEED in args.seeds:
        raise UsageError(f"--seeds {TUNING_SEED} is the seed of the tuning, and is not reported.")
    return args


if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    ARGS = start(parse_args)

import datasets  # noqa: E402
import torch  # noqa: E402
from latent_teachers import make_captioned  # noqa: E402
from PIL import Image  # noqa: E402
from study_jobs import RESULTS, Results, apart, as_asked, evaluate, sampled, train  # noqa: E402
from study_probe import probe  # noqa: E402
from study_report import draw_samples, report  # noqa: E402

from utils.files import read_json  # noqa: E402
from utils.randomness import seed_from  # noqa: E402

DATA = "assets/fashion_mnist_16"


def data_of(setting: str, work: Path) -> str:
    """The bundled images, with captions for latent teachers."""
    return str(work / "teachers" / "data") if SETTINGS[setting].family.captioned else DATA


def tuning_data(setting: str, work: Path) -> Path:
    """Its training images in two: those that tuning trains on, and as `test` those it measures against."""
    source = data_of(setting, work)
    folder = work / ("tuning_data" if source == DATA else "tuning_captioned")
    rows = datasets.load_dataset(source, split="train")
    for split, chosen in (("train", range(TUNED_ON)), ("test", range(TUNED_ON, len(rows)))):
        target = folder / "data" / f"{split}-00000-of-00001.parquet"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            rows.select(chosen).to_parquet(target)
    return folder


def teacher_of(name: str, work: Path) -> str:
    """The folder of a teacher; those of later stages are trained when they are first asked for."""
    if name not in {*TEACHERS, *LATENT_TEACHERS}:
        return name
    folder = work / "teachers" / name
    if name in LATENT_TEACHERS:
        if (ROOT / (shipped := f"assets/{name}_teacher")).exists():
            make_captioned(folder.parent / "data")
            return shipped
        if not (folder / "model_index.json").exists():
            subprocess.run([sys.executable, f"benchmarks/make_{name}_teacher.py", folder.parent], check=True)
        return str(folder)
    if not (folder / "student" / "model_index.json").exists():
        print(f"training the {name} teacher", flush=True)
        flags = ["--dataset_name", DATA, "--lambda_kd_output", "0", *TEACHERS[name].split()]
        if "--pruning_ratio" in flags:
            flags += ["--pretrained_model_name_or_path", "assets/teacher"]
        train(folder, LIFT, flags, None)
    return str(folder / "student")


def row_flags(
    setting: str, name: str, tuned: dict[str, str], *, seed: int, steps: int, data: str, teacher: str
) -> list:
    """All flags of a row besides `COMMON` and the output folder; tuned ones come last."""
    tuned = dict(tuned)
    if (weight := tuned.get("--lambda_kd_output")) and ROWS[name].over != 1:
        tuned["--lambda_kd_output"] = f"{float(weight) / ROWS[name].over:g}"
    flags = ["--pretrained_model_name_or_path", teacher, "--dataset_name", data, *SETTINGS[setting].flags.split()]
    flags += [*ROWS[name].flags.split(), "--max_train_steps", str(steps), "--seed", str(seed)]
    return flags + [word for pair in tuned.items() for word in pair]


def cached(setting: str, work: Path, data: str, seed: int) -> list[str]:
    """Latents and prompts are encoded once for all rows of a seed."""
    spec = SETTINGS[setting]
    folder = work / "latents" / f"{spec.teacher}-{data}-{seed}"
    return ["--latent_cache_dir", str(folder)] if spec.family.captioned else []


def record_of(work: Path, name: str, teacher: str, data: str, seed: int) -> Path | None:
    """Where the teacher's outputs are kept; None for a row that asks for its features."""
    return None if "--lambda_kd_feat" in ROWS[name].flags else work / "teacher" / f"{teacher}-{data}-{seed}"


def tune(work: Path, settings: list[str], only: list[str] | None) -> None:
    """Every method's grid in the settings that others take their flags from."""
    results = Results("tuning", "setting", "row", "tuned")
    wanted: dict[str, list[str]] = {}
    for setting, rows in (pair for stage in STAGES.values() for pair in stage.items() if pair[0] not in TUNED_LIKE):
        wanted.setdefault(setting, []).extend(row for row in rows if not ROWS[row].tuned_as)
    for setting in (each for each in SETTINGS if each in wanted and each in settings):
        family, teacher = SETTINGS[setting].family, teacher_of(SETTINGS[setting].teacher, work)
        data = str(tuning_data(setting, work))
        for name in (each for each in wanted[setting] if not only or each in only):
            for tuned in ROWS[name].grid(family.rates):
                if results.find(setting=setting, row=name, tuned=tuned):
                    continue
                results.check_machine(setting, TUNING_SEED)
                folder = work / f"tuning-{setting}"
                flags = row_flags(
                    setting,
                    name,
                    tuned,
                    seed=TUNING_SEED,
                    steps=family.tuning_steps,
                    data=data,
                    teacher=teacher,
                )
                record = record_of(work, name, f"bundled-{setting}", "tuning", TUNING_SEED)
                seconds = train(
                    folder, ROWS[name].script, flags + cached(setting, work, "tuning", TUNING_SEED), record
                )
                reference = ["--dataset_name", data, "--split", "test"]
                metrics, more = evaluate(
                    folder, sampled(str(folder / "student"), family), family.tuning_samples, reference, "fid", work
                )
                print(f"{setting:<11}{name:<20}{tuned} {metrics['frechet_distance']:.2f}", flush=True)
                results.add(
                    {
                        **{"setting": setting, "row": name, "tuned": tuned, "seed": TUNING_SEED},
                        **{"steps": family.tuning_steps, "samples": family.tuning_samples, "metrics": metrics},
                        "command": command_of(name, flags, work),
                        "cpu_seconds": round(seconds + more, 1),
                    }
                )


def best_flags(setting: str, name: str) -> dict[str, str]:
    """What tuning found for a row.

    Raises:
        UsageError: the row's grid has not been run to its end.
    """
    setting, name = TUNED_LIKE.get(setting, setting), ROWS[name].tuned_as or name
    results = Results("tuning", "setting", "row", "tuned")
    grid = ROWS[name].grid(SETTINGS[setting].family.rates)
    found = [results.find(setting=setting, row=name, tuned=tuned) for tuned in grid]
    if None in found:
        raise UsageError(f"{setting}, {name}: not tuned yet. Run python benchmarks/study.py --tune first.")
    return min(found, key=lambda record: record["metrics"]["frechet_distance"])["tuned"]


def command_of(name: str, flags: list[str], work: Path) -> str:
    """What a row ran, for the record."""
    return shlex.join([ROWS[name].script, *COMMON, *flags]).replace(f"{work}/", "WORK/")


def rows_of(setting: str) -> list[tuple[int, str]]:
    """(stage, row) of all rows of a setting."""
    return [(stage, name) for stage, settings in STAGES.items() for name in settings.get(setting, ())]


def row_folder(work: Path, stage: int, setting: str, name: str, seed: int) -> Path:
    """Where a row's student, samples and logs are."""
    return work / f"stage_{stage}" / f"{setting}-{name}-{seed}".replace("/", "").replace(" ", "_")


def run_stage(stage: int, seeds: list[int], work: Path, settings: list[str], only: list[str] | None) -> None:
    """All rows of a seed, then the next seed."""
    results = Results(f"stage_{stage}", "setting", "row", "seed")
    wanted = [(setting, name) for setting, names in STAGES[stage].items() if setting in settings for name in names]
    tuned = {row: best_flags(*row) for row in wanted if not only or row[1] in only}
    for seed in seeds:
        for setting, name in tuned:
            if results.find(setting=setting, row=name, seed=seed):
                continue
            results.check_machine(setting, seed)
            folder = row_folder(work, stage, setting, name, seed)
            spec, data = SETTINGS[setting], data_of(setting, work)
            flags = row_flags(
                setting,
                name,
                tuned[setting, name],
                seed=seed,
                steps=spec.steps,
                data=data,
                teacher=teacher_of(spec.teacher, work),
            )
            record = record_of(work, name, Path(spec.teacher).name, "all", seed)
            flags += cached(setting, work, "all", seed)
            trained = train(folder, ROWS[name].script, flags, record)
            student = folder / "student"
            reference, family = ["--dataset_name", data, "--split", "test"], spec.family
            what = sampled(str(student), family)
            metrics, measured = evaluate(folder, what, family.samples, reference, "fid pr", work)
            if family.asks:
                metrics["as_asked"] = as_asked(folder)
            apart(
                "probe",
                folder / "probe.txt",
                probe,
                folder / "probe.json",
                student,
                ROWS[name].script,
                [*COMMON, *flags],
            )
            log = [json.loads(line) for line in (student / "log.jsonl").read_text().splitlines()]
            results.add(
                {
                    **{"setting": setting, "row": name, "seed": seed, "steps": spec.steps, "samples": family.samples},
                    "command": command_of(name, flags, work),
                    "metrics": metrics,
                    **read_json(folder / "probe.json"),
                    "log": {key: [line.get(key) for line in log] for key in ("step", "loss", "task", "output", "w")},
                    "cpu_seconds": {"training": round(trained, 1), "samples": round(measured, 1)},
                }
            )
            print(f"seed {seed} {setting:<11}{name:<22}{metrics['frechet_distance']:8.2f}", flush=True)


def references(work: Path) -> None:
    """Clipped noise, and the bundled teacher."""
    results = Results("references", "row")
    reference, folder = ["--dataset_name", DATA, "--split", "test"], work / "references"
    noise = folder / "noise"
    if not results.find(row="noise"):
        noise.mkdir(parents=True, exist_ok=True)
        for i in range(SAMPLES):
            pixels = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed_from(0, i))).clamp(-1, 1)
            Image.fromarray(((pixels + 1) * 127.5).round().to(torch.uint8).numpy()).save(noise / f"{i:05d}.png")
    for name, what in (("noise", ["--images", str(noise)]), ("teacher", sampled("assets/teacher", Family()))):
        if not results.find(row=name):
            folder.mkdir(parents=True, exist_ok=True)
            metrics, seconds = evaluate(folder, what, SAMPLES, reference, "fid pr", work)
            results.add({"row": name, "samples": SAMPLES, "metrics": metrics, "cpu_seconds": round(seconds, 1)})
            print(f"{name:<10}{metrics['frechet_distance']:8.2f}", flush=True)


def pictures(work: Path, settings: list[str], seed: int) -> None:
    """Samples of the rows of a setting whose students are still in `work`, below the teacher's."""
    for setting in settings:
        folders = {name: row_folder(work, stage, setting, name, seed) / "student" for stage, name in rows_of(setting)}
        students = {name: str(folder) for name, folder in folders.items() if (folder / "model_index.json").exists()}
        if students:
            students = {"teacher": teacher_of(SETTINGS[setting].teacher, work), **students}
            title = f"{SETTINGS[setting].title}, seed {seed}: every column from the same noise"
            draw_samples(students, SETTINGS[setting].family, title, RESULTS / f"{setting}_samples.png")


def main(args: argparse.Namespace) -> None:
    work = args.work.resolve()
    os.chdir(ROOT)
    os.nice(19)
    torch.set_num_threads(1)
    if args.tune:
        tune(work, args.settings, args.rows)
    if args.references:
        references(work)
    if args.stage:
        run_stage(args.stage, args.seeds, work, args.settings, args.rows)
    if args.pictures:
        pictures(work, args.settings, args.seeds[0])
    if args.report:
        report(RESULTS, SETTINGS)


if __name__ == "__main__":
    run(main, ARGS)
