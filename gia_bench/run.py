"""One run from start to end: fresh, resumed, or skipped because it is finished."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import OmegaConf

from gia_bench.config import Experiment, Run
from gia_bench.errors import ConfigError, DataError, IncompatibleError, StorageError
from gia_bench.federated.module import FederatedModule
from gia_bench.federated.states import client_states
from gia_bench.probes.bounds import BoundsProbe
from gia_bench.probes.cost import CostProbe
from gia_bench.probes.leakage import LeakageProbe
from gia_bench.probes.privacy import PrivacyProbe
from gia_bench.probes.recorder import Recorder
from gia_bench.probes.theory import TheoryProbe
from gia_bench.probes.utility import UtilityProbe
from gia_bench.records.archives import whole, write_failed
from gia_bench.records.provenance import versions
from gia_bench.records.runs import LOCK, locked, read_status, write_config, write_status
from gia_bench.records.store import RecordStore

log = logging.getLogger(__name__)


def execute(run: Run, parts: Callable[[Run], Experiment], overrides: list[str], *, sweeping: bool) -> str:
    """One run to its end: "done", "skipped" or raises. The state stands in the run's ``status.json`` at any time."""
    label = f"{run.origin.experiment}/{run.origin.run_id}"
    if read_status(run.folder) == "done" and not run.force:
        log.info("%s is finished already; force=true runs it again", label)
        return "done"
    with run_folder(run.folder, dict(run.config), run.force):
        write_status(run.folder, "running", overrides=overrides)
        try:
            experiment = parts(run)
            data = experiment.data.dataset
            write_status(run.folder, "running", versions=versions(data.version), notes=data.notes)
            train(experiment)
        except IncompatibleError as error:
            write_status(run.folder, "skipped", str(error))
            if not sweeping:
                raise
            log.warning("%s is skipped: %s", label, error)
            return "skipped"
        except (KeyboardInterrupt, SystemExit):
            write_status(run.folder, "failed", "interrupted; the same command goes on where it stopped")
            raise
        except Exception as error:
            write_status(run.folder, "failed", f"{type(error).__name__}: {error}")
            if sweeping:  # Hydra goes on with the next run; a single one ends with the sentence on stderr
                log.error("%s failed: %s", label, error)
            raise
        write_status(run.folder, "done")
    log.info("%s is done: %s", label, run.folder)
    return "done"


@contextmanager
def run_folder(folder: Path, config: dict[str, Any], force: bool) -> Iterator[None]:
    """The run's folder for this process alone: emptied for a forced run, as it is for a resumed one.

    Raises ``StorageError`` where it cannot be written, or another process is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"The output folder {folder} cannot be made ({error.strerror}). Choose another with paths.outputs=..."
        ) from error
    with locked(folder):
        for path in folder.iterdir() if force else ():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        write_config(folder, OmegaConf.to_yaml(OmegaConf.create(config)))
        yield


def train(experiment: Experiment) -> None:
    """Play every round that is left, attack at the chosen ones, and record it all."""
    run, schedule = experiment.run, experiment.schedule
    mirror = experiment.mirror(run.folder, run.origin.run_id, dict(run.config))
    store = RecordStore(run.folder / "records.jsonl")
    recorder = Recorder(run.origin, store, mirror)
    states = client_states(schedule.client_states, run.folder / "client_states", experiment.trainer.devices)
    module = FederatedModule(experiment.rules, schedule, experiment.data.dataset.num_classes, states)
    checkpoint = newest_checkpoint(run.folder)
    if checkpoint is None:
        store.truncate(0)  # what an earlier try wrote before its first checkpoint is written again
    else:
        experiment.data.start = _round_of(checkpoint)
    trainer = _trainer(experiment, recorder)
    try:
        trainer.fit(module, datamodule=experiment.data, ckpt_path=checkpoint, weights_only=True)
        module.round_index = schedule.rounds  # where other processes played them, this one did not count
        if schedule.rounds % schedule.eval_every:
            trainer.validate(module, datamodule=experiment.data, verbose=False, weights_only=True)
        trainer.save_checkpoint(run.folder / "final.ckpt")
    except (OSError, RuntimeError) as error:
        if not write_failed(error):
            raise
        raise StorageError(
            f"The training's state cannot be written below {run.folder} ({error}). Free some space; the same command "
            "goes on from what was saved before."
        ) from error
    finally:
        recorder.flush()
        mirror.close()


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest round, or None. Raises ``DataError`` if it cannot be read."""
    found = sorted((folder / "checkpoints").glob("round*.ckpt"), key=_round_of)
    if not found:
        return None
    if not whole(found[-1]):
        raise DataError(
            f"The checkpoint {found[-1]} is corrupt; delete it to start again from round 0, or start with force=true."
        )
    return found[-1]


def _round_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("round"))


def _trainer(experiment: Experiment, recorder: Recorder) -> L.Trainer:
    _quiet()
    settings, schedule, folder = experiment.trainer, experiment.schedule, experiment.run.folder
    # ranks wait for each other while rank zero attacks, however long that takes
    spawned = DDPStrategy(start_method="spawn", timeout=timedelta(days=7))
    strategy = spawned if settings.strategy == "ddp_spawn" else settings.strategy
    leakage = LeakageProbe(
        recorder=recorder, attacks=experiment.attacks, threat=experiment.threat, metrics=experiment.metrics,
        public=experiment.public, folder=folder, images=experiment.images,
        snapshot_every_seconds=settings.snapshot_every_seconds,
    )  # fmt: skip
    probes = [
        CostProbe(recorder), UtilityProbe(recorder), PrivacyProbe(recorder, experiment.data), TheoryProbe(recorder),
        BoundsProbe(recorder),
    ]  # fmt: skip
    # after a validation, and never between a round and its validation, which a resumed Trainer would leave out
    checkpoints = ModelCheckpoint(
        dirpath=folder / "checkpoints", filename="round{step}", auto_insert_metric_name=False, save_top_k=1,
        save_on_train_epoch_end=False, enable_version_counter=False,
    )  # fmt: skip
    try:
        return L.Trainer(
            accelerator=settings.accelerator, devices=settings.devices, strategy=strategy,
            precision=cast(Any, settings.precision), max_steps=schedule.rounds, max_epochs=-1,
            val_check_interval=schedule.eval_every, check_val_every_n_epoch=None, num_sanity_val_steps=0,
            logger=False, inference_mode=False, enable_progress_bar=settings.progress_bar,
            enable_model_summary=False, use_distributed_sampler=False,
            callbacks=[*probes, leakage, recorder, checkpoints],
        )  # fmt: skip
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(f"trainer does not fit this machine: {' '.join(str(error).split())}") from error


def _quiet() -> None:
    """Lightning's greetings and its own deprecated calls are not news to the user."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*", category=FutureWarning)
