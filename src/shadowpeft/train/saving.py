"""Checkpoints that are there whole or not at all, whenever the process dies; and no step on what is no number."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Generator, Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import HubStrategy, rotate_checkpoints

from shadowpeft.files import STAGING_PREFIX, put_in_place, save_errors, sync_tree
from shadowpeft.model.hub import CARD_FILE
from shadowpeft.model.tensors import CONFIG_FILE, WEIGHTS_FILE
from shadowpeft.train.callbacks import AskedIntervals
from shadowpeft.train.finite import check_gradients, check_loss

# Beside the checkpoints, so that moving one out of it is a rename.
STAGING = f"{STAGING_PREFIX}checkpoint"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)


class SeededByEpoch(Sampler):
    """Rows of like length in an order that seed and epoch alone decide.

    transformers' own order comes from the global generator: a resumed run would read rows of its epoch twice and others never.
    accelerate tells the epoch, as it does to the sampler of a random order.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self._sampler, self._seed, self._epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator = Generator().manual_seed(self._seed + self._epoch)
        return iter(self._sampler)


class SafeTrainer(Trainer):
    """transformers' Trainer, with every checkpoint written to a temporary folder, synced to disk and then renamed.

    A process killed at any moment leaves earlier checkpoints whole and at most a temporary folder, which the next save
    removes. A full disk ends in one :class:`SaveError`. With several processes all of them write to the same temporary
    folder, and the first one renames it when all have finished. A loss or gradient that is not finite ends the run in one
    :class:`NotFiniteError` before it reaches the weights. One process uses one device, however many it sees.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._use_one_device()
        self.add_callback(AskedIntervals)
        self._staging: Path | None = None
        self._batch_in_step = 0

    def _use_one_device(self) -> None:
        """Instead of transformers' nn.DataParallel, whose copies have no parameters of their own to read a dtype from."""
        num_devices = self.args.n_gpu
        if num_devices <= 1:
            return
        self.args._n_gpu = 1
        self._train_batch_size = self.args.train_batch_size  # which transformers had multiplied by the devices
        warnings.warn(
            f"this process sees {num_devices} GPUs and trains on the first alone; to use all, start one process for each with "
            f"accelerate launch --num_processes {num_devices} ..., to use one without this warning set CUDA_VISIBLE_DEVICES",
            stacklevel=4,
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """As in transformers, which logs an earlier loss where this one is no number, and goes on."""
        self._batch_in_step += 1
        loss = super().training_step(model, inputs, *args, **kwargs)
        check_loss(loss, inputs, step=self.state.global_step + 1, batch=self._batch_in_step)
        if self.accelerator.sync_gradients:
            self._before_step(model)
        return loss

    def _before_step(self, model: nn.Module) -> None:
        """Behind a step's last batch. Not where gradients are clipped: max_grad_norm=0 leaves that out."""
        # A scaler for float16 meets infinite gradients now and then, and skips those steps itself.
        if getattr(self.accelerator, "scaler", None) is None and not self.is_deepspeed_enabled:
            check_gradients(model, step=self.state.global_step + 1, batches=self._batch_in_step)
        self._batch_in_step = 0

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededByEpoch(sampler, seed)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        what = f"could not save the checkpoint of step {self.state.global_step} in {self.args.output_dir}"
        way_out = "earlier checkpoints are complete. Free some space, then go on with --resume"
        if self.args.push_to_hub:
            self._finish_current_push()  # which reads the folder that the next checkpoint is written to
        with save_errors(what, way_out), self._staged(folder / STAGING):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._point_at_best(folder / STAGING, folder)
            if self.args.should_save:
                self.state.save_to_json(str(folder / STAGING / name / "trainer_state.json"))
                sync_tree(folder / STAGING / name)
                put_in_place(folder / STAGING / name, folder / name)
                rotate_checkpoints(
                    output_dir=str(folder),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=True,  # by number, one that an earlier run left would count as the newest
                )
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in transformers, once the checkpoint is in its place, and with the files of an adapter, of which it knows none."""
        if self._staging is not None:
            return
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            for path in (Path(checkpoint_folder, name) for name in ADAPTER_FILES):
                if path.is_file():
                    shutil.copy(path, Path(str(self.args.output_dir), path.name))
        super()._push_from_checkpoint(checkpoint_folder)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which trains one step too many when it goes on from the last step's checkpoint."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    @contextmanager
    def _staged(self, staging: Path) -> Iterator[None]:
        """Sends all files of a checkpoint to ``staging``, which is empty before and gone afterwards."""
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            yield
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    def _point_at_best(self, staging: Path, folder: Path) -> None:
        """The best checkpoint so far is named by the place where it lies or will lie, on every process.

        transformers looks into the folder it writes to, where earlier ones are not; and forgets one whose folder was moved.
        """
        name = f"checkpoint-{self.state.best_global_step}"
        # In this order, as the first process moves the newest from one to the other.
        if self.state.best_global_step and ((staging / name).is_dir() or (folder / name).is_dir()):
            self.state.best_model_checkpoint = str(folder / name)
