"""Train a model: `python train.py [model=…] [dataset=…] [KEY=VALUE …]`; `python train.py --help` lists them all."""

import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import data
import models
from conf import command
from conf.command import Stopped
from evaluate import check_classes, choose_device, label_for, nats_of, summarise
from models.base import bits_per_dim
from models.checkpoint import read, rebuild, save, write_atomically
from models.sampling import sample
from report import Bar, Metrics, environment, keep_freed_memory
from sample import labels_in_rows, save_grid

EVALUATION_BATCH = 64  # images: small enough for a cache, large enough for a GPU; evaluate.py has the same


def build_optimizer(config: dict, parameters) -> torch.optim.Optimizer:
    """The optimizer that `name` names, with the other keys as its arguments."""
    config, allowed = dict(config), {"rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW}
    name = config.pop("name", None)
    if name not in allowed:
        raise ValueError(f"optimizer.name={name!r} is not allowed: {' or '.join(allowed)} is")
    try:
        return allowed[name](parameters, foreach=True, **config)  # a few operations for all parameters together
    except TypeError as error:
        raise ValueError(f"optimizer: {error}") from None


def learning_rate_factor(step: int, steps: int, warmup: int, decay: str) -> float:
    """What the learning rate is multiplied by at `step` (from 0): linear warm-up, then constant or cosine to zero."""
    factor = min(1.0, (step + 1) / (warmup + 1))
    if decay == "cosine":
        factor *= 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))
    return factor


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights; its decay rises, so that the first weights are forgotten."""

    def update(average: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        n = int(count)
        torch._foreach_lerp_(average, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=update)


class Order:
    """The order of the data: a new permutation each epoch, by seed and epoch alone, so that a step is a place in it."""

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed
        self.per_epoch, self.epoch = n // self.batch_size, -1

    def batch(self, step: int) -> Tensor:
        """The indices of the images of a step: (b,)."""
        epoch, k = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self.permutation, self.epoch = torch.randperm(self.n, generator=generator), epoch
        return self.permutation[k * self.batch_size : (k + 1) * self.batch_size]


class Training:
    """What a run is made of, and what a checkpoint of it holds."""

    def __init__(self, cfg, dataset: data.Dataset, device: torch.device):
        torch.manual_seed(cfg.seed)
        self.config = OmegaConf.to_container(cfg, resolve=True)
        self.model_config = {**self.config["model"], **dataset.shape}
        self.model = models.build(self.model_config).to(device)
        check_classes(self.model, dataset)
        self.ema = averaged(self.model, cfg.ema) if cfg.ema else None
        self.optimizer = build_optimizer(self.config["optimizer"], self.model.parameters())
        self.binarizer = torch.Generator().manual_seed(cfg.seed)
        self.step, self.seconds, self.best_val = 0, 0.0, {}  # best_val: what `summarise` says of best.pt

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and sampled from."""
        return self.ema.module if self.ema else self.model

    def save(self, path: Path) -> None:
        checkpoint = {
            "model": self.model_config,
            "weights": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "config": self.config,
            "overrides": own_overrides(HydraConfig.get().overrides.task),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "best_val": self.best_val,
            "random": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "data": self.binarizer.get_state(),
            },
        }
        save(path, checkpoint)

    def restore(self, path: Path, device: torch.device) -> None:
        """Continue where a checkpoint was written; ValueError where it is of another model or optimizer."""
        checkpoint = read(path, device)
        if checkpoint["model"] != self.model_config or (checkpoint["ema"] is None) != (self.ema is None):
            raise ValueError(f"{path} is of another model than this run's: {checkpoint['model']}")
        self.model.load_state_dict(checkpoint["weights"])
        if self.ema:
            self.ema.module.load_state_dict(checkpoint["ema"])
            self.ema.n_averaged.fill_(checkpoint["step"])
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError:
            raise ValueError(f"{path} is of another optimizer than {self.config['optimizer']}") from None
        self.step, self.seconds, self.best_val = (checkpoint[k] for k in ("step", "seconds", "best_val"))
        random = checkpoint["random"]
        torch.set_rng_state(random["torch"].cpu())
        self.binarizer.set_state(random["data"].cpu())
        if torch.cuda.is_available() and random["cuda"]:
            torch.cuda.set_rng_state_all([state.cpu() for state in random["cuda"]])


def check_config(cfg) -> None:
    """Raise ValueError for a value that no type rules out."""
    for name in ("steps", "batch_size", "log_every", "evaluate_every", "save_every", "samples"):
        if cfg[name] < 1:
            raise ValueError(f"{name}={cfg[name]} is not allowed: at least 1 is")
    for name in ("seed", "warmup", "sample_every"):
        if cfg[name] < 0:
            raise ValueError(f"{name}={cfg[name]} is not allowed: at least 0 is")
    if cfg.decay not in ("cosine", "constant"):
        raise ValueError(f"decay={cfg.decay!r} is not allowed: cosine or constant is")
    if not 0 <= cfg.ema < 1:
        raise ValueError(f"ema={cfg.ema} is not allowed: 0 to below 1 is")
    if cfg.clip is not None and not cfg.clip > 0:
        raise ValueError(f"clip={cfg.clip} is not allowed: more than 0, or null, is")


class StopSignal:
    """SIGINT and SIGTERM ask the run to save and stop; a second one ends it at once."""

    def __enter__(self) -> "StopSignal":
        self.caught = 0
        numbers = signal.SIGINT, signal.SIGTERM
        self.before = {number: signal.signal(number, self.catch) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        self.restore()

    def catch(self, number: int, frame) -> None:
        self.caught = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Recent:
    """The mean loss and the rate since the last line of metrics; time spent on anything but steps is left out."""

    def __init__(self, device: torch.device):
        self.nats, self.steps, self.images = torch.zeros((), device=device), 0, 0
        self.start = time.perf_counter()

    def add(self, nats: Tensor, images: int) -> None:
        self.nats += nats.detach()
        self.steps += 1
        self.images += images

    def take(self) -> tuple[float, float, float]:
        """Nats an image, images a second, and seconds; counting begins anew."""
        nats, seconds = self.nats.item() / self.steps, time.perf_counter() - self.start
        rate = self.images / seconds
        self.nats.zero_()
        self.steps = self.images = 0
        self.restart()
        return nats, rate, seconds

    def restart(self) -> None:
        """Begin to count seconds anew."""
        self.start = time.perf_counter()


def check_finite(nats: float, what: str, folder: Path) -> None:
    """Stop the run where the loss is no number any more, before it is saved over a good checkpoint."""
    if not math.isfinite(nats):
        good = [str(folder / name) for name in ("last.pt", "best.pt") if (folder / name).exists()]
        where = f"the last good checkpoint is {good[0]}" if good else "no checkpoint was written before that"
        raise Stopped(f"the loss is {nats} {what}; {where}. A lower optimizer.lr or clip may help", 1)


def key(override: str) -> str:
    """The key that a command line argument KEY=VALUE (or +KEY=VALUE, ~KEY) is about."""
    return override.split("=")[0].lstrip("+~")


def own_overrides(overrides: list[str]) -> list[str]:
    """The arguments that say what a run is, not where it is or how it began."""
    return [override for override in overrides if key(override) != "resume" and not key(override).startswith("hydra.")]


def newest_unfinished(overrides: list[str]) -> Path | None:
    """The last.pt, below runs/, of the newest run with these arguments that has not come to its end."""
    paths = [path for path in Path("runs").rglob("last.pt") if not (path.parent / "summary.json").exists()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            if sorted(read(path)["overrides"]) == sorted(own_overrides(overrides)):
                return path
        except ValueError as error:
            print(f"resume=auto passes over a run: {error}", file=sys.stderr)
    return None


def resumed(argv: list[str]) -> list[str]:
    """Turn resume=FOLDER, or resume=auto, into the arguments that continue that run: its own, then these.

    auto is the newest unfinished run below runs/ that was started with these same arguments. Where there is none, or in
    a sweep or a folder given by hydra.run.dir, the arguments stay as they are.
    """
    given = {key(argument): argument for argument in argv}
    value = given.get("resume", "").partition("=")[2].strip("'\"")
    if value in ("", "null") or {"-m", "--multirun", "hydra.run.dir", "hydra.sweep.dir"} & given.keys():
        return argv
    path = newest_unfinished(argv) if value == "auto" else Path(value) / "last.pt"
    if path is None:
        return argv
    kept = [override for override in read(path)["overrides"] if key(override) not in given]
    quoted = str(path.parent).replace("\\", "\\\\").replace("'", "\\'")
    return [*kept, *argv, f"hydra.run.dir='{quoted}'"]


def main(cfg) -> None:
    check_config(cfg)
    keep_freed_memory()
    folder = Path(HydraConfig.get().runtime.output_dir)
    last, best = folder / "last.pt", folder / "best.pt"
    if last.exists() and cfg.resume is None:
        raise ValueError(f"{folder} holds a run already: resume={folder} continues it")
    if cfg.resume not in (None, "auto") and Path(cfg.resume).resolve() != folder.resolve():
        raise ValueError(f"resume={cfg.resume} is another folder than that of this run, {folder}")
    device, dataset = choose_device(cfg.device), data.build(cfg.dataset)
    run = Training(cfg, dataset, device)
    if last.exists():
        run.restore(last, device)
        (folder / "summary.json").unlink(missing_ok=True)
    model, shape, steps = run.model, run.model.shape, cfg.steps
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{folder}\n{type(model).__name__}, {parameters:,} parameters · {dataset.name}, {len(dataset.train):,} images"
    )
    print(f"{device}, {torch.get_num_threads()} threads · steps {run.step} to {steps}", flush=True)
    order, recent = Order(len(dataset.train), cfg.batch_size, cfg.seed), Recent(device)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=cfg.bf16 and device.type == "cuda")

    with Metrics(folder, run.step) as metrics, StopSignal() as signals, Bar("train", steps, run.step) as bar:
        while run.step < steps and not signals.caught:
            lr = cfg.optimizer.lr * learning_rate_factor(run.step, steps, cfg.warmup, cfg.decay)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            x, labels = dataset.train.batch(order.batch(run.step), run.binarizer)
            with autocast:
                nats = model(x.to(device), label_for(model, labels)).mean()
            (nats / math.prod(shape)).backward()
            if cfg.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            run.optimizer.step()
            run.optimizer.zero_grad()
            if run.ema:
                run.ema.update_parameters(model)
            run.step += 1
            recent.add(nats, len(x))
            bar.advance()

            ended = run.step == steps or signals.caught > 0
            log, evaluate, keep, draw = (
                n > 0 and (ended or run.step % n == 0)
                for n in (cfg.log_every, cfg.evaluate_every, cfg.save_every, cfg.sample_every)
            )
            if log or evaluate or keep:
                nats, rate, seconds = recent.take()
                run.seconds += seconds
                check_finite(nats, f"at step {run.step}", folder)
                bits = bits_per_dim(nats, shape)
                metrics.write(run.step, train_nats=nats, train_bits_per_dim=bits, lr=lr, images_per_second=rate)
                bar.text(f"{bits:.3f} bits/dim · {nats:.1f} nats · {rate:.0f} images/s")
            if evaluate and not signals.caught:
                val = summarise(nats_of(run.evaluated, dataset.val, EVALUATION_BATCH)["nats"], shape)
                check_finite(val["nats"], f"on the validation split at step {run.step}", folder)
                metrics.write(run.step, val_nats=val["nats"], val_bits_per_dim=val["bits_per_dim"])
                bar.say(f"step {run.step} · val {val['bits_per_dim']:.4f} bits/dim, {val['nats']:.2f} nats")
                if val["nats"] < run.best_val.get("nats", math.inf):
                    run.best_val = val
                    run.save(best)
            if evaluate or keep:
                run.save(last)
            if draw and not signals.caught:
                (folder / "samples").mkdir(exist_ok=True)
                label, columns = labels_in_rows(model.classes, cfg.samples)
                x = sample(run.evaluated, cfg.samples, seed=cfg.seed, label=label)
                save_grid(folder / "samples" / f"step_{run.step:06d}.png", x, dataset.levels, columns)
            if evaluate or keep or draw:
                recent.restart()
    if signals.caught and run.step < steps:
        raise Stopped(f"stopped at step {run.step}; to continue: python train.py resume={folder}", 128 + signals.caught)
    finish(run, dataset, folder, parameters)


def finish(run: Training, dataset: data.Dataset, folder: Path, parameters: int) -> None:
    """Evaluate the best checkpoint on the whole test split, and write summary.json."""
    best = read(folder / "best.pt", run.model.device)
    nats = nats_of(rebuild(best), dataset.test, EVALUATION_BATCH)
    result = {f"test_{name}": value for name, value in summarise(nats["nats"], run.model.shape).items()}
    result |= {f"test_{name}_nats": values.mean().item() for name, values in nats.items() if name != "nats"}
    result |= {f"val_{name}": value for name, value in best["best_val"].items()}
    result |= {
        "parameters": parameters,
        "steps": run.step,
        "best_step": best["step"],
        "train_seconds": run.seconds,
        "images_per_second": run.step * min(run.config["batch_size"], len(dataset.train)) / run.seconds,
        "command": " ".join(["python train.py", *HydraConfig.get().overrides.task]),
        **environment(run.model.device),
    }
    write_atomically(folder / "summary.json", lambda file: file.write((json.dumps(result, indent=2) + "\n").encode()))
    print(
        f"test {result['test_bits_per_dim']:.4f} ± {result['test_bits_per_dim_standard_error']:.4f} bits/dim, "
        f"{result['test_nats']:.3f} ± {result['test_nats_standard_error']:.3f} nats · {run.seconds:.0f} s of training"
    )
    print(f"{folder}: best.pt, last.pt, summary.json, samples/ · now: python sample.py")


if __name__ == "__main__":
    command.run("train", main, resumed)
