"""Train the demonstration model: `python -m models.tiny.train`; run again after a stop, it goes on where it was.

The state is saved every few minutes. Batches are made in a second process, from the seed and the step's number, so
that a resumed training sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Annotated, Final

import torch
import typer
from transformers import Lfm2VlForConditionalGeneration

from models.tiny import recipe
from models.tiny.apart import keep_apart, masks
from models.tiny.data import IGNORED, Batch, Writer, training_batch
from models.tiny.landmarks import ABSENT, CLASSES, UNKNOWN
from models.tiny.network import build
from models.tiny.settings import TEXT, write_settings
from models.tiny.tokenizer import write_tokenizer

SAVE_SECONDS: Final = 180.0
REPORT_STEPS: Final = 100
JUDGED: Final = 4
"""Batches of unseen images that the reports are about."""
EAGER_TOKENS: Final = 200
_LOOKED_UP: Final = ("embed_tokens.weight", "position_embedding.weight", "lm_head.weight")
"""Tables, of which AdamW suits the rows better."""
AHEAD: Final = 6
"""Batches that wait to be learned from."""


@dataclass(kw_only=True)
class Training:
    """All that is saved and restored."""

    model: Lfm2VlForConditionalGeneration
    heads: torch.nn.Linear
    """From an image token's embedding to its landmarks; not part of the model."""
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0
    """Of training, over all runs."""
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last report."""
    seen: list[float] = field(default_factory=list)
    """The same for the landmarks."""

    def save(self, path: Path) -> None:
        """Write everything; a crash meanwhile leaves the state before."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        beside = path.with_suffix(".part")
        torch.save(state, beside)
        beside.replace(path)

    def load(self, path: Path) -> None:
        """Restore what `save` wrote."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.step, self.seconds = state["step"], state["seconds"]


def optimizers_for(model: torch.nn.Module, heads: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for all else: embeddings, kernels, biases, norms, heads."""
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not name.endswith(_LOOKED_UP)
    ]
    taken = set(map(id, matrices))
    rest = [one for one in (*model.parameters(), *heads.parameters()) if id(one) not in taken]
    return [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=recipe.WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.0, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the network makes of a batch."""

    logits: torch.Tensor
    """`[n, vocabulary]`, at the places that have a label."""
    labels: torch.Tensor
    """`[n]`, those."""
    embeddings: torch.Tensor
    """`[n_image_tokens, width]`, as the language tower gets them."""


def outcome(model: Lfm2VlForConditionalGeneration, batch: Batch) -> Outcome:
    """Run the network."""
    _choose_attention(model, batch)
    shapes = torch.from_numpy(batch.shapes)
    counts = shapes.prod(1)
    mask = (torch.arange(batch.patches.shape[1]) < counts[:, None]).long()
    values = torch.from_numpy(batch.patches).float().mul_(1 / 127.5).sub_(1)
    questions = torch.from_numpy(batch.questions)
    output = model.model(
        input_ids=torch.from_numpy(batch.ids),
        attention_mask=masks(questions) if questions.max() > 1 else None,
        position_ids=torch.from_numpy(batch.positions),
        pixel_values=values,
        spatial_shapes=shapes,
        pixel_attention_mask=mask,
        use_cache=False,
    )
    labels = torch.from_numpy(batch.labels)
    wanted = labels != IGNORED
    return Outcome(
        logits=model.lm_head(output.last_hidden_state[wanted]),
        labels=labels[wanted],
        embeddings=torch.cat(output.image_outputs.pooler_output),
    )


def landmark_loss(heads: torch.nn.Linear, embeddings: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    """Return the mean over the kinds of landmarks; tokens with nothing to see, which are most, count little."""
    total = torch.zeros(())
    for logits, labels, absent in zip(heads(embeddings).float().split(CLASSES, 1), landmarks.T, ABSENT, strict=True):
        weights = torch.where(labels == absent, recipe.ABSENT_WEIGHT, 1.0)
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=UNKNOWN, reduction="none")
        weights = weights * (labels != UNKNOWN)
        total = total + (losses * weights).sum() / weights.sum().clamp_min(1.0)
    return total / len(CLASSES)


def round_norms(model: torch.nn.Module) -> None:
    """Let the norms before matrices return bfloat16: autocast would round each of their uses by itself."""
    for name, module in model.named_modules():
        if name.endswith(("operator_norm", "ffn_norm", "layer_norm1", "layer_norm2")):
            module.register_forward_hook(lambda _module, _inputs, output: output.bfloat16())


def _choose_attention(model: Lfm2VlForConditionalGeneration, batch: Batch) -> None:
    """Short sequences are quicker with plain matrix products (measured: half the time at 120 tokens)."""
    for config, length in (
        (model.config.vision_config, batch.patches.shape[1]),
        (model.config.text_config, batch.ids.shape[1]),
    ):
        config._attn_implementation = "eager" if length <= EAGER_TOKENS else "sdpa"  # noqa: SLF001


def learn(training: Training, batch: Batch, n_steps: int) -> float:
    """Take one step; return the loss."""
    rate = recipe.learning_rate(training.step, n_steps)
    share = recipe.stage_at(training.step / n_steps).landmarks
    weights = torch.from_numpy(batch.weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(training.model, batch)
        seen = landmark_loss(training.heads, found.embeddings, torch.from_numpy(batch.landmarks))
    losses = torch.nn.functional.cross_entropy(found.logits.float(), found.labels, reduction="none")
    weights = weights[torch.from_numpy(batch.labels) != IGNORED]
    loss = (losses * weights).sum() / weights.sum()
    (loss + share * seen).backward()
    training.seen.append(float(seen.item()))
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.item())


def judge(model: Lfm2VlForConditionalGeneration, batches: list[Batch]) -> dict[str, tuple[int, int]]:
    """Return for each group how many answers were right, and of how many.

    An answer counts when each of its tokens is the likeliest after the right ones before it, which is the same as
    when greedy decoding writes it.
    """
    scores: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for batch in batches:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = outcome(model, batch)
        hits = torch.zeros(batch.labels.shape, dtype=torch.bool)
        wanted = torch.from_numpy(batch.labels) != IGNORED
        hits[wanted] = found.logits.argmax(-1) == found.labels
        for groups, row_hits, row_wanted in zip(batch.groups, hits, wanted, strict=True):
            starts = torch.nonzero(row_wanted & ~row_wanted.roll(1)).flatten().tolist()
            for group, start in zip(groups, starts, strict=True):
                length = int(row_wanted[start:].logical_not().nonzero()[0])
                right, asked = scores[group]
                scores[group] = right + bool(row_hits[start : start + length].all()), asked + 1
    return dict(scores)


def _produce(queue: Queue[Batch], folder: str, start: int, n_steps: int) -> None:
    """Fill the queue, in a process of its own."""
    writer = Writer(Path(folder))
    for step in range(start, n_steps):
        queue.put(training_batch(writer, recipe.SEED, step, n_steps))


def batches_from(folder: Path, start: int, n_steps: int) -> Iterator[Batch]:
    """Yield the batch of each step."""
    context = multiprocessing.get_context("spawn")
    queue: Queue[Batch] = context.Queue(AHEAD)
    process = context.Process(target=_produce, args=(queue, str(folder), start, n_steps), daemon=True)
    process.start()
    for _ in range(start, n_steps):
        yield queue.get(timeout=120)
    process.join()


def export(model: Lfm2VlForConditionalGeneration, folder: Path) -> None:
    """Write the checkpoint in bfloat16, with tokenizer and settings."""
    copy = build(recipe.SEED)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder, recipe.SEED)
    write_settings(folder)


def report(training: Training, writer: Writer, steps: int) -> str:
    """Return one line: how far, how fast, how good on unseen images of the kind that is being learned."""
    nearby = range(training.step - JUDGED, training.step)
    judged = [training_batch(writer, recipe.HELD_OUT_SEED, step, steps) for step in nearby]
    training.model.eval()
    scores = judge(training.model, judged)
    training.model.train()
    loss = sum(training.losses) / len(training.losses)
    parts = [f"{group} {100 * right / asked:.0f}" for group, (right, asked) in sorted(scores.items())]
    seen = sum(training.seen) / len(training.seen)
    training.losses.clear()
    training.seen.clear()
    return f"{training.step} {training.seconds / 60:.1f} min loss {loss:.3f} landmarks {seen:.3f} | {' '.join(parts)}"


def main(
    steps: Annotated[int, typer.Option(help="Of the whole training.")] = 5400,
    state: Annotated[Path, typer.Option(help="Folder for what is saved meanwhile.")] = Path("scratch/tiny"),
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = Path("models/tiny/lfm2vl-tiny"),
    until: Annotated[int | None, typer.Option(help="Stop after this step, to go on later.")] = None,
) -> None:
    """Train, or go on training."""
    state.mkdir(parents=True, exist_ok=True)
    write_tokenizer(state, recipe.SEED)
    model = build(recipe.SEED)
    round_norms(model)
    keep_apart(model)
    heads = torch.nn.Linear(TEXT["hidden_size"], sum(CLASSES))
    training = Training(model=model, heads=heads, optimizers=optimizers_for(model, heads))
    saved = state / "state.pt"
    if saved.exists():
        training.load(saved)
        print(f"going on at step {training.step}", flush=True)
    writer = Writer(state)
    run(training, batches_from(state, training.step, steps), writer, saved, steps, until)
    if training.step == steps:
        export(model, out)


def run(
    training: Training, batches: Iterator[Batch], writer: Writer, saved: Path, steps: int, until: int | None
) -> None:
    """Learn from the batches; save and report now and then."""
    last = time.monotonic()
    for batch in batches:
        begin = time.monotonic()
        training.losses.append(learn(training, batch, steps))
        training.step += 1
        training.seconds += time.monotonic() - begin
        if training.step % REPORT_STEPS == 0:
            print(report(training, writer, steps), flush=True)
        if time.monotonic() - last > SAVE_SECONDS or training.step in (steps, until):
            training.save(saved)
            last = time.monotonic()
        if training.step == until:
            return


if __name__ == "__main__":
    typer.run(main)
