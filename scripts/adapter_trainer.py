"""TRL's SFTTrainer with our batches, held-out loss, sealed checkpoints, and an answer to lack of memory.

Import this module after the model was loaded: Unsloth patches TRL and must come first.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
)
from trl import SFTConfig, SFTTrainer

from scripts import checkpoints, padding_free
from scripts._cli import FAILED, CommandError, log
from scripts.batching import StepSampler
from scripts.held_out import summed_loss
from scripts.progress import RunProgress
from scripts.recipe import TrainingRecipe
from scripts.render import EncodedConversation, RenderError
from scripts.row_checks import check_batch


def is_out_of_memory(error: BaseException) -> bool:
    """Tell lack of memory, of the GPU or of the machine, from other errors."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("not enough memory", "can't allocate memory"))
    )


class AdapterTrainer(SFTTrainer):
    """Train an adapter on rows that are token ids already.

    Args:
        sampler: Order of the rows.
        held_out: Rows whose loss picks the best checkpoint.
        **kwargs: As of ``SFTTrainer``.

    Attributes:
        pieces: Portions in which a micro-batch is run; more than 1 after lack of memory.
        real_tokens: Tokens of the rows this process trained on, padding left out.
        computed_tokens: What it computed on: with padding, a shared start only once.
        real_tokens_before: Tokens of all processes before a resume.
    """

    control: Any

    def __init__(
        self, *, sampler: StepSampler | None, held_out: Sequence[EncodedConversation], **kwargs: Any
    ) -> None:
        self.step_sampler, self.held_out = sampler, held_out
        self.pieces = 1
        self.real_tokens = self.computed_tokens = self.real_tokens_before = 0
        self._window_tokens, self._window_seconds = 0, 0.0
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.step_sampler or super()._get_train_sampler(train_dataset)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Give the model's own loss where TRL's fused head has no kernel.

        TRL 1.15 always asks for a Triton kernel that a CPU does not have
        (``'NoneType' object has no attribute 'apply'``); Unsloth brings a chunked one.
        """
        if self.args.device.type == "cpu" and not hasattr(SFTTrainer.compute_loss, "_unsloth_cpu"):
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def forget_metrics(self) -> None:
        """Drop what TRL has counted so far: a probe is no training."""
        self._metrics["train"].clear()
        self._total_train_tokens = 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Run one micro-batch; when memory runs out, run it in smaller pieces from then on.

        The loss is divided by the trained tokens of the whole step, so pieces of a micro-batch add
        up to its gradient and the effective batch stays what the recipe says.
        """
        started = time.monotonic()
        gradients = [
            None if weight.grad is None else weight.grad.clone()
            for weight in self.trained_weights()
        ]
        while True:
            try:
                loss = sum(
                    super(AdapterTrainer, self).training_step(model, dict(part), num_items_in_batch)
                    for part in padding_free.split_batch(inputs, self.pieces)
                )
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(inputs)
            for weight, gradient in zip(self.trained_weights(), gradients, strict=True):
                weight.grad = None if gradient is None else gradient.clone()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        real = padding_free.num_tokens(inputs)
        self.real_tokens += real
        self.computed_tokens += inputs["input_ids"].numel()
        self._window_tokens += real
        self._window_seconds += time.monotonic() - started
        return loss

    def trained_weights(self) -> list[Any]:
        """Give the adapter's parameters."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def _halve(self, inputs: padding_free.Batch) -> None:
        rows = padding_free.num_rows(inputs)
        if self.args.world_size > 1 or self.pieces >= rows:
            raise CommandError(
                f"out of memory with {-(-rows // self.pieces)} row(s) in a forward pass; set "
                "use_gradient_checkpointing: true, or lower per_device_train_batch_size or "
                "max_length; the same command goes on from the last checkpoint",
                FAILED,
            )
        self.pieces *= 2
        log(
            f"train: out of memory; {-(-rows // self.pieces)} rows instead of {rows} in a forward "
            "pass from now on, the effective batch stays"
        )

    def _over_devices(self, *values: float) -> list[float]:
        """Sum figures of all processes."""
        if self.args.world_size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(sums).tolist()

    def take_best(self, checkpoint: Path) -> None:
        """Load what a finished training left: its state, and the best checkpoint's adapter."""
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_from_checkpoint(self.state.best_model_checkpoint or str(checkpoint))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens and speed to the logged step."""
        if "loss" in logs and self._window_seconds:
            real, computed, window = self._over_devices(
                self.real_tokens, self.computed_tokens, self._window_tokens
            )
            logs["tokens"] = self.real_tokens_before + int(real)
            logs.update(padding_free.token_shares(real, computed))
            logs["tokens_per_second"] = round(window / self._window_seconds, 1)
            self._window_tokens, self._window_seconds = 0, 0.0
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure held-out loss, every trained token weighing the same, shared by all devices."""
        world, rank = self.args.world_size, self.args.process_index
        model = self.accelerator.unwrap_model(self.model_wrapped)
        share = self.held_out[rank::world]
        with self.compute_loss_context_manager():
            total, tokens = summed_loss(model, share) if share else (0.0, 0)
        summed, counted = self._over_devices(total, tokens)
        metrics = {"eval_loss": summed / counted}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not all(bool(torch.isfinite(weight).all()) for weight in self.trained_weights()):
            raise CommandError(
                f"the adapter has weights that are not finite at step {self.state.global_step}; "
                "lower learning_rate; the last checkpoint is whole",
                FAILED,
            )
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            checkpoints.seal(folder)


def choose_batching(recipe: TrainingRecipe, model: Any, rows: Sequence[EncodedConversation]) -> str:
    """Choose how rows share a micro-batch, and fit the model to it.

    Returns:
        ``packed`` (Unsloth's kernels on a GPU), ``end to end`` (our attention) or ``padded``.
    """
    if not recipe.packing:
        return "padded"
    # Unsloth packs by itself on a GPU, with kernels that keep rows apart.
    if torch.cuda.is_available() and recipe.backend == "unsloth":
        return "packed"
    reason = padding_free.enable_padding_free(model, rows, recipe.max_length)
    if reason:
        log(f"train: rows are padded: {reason}")
    return "padded" if reason else "end to end"


def make_trainer(
    recipe: TrainingRecipe,
    model: Any,
    tokenizer: Any,
    rows: Sequence[EncodedConversation],
    held_out: Sequence[EncodedConversation],
    checkpoint_dir: Path,
    progress: RunProgress,
    batching: str,
    precision: dict[str, bool],
    world_size: int = 1,
) -> AdapterTrainer:
    """Build the trainer of a run.

    Args:
        recipe: What to train.
        model: PEFT model on its device.
        tokenizer: Its tokenizer; only the pad id is used.
        rows: Training rows.
        held_out: Held-out rows.
        checkpoint_dir: Where checkpoints go.
        progress: The run's callback.
        batching: From ``choose_batching``.
        precision: ``bf16`` and ``fp16`` of ``TrainingArguments``.
        world_size: Devices that train together.
    """
    on_gpu, packed = torch.cuda.is_available(), batching == "packed"
    pad_id = tokenizer.pad_token_id

    def collate(batch: list[dict[str, Any]]) -> padding_free.Batch:
        if batching == "end to end":
            return padding_free.lay_end_to_end(batch)
        return padding_free.pad_right(batch, pad_id)

    size, micro_batches = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    sampler = StepSampler(
        [len(row.input_ids) for row in rows], size, micro_batches, recipe.seed, batching == "padded"
    )
    if batching == "padded":
        _check_padding(rows[:size], collate, tokenizer)
    callbacks: list[Any] = [progress]
    if recipe.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(recipe.early_stopping_patience))
    arguments = SFTConfig(
        output_dir=str(checkpoint_dir),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=micro_batches // world_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        num_train_epochs=recipe.num_train_epochs,
        max_steps=recipe.max_steps,
        logging_steps=1,  # the watch judges every step; metrics.jsonl keeps every logging_steps-th
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=recipe.save_steps,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        # Rows were cut at turns already; TRL packs whole rows into this length.
        max_length=recipe.max_length if packed else None,
        packing=packed,
        eval_packing=False,
        optim="adamw_torch",
        report_to=recipe.report_to,
        run_name=recipe.run_name,
        disable_tqdm=True,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=on_gpu,
        gradient_checkpointing=recipe.use_gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **precision,
    )
    trainer = AdapterTrainer(
        sampler=None if packed else sampler,
        held_out=held_out,
        model=model,
        processing_class=tokenizer,
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(held_out),
        data_collator=None if packed else collate,
        args=arguments,
        callbacks=callbacks,
    )
    progress.sampler = trainer.step_sampler
    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
    for weight in trainer.trained_weights():
        # TRL casts a QLoRA adapter to bf16: late, small updates would be lost to rounding, and a
        # resumed run, whose weights are read as float32, would differ.
        weight.data = weight.data.float()
    return trainer


def _columns(rows: Sequence[EncodedConversation]) -> list[dict[str, Any]]:
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]


def _dataset(rows: Sequence[EncodedConversation]) -> Dataset:
    return Dataset.from_list(_columns(rows))


def _check_padding(rows: Sequence[EncodedConversation], collate: Any, tokenizer: Any) -> None:
    try:
        check_batch(rows, collate(_columns(rows)), tokenizer)
    except RenderError as error:
        raise CommandError(f"train: {error}") from error
