"""Train a model: `python train.py [model=…] [dataset=…] [KEY=VALUE …]`; `python train.py --help` lists them all."""

import copy
import math
import operator
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from torch import Tensor, nn

import data
import models
from checks import check, check_one_of, shortened, unexpected
from cli import command
from cli.command import Stopped, StopSignal
from cli.loggers import Records, chosen
from cli.machine import choose_device, environment, is_first, keep_freed_memory, rank_and_world
from cli.output import completions_in_rows, grid, in_words, labels_in_rows, upper_rows, write_json
from cli.parallel import from_first, gathered, largest, own_part, together, total
from cli.progress import Bar, Throughput
from cli.report import write_report
from cli.runs import (
    check_classes,
    check_folder,
    check_frames,
    continued,
    count_classes,
    differences,
    find_model,
    held,
    named_by_what_differs,
    overrides_of,
    own_overrides,
    point_to,
    read_last,
    resumed,
    write_config,
)
from data.order import EpochOrder
from models.base import LATER, ImageModel, bits_per_dim
from models.begin import begin_with
from models.checkpoint import in_one_line, read, rebuild, save
from models.likelihood import EVALUATION_BATCH, label_for, nats_of, summarise
from models.optimizers import build_optimizer, load_state
from models.sampling import sample
from models.training_step import TrainingStep

COMPLETIONS = 6  # of each image in a picture of completions


def check_config(cfg) -> None:
    """Raise ValueError for a value that its type does not rule out."""
    for name in ("steps", "batch_size", "accumulate", "log_every", "evaluate_every", "save_every", "samples"):
        check(name, cfg[name], int, 1)
    for name in ("seed", "warmup", "sample_every", "completed"):
        check(name, cfg[name], int, 0)
    check_one_of("decay", cfg.decay, ("cosine", "constant"))
    if not 0 <= cfg.ema < 1:
        raise unexpected("ema", cfg.ema, "a number from 0 to below 1")
    if cfg.evaluate_images is not None:
        check("evaluate_images", cfg.evaluate_images, int, 1)
    if cfg.clip is not None and not cfg.clip > 0:
        raise unexpected("clip", cfg.clip, "a number above 0, or null")


def learning_rate_factor(step: int, steps: int, warmup: int, decay: str) -> float:
    """Return the factor of the learning rate at `step`, from 0: linear warm-up, then constant or cosine to zero."""
    factor = min(1.0, (step + 1) / (warmup + 1))
    if decay == "cosine":
        factor *= 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))
    return factor


def averaging_decay(step: int, decay: float) -> float:
    """Return how much of themselves averaged weights keep after `step`, from 0: ever more, to forget the first."""
    return min(decay, (1 + step) / (10 + step)) if step else 0.0


class Training:
    """The state of a run, in all processes alike: model, averaged weights, optimizer, random state of binarization."""

    def __init__(self, cfg, overrides: list[str], dataset: data.Dataset, device: torch.device):
        torch.manual_seed(cfg.seed)
        self.config, self.overrides = OmegaConf.to_container(cfg, resolve=True), overrides
        self.model_config = {**self.config["model"], **dataset.shape}
        self.model = models.build(self.model_config).to(device)
        check_classes(self.model, dataset)
        self.ema = copy.deepcopy(self.model) if cfg.ema else None
        self.optimizer = build_optimizer(self.config["optimizer"], self.model)
        options = {"accumulate": cfg.accumulate, "seed": cfg.seed, "bf16": cfg.bf16, "graph": cfg.cuda_graph}
        self.training_step = TrainingStep(self.model, self.optimizer, self.ema, cfg.clip, **options)
        self.binarizer = torch.Generator().manual_seed(cfg.seed)
        self.step, self.validated, self.seconds = 0, 0, 0.0  # the last step that was validated
        self.best_val = {}  # what `summarise` says of best.pt on the validation split

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate and to draw from."""
        return self.ema or self.model

    @property
    def num_parameters(self) -> int:
        """How many parameters the model has."""
        return sum(p.numel() for p in self.model.parameters())

    def take_step(self, x: Tensor, labels: Tensor | None, first: int, of: int) -> Tensor:
        """Take a step of the optimizer on images x (b c h w) with labels (b,); return their part in the mean nats.

        They are the images from number `first` on, `of` those of all processes.
        """
        config = self.config
        factor = learning_rate_factor(self.step, config["steps"], config["warmup"], config["decay"])
        rates = {"lr": config["optimizer"]["lr"] * factor, "decay": averaging_decay(self.step, config["ema"])}
        labels = label_for(self.model, labels)
        nats = self.training_step(x, labels, **rates, step=self.step, first=first, of=of)
        self.step += 1
        return nats

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all, and none that holds a number that is not finite."""
        self.check_weights(path.parent)
        if not is_first():
            return
        checkpoint = {
            "model": self.model_config,
            "weights": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "config": self.config,
            "overrides": self.overrides,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "validated": self.validated,
            "seconds": self.seconds,
            "best_val": self.best_val,
            "random": {"data": self.binarizer.get_state()},
        }
        save(path, checkpoint)

    def check_weights(self, folder: Path) -> None:
        """Stop the run of a folder if a weight or a number of the optimizer's is infinite or none."""
        kept = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        tensors = [*self.evaluated.parameters(), *self.model.parameters(), *(x for x in kept if x.dim())]
        tensors = [x for x in tensors if x.numel()]
        with torch.no_grad():
            largest = torch.stack(torch._foreach_norm(tensors, math.inf)).max().item()
        check_finite(largest, "a weight", f"after step {self.step}", folder)

    def begin_from(self, path: Path, checkpoint: dict) -> None:
        """Take the weights of a trained model, averaged ones where it has them; ValueError if they do not fit."""
        try:
            begin_with(self.model, rebuild(checkpoint, path))
        except ValueError:
            self.check_model(path, checkpoint)
            raise
        if self.ema:
            self.ema.load_state_dict(self.model.state_dict())

    def check_model(self, path: Path, checkpoint: dict) -> None:
        """Raise ValueError, with what differs, if a checkpoint's model is another than this run's."""
        mine, found = ({**LATER, **of} for of in (self.model_config, checkpoint["model"]))
        if found != mine:
            mine, found = ({k: of[k] for k in of if mine.get(k) != found.get(k)} for of in (mine, found))
            raise ValueError(f"{path}: expected this run's model {mine}, found {found}")

    def restore(self, path: Path, checkpoint: dict) -> None:
        """Continue where a checkpoint was written; ValueError if its model or optimizer is another than this run's."""
        self.check_model(path, checkpoint)
        if (checkpoint["ema"] is None) != (self.ema is None):
            raise unexpected("ema", self.config["ema"], f"{checkpoint['config']['ema']}, as in {path}")
        name = checkpoint["config"]["optimizer"]["name"]
        if self.config["optimizer"]["name"] != name:
            raise unexpected("optimizer.name", self.config["optimizer"]["name"], f"{name}, as in {path}")
        try:
            self.model.load_state_dict(checkpoint["weights"])
            if self.ema:
                self.ema.load_state_dict(checkpoint["ema"])
            load_state(self.optimizer, checkpoint["optimizer"])
            self.binarizer.set_state(checkpoint["random"]["data"])
            self.validated = operator.index(checkpoint.get("validated", checkpoint["step"]))
        except Exception as error:  # a value of any kind, anywhere
            raise ValueError(f"{path}: expected the state of this run, found another: {in_one_line(error)}") from None
        self.step, self.seconds, self.best_val = (checkpoint[k] for k in ("step", "seconds", "best_val"))


def check_finite(value: float, what: str, when: str, folder: Path) -> None:
    """Stop a run whose numbers are none any more, before it is saved over a good checkpoint."""
    if not math.isfinite(value):
        good = [str(folder / name) for name in ("last.pt", "best.pt") if (folder / name).exists()]
        where = f"the last good checkpoint is {good[0]}" if good else "no checkpoint was written before that"
        raise Stopped(f"{what} is {value} {when}; {where}. A lower optimizer.lr or clip may help", 1)


def log(run: Training, throughput: Throughput, folder: Path, records: Records, bar: Bar) -> None:
    """Say and write how the steps since the last line went."""
    nats, rate, seconds = throughput.take()
    nats = total(nats)
    run.seconds += seconds
    check_finite(nats, "the loss", f"at step {run.step}", folder)
    bits, lr = bits_per_dim(nats, run.model.shape), float(run.optimizer.param_groups[0]["lr"])
    records.write(run.step, train_nats=nats, train_bits_per_dim=bits, lr=lr, images_per_second=rate)
    bar.text(f"{bits:.3f} bits/dim · {nats:.1f} nats · {rate:.0f} images/s")


def nats_of_all(model: ImageModel, split: data.Split, tell: Callable[[int], None]) -> dict[str, Tensor]:
    """Measure the nats of each image of a split, as `nats_of`; of several processes each measures some batches."""
    parts = gathered(nats_of(model, split, tell=tell, share=rank_and_world()))
    batches = range(math.ceil(len(split) / EVALUATION_BATCH))
    own = [{name: values.split(EVALUATION_BATCH) for name, values in part.items()} for part in parts]
    return {name: torch.cat([own[k % len(own)][name][k // len(own)] for k in batches]) for name in own[0]}


def validate(run: Training, split: data.Split, folder: Path, records: Records, bar: Bar) -> None:
    """Measure the whole validation split, and write best.pt if the model was never as good before."""
    tell = bar.part("validation", len(split))
    val = summarise(nats_of_all(run.evaluated, split, tell)["nats"], run.model.shape)
    check_finite(val["nats"], "the loss", f"on the validation split at step {run.step}", folder)
    records.write(run.step, val_nats=val["nats"], val_bits_per_dim=val["bits_per_dim"])
    run.validated = run.step
    bar.say(f"step {run.step} · val {val['bits_per_dim']:.4f} bits/dim, {val['nats']:.2f} nats")
    if val["nats"] < run.best_val.get("nats", math.inf):
        run.best_val = val
        run.save(folder / "best.pt")


def draw(run: Training, val: data.Split, folder: Path, records: Records) -> None:
    """Record a picture of samples, and one of completions of the validation split's first images."""
    run.check_weights(folder)
    if not is_first():
        return
    n, seed, levels = run.config["samples"], run.config["seed"], run.model.levels
    label, columns = labels_in_rows(range(run.model.classes), n)
    x = sample(run.evaluated, n, seed=seed, label=label)
    records.picture(run.step, "samples", grid(x, levels, columns))
    if run.config["completed"]:
        x, labels = val.batch(slice(run.config["completed"]), torch.Generator().manual_seed(seed))
        given = x.long(), upper_rows(x, 0.5)
        known = tuple(tensor.repeat_interleave(COMPLETIONS, 0) for tensor in given)
        label = labels.repeat_interleave(COMPLETIONS) if run.model.classes else None
        drawn = sample(run.evaluated, len(known[0]), seed=seed, label=label, known=known)
        rows = completions_in_rows(*given, drawn)
        records.picture(run.step, "completions", grid(rows, levels, 2 + COMPLETIONS))


def finish(run: Training, dataset: data.Dataset, folder: Path, records: Records) -> None:
    """Evaluate the best checkpoint on the whole test split, and write summary.json."""
    best = from_first(lambda: read(folder / "best.pt"))
    split = dataset.test.first(run.config["evaluate_images"])
    with Bar("test", len(split)) as bar:
        nats = nats_of_all(rebuild(best, folder / "best.pt").to(run.model.device), split, bar.count)
    if not is_first():
        return
    result = {f"test_{name}": value for name, value in summarise(nats["nats"], run.model.shape).items()}
    result |= {f"test_{name}_nats": values.mean().item() for name, values in nats.items() if name != "nats"}
    records.final(run.step, result)
    result |= {f"val_{name}": value for name, value in best["best_val"].items()}
    result |= {
        "test_images": len(split),
        "parameters": run.num_parameters,
        "classes": run.model.classes,
        "steps": run.step,
        "best_step": best["step"],
        "train_seconds": run.seconds,
        "images_per_second": run.step * min(run.config["batch_size"], len(dataset.train)) / run.seconds,
        "overrides": run.overrides,
        "command": " ".join(["python train.py", *run.overrides]),
        **environment(run.model.device),
    }
    write_json(folder / "summary.json", result)
    write_report(folder)
    print(
        f"test {result['test_bits_per_dim']:.4f} ± {result['test_bits_per_dim_standard_error']:.4f} bits/dim, "
        f"{result['test_nats']:.3f} ± {result['test_nats_standard_error']:.3f} nats · {run.seconds:.0f} s of training"
    )
    print(f"{folder}: best.pt, last.pt, summary.json, report.html, samples/ · now: python sample.py")


def main(cfg) -> float:
    """Train, and return the best bits/dim of the validation split, which a sweeper may minimise."""
    keep_freed_memory()
    folder = from_first(lambda: Path(HydraConfig.get().runtime.output_dir))
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        point_to(Path(HydraConfig.get().sweep.dir))
    with held(folder) if is_first() else nullcontext():
        return train(cfg, folder)


def train(cfg, folder: Path) -> float:
    """Begin or continue the run of a folder."""
    arguments = HydraConfig.get().overrides.task
    overrides, last, checkpoint = own_overrides(arguments), folder / "last.pt", from_first(lambda: found(folder, cfg))
    if checkpoint:
        cfg = continued(cfg, checkpoint, arguments, last)
        overrides = overrides_of(checkpoint, arguments)
    check_config(cfg)
    loggers = from_first(lambda: chosen(cfg.logger))
    device, dataset = choose_device(cfg.device), data.build(cfg.dataset)
    check_frames(cfg.model, dataset)
    count_classes(cfg.model, dataset)
    n, parts = min(cfg.batch_size, len(dataset.train)), cfg.accumulate * rank_and_world()[1]
    if n < parts:
        raise unexpected(
            "batch_size", cfg.batch_size, f"at least {parts}, an image for each process and part of a step"
        )
    run, val = Training(cfg, overrides, dataset, device), dataset.val.first(cfg.evaluate_images)
    if cfg.init_from and not checkpoint:
        trained = find_model(cfg.init_from)
        run.begin_from(trained, from_first(lambda: read(trained)))
    if checkpoint:
        run.restore(last, checkpoint)
        for text in differences(checkpoint["config"], run.config):
            print(f"this run goes on with {text}")
    print(f"{folder}\n{type(run.model).__name__}, {run.num_parameters:,} parameters", end=" · ")
    print(f"{dataset.name}, {len(dataset.train):,} {in_words(run.model.shape)}, {run.model.levels} levels")
    if dataset.names:
        print(shortened(f"labels: {', '.join(f'{k} {name!r}' for k, name in enumerate(dataset.names))}"))
    processes = f" in each of {rank_and_world()[1]} processes" if rank_and_world()[1] > 1 else ""
    print(f"{device}, {torch.get_num_threads()} threads{processes} · steps {run.step} to {cfg.steps}", flush=True)
    if cfg.batch_size > n:
        print(f"batch_size={cfg.batch_size}: each step has all {n:,} images")
    records = Records(folder)
    from_first(lambda: records.open(loggers, run.config, run.step))
    with records:
        if is_first():
            (folder / "summary.json").unlink(missing_ok=True)
            write_config(folder, cfg, overrides)
        stop = take_steps(cfg, run, dataset.train, val, folder, records)
        if stop and run.step < cfg.steps:
            raise Stopped(f"stopped at step {run.step}; to continue: python train.py resume={folder}", 128 + stop)
        finish(run, dataset, folder, records)
    return run.best_val["bits_per_dim"]


def take_steps(cfg, run: Training, split: data.Split, val: data.Split, folder: Path, records: Records) -> int:
    """Train to the last step, or to a signal; return the signal's number, or 0."""
    n = min(cfg.batch_size, len(split))
    order, throughput = EpochOrder(len(split), cfg.batch_size, cfg.seed), Throughput(run.model.device)
    own = own_part(n)
    with StopSignal() as signals, Bar("train", cfg.steps, run.step) as bar:
        stop = 0
        if run.validated < run.step and run.step % cfg.evaluate_every == 0:  # a signal came just then
            validate(run, val, folder, records, bar)
        while run.step < cfg.steps and not stop:
            x, labels = split.batch(order.batch(run.step), run.binarizer)
            labels = None if labels is None else labels[own]
            throughput.add(run.take_step(x[own], labels, own.start, n), n)
            bar.advance()

            stop = largest(signals.caught)
            ended = run.step == cfg.steps or stop > 0
            to_log, to_validate, to_save, to_draw = (
                n > 0 and (ended or run.step % n == 0)
                for n in (cfg.log_every, cfg.evaluate_every, cfg.save_every, cfg.sample_every)
            )
            if to_log or to_validate or to_save:
                log(run, throughput, folder, records, bar)
            if to_validate and not stop:
                validate(run, val, folder, records, bar)
            if to_draw and not stop:
                draw(run, val, folder, records)
            if to_validate or to_save:  # last, as a run that goes on from here does none of this again
                run.save(folder / "last.pt")
                if is_first():
                    write_report(folder)
            if to_validate or to_save or to_draw:
                throughput.restart()
    return stop


def found(folder: Path, cfg) -> dict | None:
    """Return the checkpoint that a run goes on from, or None."""
    check_folder(folder, cfg.resume)
    return read_last(folder) if (folder / "last.pt").exists() else None


def prepare(argv: list[str]) -> list[str]:
    """Return the arguments that Hydra sees; only the first of several processes has a folder of its own."""
    if rank_and_world()[1] > 1 and {"-m", "--multirun"} & {*argv}:
        raise ValueError("-m: expected one process: each run of a sweep is trained by one")
    argv = from_first(lambda: named_by_what_differs(resumed(argv)))
    return argv if is_first() else [*argv, "hydra.run.dir=."]


if __name__ == "__main__":
    from train import main as task  # by its module's name, by which a launcher of processes finds it again

    with together():
        command.run("train", task, prepare)
