"""How near the integers of the engine `fast` come to the float network, on real chest X-rays.

    python benchmarks/fast_accuracy.py --data DIR --cache DIR --protocol
    python benchmarks/fast_accuracy.py --data DIR --cache DIR [--all-precisions] [--only trained|others] [--draws 8]

Trains ResNet18 (seeded, without privacy, some ten minutes on one idle core; kept in --cache), finds ranges on training
X-rays or public phantoms, and compares the emulated integer predictions with plaintext on test X-rays: every class equal
except where the top-two margin is under 0.02, largest logit error under 0.02. Then other networks with random weights and
measured BatchNorm. Prints JSON; each result also on stderr when it is ready.

With --protocol the X-rays go, in batches of --batch, through hospital, model owner and dealer, three processes over mutual TLS,
instead of the emulation; the trained network only. Exits with 1 when a mark is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mpc_fl import compatibility
from mpc_fl.apps.bench.inference import PARTIES, Job, fast_party, run_parties
from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import HeadroomError
from mpc_fl.inference.fast.quantization.calibration import Calibration, calibrate, self_check
from mpc_fl.inference.fast.quantization.emulation import Emulator
from mpc_fl.inference.fast.quantization.scales import Precision
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm
from mpc_fl.learning.models.model_file import load_model, save_model
from mpc_fl.roles import DEALER, HOSPITAL

compatibility.prepare()
import torchvision.models  # noqa: E402  (after the operators it needs are defined)

CLASSES = ("normal", "bacterial", "viral")
SIZE = 224
SEED = 1
# (image size, images, largest learning rate): most steps at half the size, for a quarter of the work.
STAGES = ((112, 32_000, 1e-3), (SIZE, 4_800, 3e-4))
BATCH = 32
MARGIN, LARGEST_ERROR = 0.02, 0.02
# Fractional bits of activations and of weights (None: what the range leaves). The first is the default.
PRECISIONS = ((12, None), (11, None), (13, None), (12, 12), (11, 13))
OTHERS = (("vgg11", 224), ("squeezenet1_1", 224), ("mobilenet_v2", 224), ("densenet121", 224), ("resnet50", 224))


def configuration(data: Path) -> Config:
    """Every hospital has all X-rays; one channel in memory, expanded to three when used."""
    return Config().with_values(
        seed=SEED,
        data={
            "source": "images",
            "classes": CLASSES,
            "image_size": SIZE,
            "channels": 3,
            "partition": {"method": "none"},
        },
        model={"architecture": "resnet18", "normalisation": "frozen"},
        site={"data": data},
    )


def grey(config: Config, split: Literal["train", "test"]) -> Dataset:
    """All records of a split with one channel, float32 (N, 1, 224, 224)."""
    return load_hospital(config.with_values(data={"channels": 1}), 0, split)


def train(config: Config, data: Dataset) -> nn.Module:
    """ResNet18 with ordinary BatchNorm, bfloat16 where torch allows it, seeded; in evaluation mode."""
    frozen = build_model(config, input_shape=(3, SIZE, SIZE), seed=SEED)
    model = torchvision.models.resnet18(num_classes=len(CLASSES))
    model.load_state_dict(frozen.state_dict())
    model = model.to(memory_format=torch.channels_last).train()
    draw = torch.Generator().manual_seed(SEED)
    counts = torch.bincount(data.labels, minlength=len(CLASSES)).double()
    weights = (len(data) / counts / len(CLASSES))[data.labels]
    for size, images, rate in STAGES:
        steps = images // BATCH
        optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
        start, mean = time.perf_counter(), 0.0
        for step in range(steps):
            rows = torch.multinomial(weights, BATCH, generator=draw)
            x = data.inputs[rows]
            if bool(torch.rand((), generator=draw) < 0.5):
                x = x.flip(-1)
            if size != SIZE:
                x = nn.functional.interpolate(x, (size, size), mode="area")
            x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x).float(), data.labels[rows])
            loss.backward()
            optimiser.step()
            schedule.step()
            mean = 0.95 * mean + 0.05 * loss.item()
            if step % 25 == 24:
                seconds = time.perf_counter() - start
                print(f"{size} px, step {step + 1} of {steps}, loss {mean:.3f}, {seconds:.0f} s", file=sys.stderr)
    return model.to(memory_format=torch.contiguous_format).eval()


def trained(config: Config, cache: Path) -> nn.Module:
    """The network from the cache, trained first if it is not there."""
    path = cache / "resnet18_xray.safetensors"
    if not path.exists():
        save_model(path, train(config, grey(config, "train")), config)
    return load_model(path, config)


def evenly(count: int, of: int) -> torch.Tensor:
    """`count` row numbers spread over `of` rows."""
    return torch.linspace(0, of - 1, min(count, of)).round().long()


def colour(images: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """One channel to three, float32 (N, 3, size, size)."""
    if size != SIZE:
        images = nn.functional.interpolate(images, (size, size), mode="area")
    return images.expand(-1, 3, -1, -1)


def float_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Plaintext logits, float64 (N, classes)."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(BATCH)]).double()


def unusual(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The images and what could be asked about by mistake or malice, some of it unlike any calibration image."""
    draw = torch.Generator().manual_seed(1)
    few = images[:32]
    return {
        "test X-rays": images,
        "inverted": 1 - few,
        "contrast doubled": (2 * few - 0.5).clamp(0, 1),
        "upside down": few.flip(2),
        "one channel of three": few * torch.tensor([1.0, 0.0, 0.0])[:, None, None],
        "noise": torch.rand(4, *images.shape[1:], generator=draw),
        "black and white noise": torch.randint(0, 2, (4, *images.shape[1:]), generator=draw).float(),
    }


def approach(calibration: Calibration, images: torch.Tensor) -> dict[str, Any]:
    """How near images come to a limit, or which layer they leave."""
    try:
        return asdict(self_check(calibration, images))
    except HeadroomError as error:
        return {"out_of_range": error.what}


def differences(expected: torch.Tensor, found: torch.Tensor) -> dict[str, Any]:
    """How far logits are from plaintext's, and whether both marks are met."""
    top = expected.topk(2, dim=1).values
    every_margin, errors = top[:, 0] - top[:, 1], (found - expected).abs()
    margins = every_margin[expected.argmax(1) != found.argmax(1)]
    return {
        "images": len(expected),
        "largest_logit_error": float(errors.max()),
        "rms_logit_error": float(errors.square().mean().sqrt()),
        "largest_logit": float(expected.abs().max()),
        "smallest_margin": float(every_margin.min()),
        "predictions_equal": len(expected) - len(margins),
        "margins_where_different": margins.tolist(),
        "within_marks": bool((margins < MARGIN).all()) and float(errors.max()) < LARGEST_ERROR,
    }


def compare(
    model: nn.Module, calibration_images: torch.Tensor, images: torch.Tensor, precision: Precision, draws: int
) -> dict[str, Any]:
    """Integer against float predictions in the worst of some draws, the range that was left, and the stated risk."""
    calibration = calibrate(model, calibration_images, precision)
    emulator = Emulator(calibration.network, calibration.weights.inside_protocol())
    expected = float_logits(model, images)
    start = time.perf_counter()
    found = [
        differences(expected, torch.cat([emulator.logits(batch, Seed.from_system()) for batch in images.split(8)]))
        for _ in range(draws)
    ]
    seconds = (time.perf_counter() - start) / len(images) / draws
    risk = asdict(calibration.risk)
    closest = calibration.risk.closest
    risk["closest"] = {"path": closest.path, "largest": closest.largest, "limit": closest.limit}
    return {
        "precision": asdict(precision),
        **max(found, key=lambda each: each["largest_logit_error"]),
        "largest_logit_error_by_draw": [each["largest_logit_error"] for each in found],
        "within_marks": all(each["within_marks"] for each in found),
        "gate_bits_used": sorted({value.bits for value in calibration.network.values.values() if not value.wide}),
        "weight_bits": sorted({layer.weight_bits for layer in calibration.network.linear_layers}),
        "closest_approach": {name: approach(calibration, chosen) for name, chosen in unusual(images).items()},
        "risk": risk,
        "emulation_seconds_per_image": seconds,
    }


def trained_network(options: argparse.Namespace, config: Config) -> list[dict[str, Any]]:
    """ResNet18 on test X-rays: every precision, calibrated on training X-rays; the first also on public phantoms."""
    model = trained(config, options.cache)
    test, owned = grey(config, "test"), grey(config, "train")
    rows = evenly(options.images, len(test))
    images = colour(test.inputs[rows])
    calibration_images = colour(owned.inputs[evenly(options.calibration_images, len(owned))])
    accuracy = float((float_logits(model, colour(test.inputs)).argmax(1) == test.labels).double().mean())
    results = []
    for activation_bits, weight_bits in PRECISIONS[: None if options.all_precisions else 1]:
        precision = Precision(activation_bits, weight_bits, safety=options.safety)
        sources = {"training X-rays": calibration_images}
        if not results:
            sources["public phantoms"] = public_phantoms(options.calibration_images, config)
        for source, chosen in sources.items():
            result = {"network": "resnet18, trained", "test_accuracy_of_float": accuracy, "calibrated_on": source}
            results.append({**result, **compare(model, chosen, images, precision, options.draws)})
            print(json.dumps(results[-1]), file=sys.stderr)
    return results


@dataclass(frozen=True, kw_only=True)
class XRays(Job):
    """The trained network and test X-rays, read from `data` and `cache` by every process."""

    data: Path
    cache: Path
    count: int
    calibration_count: int

    def network(self) -> nn.Module:
        return trained(configuration(self.data), self.cache)

    def calibration_images(self) -> torch.Tensor:
        owned = grey(configuration(self.data), "train")
        return colour(owned.inputs[evenly(self.calibration_count, len(owned))]).clone()

    def images(self) -> torch.Tensor:
        test = grey(configuration(self.data), "test")
        return colour(test.inputs[evenly(self.count, len(test))]).clone()


def over_the_protocol(options: argparse.Namespace) -> dict[str, Any]:
    """Encrypted against plaintext diagnoses, in a real session of three processes."""
    count = options.images - options.images % options.batch
    job = XRays(
        "resnet18",
        SIZE,
        options.batch,
        0,
        data=options.data,
        cache=options.cache,
        count=count,
        calibration_count=options.calibration_images,
    )
    expected = float_logits(job.network(), job.images())  # trains first if need be
    parties = run_parties(fast_party, PARTIES, job)
    hospital = parties[HOSPITAL]
    found = torch.tensor(hospital["logits"], dtype=torch.float64)
    online, offline = (sum(hospital[phase]) / count for phase in ("online", "offline"))
    return {
        "network": "resnet18, trained",
        "parties": "hospital, model owner, dealer: three processes, mutual TLS",
        "batch": options.batch,
        **differences(expected, found),
        "online_seconds_per_image": online,
        "offline_seconds_per_image": offline,
        "bytes_sent_per_image": {
            name: result["bytes_sent"] // count for name, result in parties.items() if name != DEALER
        },
        "sequential_messages": hospital["sequential_messages"],
    }


def other_networks(options: argparse.Namespace, config: Config) -> list[dict[str, Any]]:
    """Random weights, BatchNorm measured on training X-rays, calibrated on them, compared on test X-rays."""
    test, owned = grey(config, "test"), grey(config, "train")
    results = []
    for name, size in OTHERS:
        model = build_model(config.with_values(model={"architecture": name}), input_shape=(3, size, size), seed=SEED)
        measured = colour(owned.inputs[evenly(64, len(owned))], size)
        calibrate_batchnorm(model, measured)
        images = colour(test.inputs[evenly(options.other_images, len(test))], size)
        compared = compare(model.eval(), measured, images, Precision(safety=options.safety), options.draws)
        results.append({"network": f"{name}, random weights", "size": size, **compared})
        print(json.dumps(results[-1]), file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="DIR/{train,test}/{normal,bacterial,viral}/")
    parser.add_argument("--cache", type=Path, required=True, help="where the trained network is kept, outside the tree")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--other-images", type=int, default=16)
    parser.add_argument("--draws", type=int, default=1, help="runs with fresh random truncations; the worst is judged")
    parser.add_argument("--safety", type=float, default=4.0)
    parser.add_argument("--all-precisions", action="store_true", help="compare ways to divide the bits, too")
    parser.add_argument("--protocol", action="store_true", help="three real processes in place of the emulation")
    parser.add_argument("--batch", type=int, default=1, help="images that --protocol sends together")
    parser.add_argument("--only", choices=("trained", "others"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = configuration(options.data)
    if options.protocol:
        result = over_the_protocol(options)
        print(json.dumps(result, indent=1))
        sys.exit(0 if result["within_marks"] else 1)
    results = [] if options.only == "others" else trained_network(options, config)
    results += [] if options.only == "trained" else other_networks(options, config)
    print(json.dumps(results, indent=1))
    # Of the trained network the first row is the default; the others only show what it was chosen among.
    judged = results if options.only == "others" else [results[0], *(row for row in results if "size" in row)]
    sys.exit(0 if all(row["within_marks"] for row in judged) else 1)


if __name__ == "__main__":
    main()
