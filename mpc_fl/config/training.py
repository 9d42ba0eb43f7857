"""Sections about the network and how it is trained.

Each class checks what can be checked within it; what must fit between two sections is checked by `config.Config`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpc_fl.config.section import Count, Digest, Momentum, Positive, Section, Steps, Strategy, Whole

Weight = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class ModelSection(Section):
    """Architecture: `small_cnn`, `mlp`, `linear` (weights alone, zero at first), `efficientnet_lite0`, `scattering`, any
    torchvision classifier by name (`resnet18`), or a function of an installed package (`package.module:function`), which is
    called with the shape of a record and the number of classes (`learning/models/own_networks.py`).

    `initial_weights` (as `mpc-fl model import` prints them) are those of a network trained elsewhere, its last layer aside where
    that has other classes. `normalisation` says what replaces trained BatchNorm: `frozen` keeps its statistics fixed (those of
    `initial_weights`, else calibrated on public synthetic images; free under encryption), `group` uses GroupNorm (costs
    inverse square roots under encryption).
    """

    architecture: str = Field(
        default="small_cnn",
        description="network that is trained: small_cnn, mlp, linear, resnet18, a function of a package",
    )
    initial_weights: Digest | None = Field(
        default=None, description="SHA-256 of the file of weights to begin with; null: drawn from the seed"
    )
    normalisation: Literal["frozen", "group"] = Field(
        default="frozen", description="what replaces trained BatchNorm: its statistics kept fixed, or GroupNorm"
    )
    weight_standardisation: bool = Field(
        default=False,
        description="train convolutions through filters of mean 0 and norm 1; the model file has plain ones",
    )
    hidden: tuple[Count, ...] = Field(default=(32, 32), description="widths of the hidden layers of an mlp")


class AugmentationSection(Section):
    """Random copies of images: a patient's gradient is the mean over `copies` of them, before it is clipped. Images only.

    Each copy is mirrored with probability 1/2 (`flip`), shifted by up to a share `shift` of its side, turned by up to
    `rotation` degrees either way, scaled by up to a share `scale`, and changed in contrast by up to a share `contrast`. Without
    any of these nothing is augmented.
    """

    copies: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="random copies of an image, whose mean gradient is taken"
    )
    flip: bool = Field(default=False, description="mirror each copy with probability 1/2")
    shift: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.0, description="farthest shift of a copy, as a share of its side"
    )
    rotation: Annotated[float, Field(ge=0, le=180)] = Field(
        default=0.0, description="largest turn of a copy either way, in degrees"
    )
    scale: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.0, description="largest change of a copy's size, as a share of it"
    )
    contrast: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="largest change of a copy's contrast, as a share of it"
    )

    @property
    def varies(self) -> bool:
        """Whether copies differ from their image at all."""
        return self.flip or any((self.shift, self.rotation, self.scale, self.contrast))

    @model_validator(mode="after")
    def _check(self) -> AugmentationSection:
        if self.copies > 1 and not self.varies:
            raise ValueError("copies would all be alike; set flip, shift, rotation, scale or contrast, or copies: 1")
        return self


class TrainingSection(Section):
    """Local training between two aggregations. `batch_size` is the expected number of patients per step (Poisson).

    `strategy` says what becomes of the opened mean: `fedavg` adds the mean update, `fedavgm`, `fedadam` and `fedyogi` step
    along it with momentum or adaptively, `fedsgd` opens every single gradient and steps with `learning_rate` and
    `momentum`. `fedprox` is `fedavg` with a `proximal` term in the local steps, which other strategies may have as well.
    `local_normalisation` (FedBN) leaves parameters and statistics of normalisation layers at each hospital.

    `schedule` and `warm_up` say how `learning_rate` goes over all steps of the run; with distributed noise it is the aggregator
    that steps, with whatever rate the strategy has. docs/training.md has recipes.
    """

    strategy: Strategy | None = Field(
        default=None,
        description="what becomes of the opened mean; null: fedavg, or fedsgd with privacy.mechanism distributed",
    )
    rounds: Steps = Field(default=5, description="rounds of training, each ended by signatures of all")
    local_steps: Steps = Field(
        default=10, description="steps in a round; with distributed noise each is a secure sum of its own"
    )
    batch_size: Count = Field(
        default=64, description="expected number of patients in a step of a hospital; who is in it is drawn at random"
    )
    learning_rate: Positive = Field(default=0.1, description="how far a step goes along the gradient")
    momentum: Momentum = Field(default=0.9, description="share of the step before that is added to a step; 0: none")
    keep_momentum: bool | None = Field(
        default=None,
        description="a hospital's momentum lasts over rounds, instead of starting at zero in each; null: with local noise",
    )
    schedule: Literal["constant", "cosine"] = Field(
        default="constant",
        description="how the learning rate goes over all steps: stays, or falls towards 0 along a cosine",
    )
    warm_up: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of all steps in which the learning rate rises"
    )
    gradient_clipping: Positive | None = Field(
        default=None, description="without privacy: norm to which a batch's mean gradient is shortened"
    )
    class_weights: tuple[Weight, ...] | None = Field(
        default=None, description="public, one for each class: what the loss of its records is multiplied with"
    )
    augmentation: AugmentationSection = AugmentationSection()
    server_learning_rate: Positive | None = Field(
        default=None,
        description="how far the aggregator steps along the opened mean; null: 1, or 0.03 for fedadam and fedyogi",
    )
    server_momentum: Momentum | None = Field(
        default=None, description="momentum of the aggregator's steps; null: 0.9 where the strategy has one"
    )
    server_adaptivity: Positive | None = Field(
        default=None, description="tau of fedadam and fedyogi: the larger, the less adaptive; null: 1e-3"
    )
    proximal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.0, description="weight of the FedProx term, which keeps local steps near the global model; 0: none"
    )
    trainable: Annotated[str, Field(pattern="^(all|head|bias|last:[1-9][0-9]{0,3}|lora:[1-9][0-9]{0,2})$")] = Field(
        default="all",
        description="which parameters are trained: all, head, bias (and the head), last:N layers, or lora:R (adapters of "
        "rank R, and the head)",
    )
    average_last: Count | None = Field(
        default=None, description="the final model is the mean of so many last global models; null: the last one"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="the final model is the exponential moving average of global models; not with average_last",
    )
    local_normalisation: bool = Field(
        default=False, description="keep parameters and statistics of normalisation layers at each hospital (FedBN)"
    )
    per_sample_gradients: Literal["auto", "layers", "vmap", "loop", "hooks"] = Field(
        default="auto", description="how gradients of single patients are computed; auto measures which is fastest"
    )
    sampling_seed: Whole | None = Field(
        default=None,
        description="of the secret sampling order, for simulation alone; null: drawn from the system",
    )

    @property
    def trains_last_layers(self) -> bool:
        """Whether the last layers alone are trained, or the last one."""
        return self.trainable == "head" or self.trainable.startswith("last:")

    @property
    def computes_frozen_part_once(self) -> bool:
        """Whether layers before the trained ones make the same of a record in every step, so that once is enough."""
        return self.trains_last_layers and not self.augmentation.varies and not self.local_normalisation

    @model_validator(mode="after")
    def _check(self) -> TrainingSection:
        name = self.strategy or "fedavg"
        if (name == "fedprox") and not self.proximal:
            raise ValueError("fedprox needs a proximal coefficient above 0")
        if self.proximal and self.strategy in (None, "fedavg"):
            raise ValueError("fedavg with a proximal term is fedprox; set strategy: fedprox")
        if self.proximal and self.local_steps == 1:
            raise ValueError("the first local step has no proximal term; use more local_steps, or proximal: 0")
        if self.proximal * self.learning_rate > 1:
            raise ValueError("proximal * learning_rate must not exceed 1, or every step would overshoot")
        if self.server_momentum is not None and name not in ("fedavgm", "fedadam", "fedyogi"):
            raise ValueError(f"{name} has no server_momentum; use fedavgm, fedadam or fedyogi")
        if self.server_adaptivity is not None and name not in ("fedadam", "fedyogi"):
            raise ValueError(f"{name} has no server_adaptivity; use fedadam or fedyogi")
        if self.average_last is not None and self.ema_decay is not None:
            raise ValueError("average_last and ema_decay are two means of global models; set one of them")
        if self.keep_momentum and not self.momentum:
            raise ValueError("keep_momentum keeps no momentum of 0; set momentum, or keep_momentum: false")
        return self
