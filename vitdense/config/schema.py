"""The sections of a config: every key, its type, its default and its meaning.

The options of parts (backbones, heads, data sets, ...) are not here: their constructors say them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from vitdense.config.part import Part
from vitdense.config.types import (
    Bool,
    Fraction,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PartOf,
    PositiveFloat,
    PositiveInt,
    Span,
    Str,
    Words,
)

Folder = Annotated[Path, Words("a path")]

BelowOne = Annotated[Fraction, Field(lt=1), Words("a number from 0 to below 1")]


class Section(BaseModel):
    """A section of the config."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=()
    )


class Choice(Section):
    """A section whose `name` decides which of its other keys there are.

    Attributes:
        owned: the keys that only some names have, by name.
    """

    owned: ClassVar[dict[str, tuple[str, ...]]]
    name: str

    @property
    def absent(self) -> set[str]:
        """The keys that this name has not."""
        return {key for keys in self.owned.values() for key in keys} - set(self.owned[self.name])

    @model_validator(mode="after")
    def _only_its_own(self) -> Self:
        for key in sorted(self.absent & self.model_fields_set):
            kind = type(self).__name__.lower()
            raise ValueError(f"{key}: {kind} {self.name!r} has no option {key!r}; remove it")
        return self


class Data(Section):
    """What the model is trained and evaluated on."""

    dataset: Annotated[Part, PartOf("dataset")] = Field(description="the format of the data")
    root: Folder = Field(description="folder of the data set")
    train: Str = Field(default="train", description="split to learn from")
    val: Str = Field(default="val", description="split to evaluate on")
    transforms: Annotated[Part, PartOf("transform")] = Field(
        description="how images are prepared for training and for evaluation"
    )
    image_labels: Str | None = Field(
        default=None,
        description="file under root with image-level labels, for a model with an image_head: "
        "a table with the columns image and label; null = none",
    )
    rare: Fraction | None = Field(
        default=None,
        description="images with a class that fewer than this fraction of images show are drawn "
        "more often: by the square root of this over that fraction; null = all equally often",
    )
    workers: NonNegativeInt | Literal["auto"] = Field(
        default="auto",
        description="processes that decode and augment; 0 = load in the main process",
    )
    faulty: Literal["stop", "skip"] = Field(
        default="stop",
        description="at an image that cannot be read: stop, or skip it, count it and name it in "
        "skipped.txt",
    )
    cache: Literal["memory"] | Folder | None = Field(
        default=None,
        description="where decoded images are kept for later epochs: memory, shared by all "
        "processes, or a folder that stays for later runs; null = no cache",
    )


def _decay(value: Any) -> Any:
    return {True: 0.999, False: None}[value] if isinstance(value, bool) else value


class Train(Section):
    """How long and how the model is trained: one of steps, epochs and minutes must be given."""

    steps: PositiveInt | None = Field(
        default=None, description="length of the run in optimizer steps"
    )
    epochs: PositiveFloat | None = Field(default=None, description="length in passes over the data")
    minutes: PositiveFloat | None = Field(
        default=None, description="length in minutes of training; the schedule stretches to it"
    )
    init: Folder | None = Field(
        default=None,
        description="model.safetensors to start from; its classes are matched by name",
    )
    new_head: bool = Field(
        default=False, description="initialise the head anew, where init has another one"
    )
    batch_size: PositiveInt | Literal["auto"] = Field(
        default=16,
        description="images per step and device; auto = as many as fit into its memory",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="of the computation; auto = bf16 on a GPU that supports it, else fp32",
    )
    compile: Bool = Field(
        default=False,
        description="compile the model with torch.compile: slow first steps, then faster ones",
    )
    channels_last: Bool = Field(
        default=False, description="memory layout that convolutions on GPUs prefer"
    )
    accumulate: PositiveInt = Field(default=1, description="batches whose gradients make one step")
    sync_batch_norm: Bool = Field(
        default=False,
        description="batch norm statistics over the images of all processes, on GPUs",
    )
    shard: Bool = Field(
        default=False,
        description="split weights, gradients and optimizer over the processes (FSDP2), for models "
        "too large for one GPU; a single process ignores it",
    )
    clip: PositiveFloat | None = Field(
        default=0.1, description="maximum gradient norm; null = no clipping"
    )
    ema: Annotated[
        Annotated[Fraction, Field(lt=1)] | None,
        BeforeValidator(_decay),
        Words("a number from 0 to below 1, true (0.999) or null"),
    ] = Field(
        default=None, description="decay of the averaged weights (EMA) that are evaluated and saved"
    )
    evaluations: PositiveInt = Field(
        default=5, description="evaluations, spread evenly over the run; the last is at its end"
    )
    best: Str | None = Field(
        default=None,
        description="the number of an evaluation that chooses the best model, e.g. AP50 or "
        "IoU/road; null = the metric's own: AP, mIoU, PQ",
    )
    patience: PositiveInt | None = Field(
        default=None,
        description="end the run after this many evaluations without improvement; null = never",
    )
    observers: tuple[Literal["csv", "tensorboard", "wandb", "mlflow"], ...] = Field(
        default=("tensorboard",),
        description="where curves are logged, in addition to metrics.jsonl and the console",
    )
    checkpoint_every: PositiveInt = Field(default=500, description="steps between checkpoints")
    keep: PositiveInt = Field(
        default=2, description="latest checkpoints that are kept, in addition to the best model"
    )
    pictures: NonNegativeInt = Field(
        default=4, description="pictures of predictions and ground truth at each evaluation"
    )

    @model_validator(mode="after")
    def _head_of_what(self) -> Train:
        if self.new_head and self.init is None:
            raise ValueError("new_head: without train.init all is new; remove it")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        given = [key for key in ("steps", "epochs", "minutes") if getattr(self, key) is not None]
        if len(given) != 1:
            got = f"got {' and '.join(given)}" if given else "got none"
            raise ValueError(f"give exactly one of steps, epochs and minutes, {got}")
        return self


class Optimizer(Choice):
    """AdamW or SGD; norms, biases and embeddings do not decay."""

    owned = {"adamw": ("betas",), "sgd": ("momentum",)}

    name: Literal["adamw", "sgd"] = Field(
        default="adamw", description="sgd = with momentum, for recipes that say so"
    )
    lr: PositiveFloat = Field(default=2e-4, description="highest learning rate")
    weight_decay: NonNegativeFloat = Field(
        default=0.05, description="weight decay, decoupled from the gradient by adamw"
    )
    betas: tuple[BelowOne, BelowOne] = Field(
        default=(0.9, 0.999),
        description="adamw: decay of the running means of gradient and squared gradient",
    )
    momentum: BelowOne = Field(default=0.9, description="sgd: decay of the running gradient")
    backbone_scale: NonNegativeFloat = Field(
        default=1.0, description="learning rate of the backbone, relative to lr; 0 = frozen"
    )
    layer_decay: Annotated[Fraction, Field(gt=0), Words("a number above 0, up to 1")] = Field(
        default=1.0,
        description="each layer of the backbone learns at this times the rate of the next",
    )
    scales: dict[Str, NonNegativeFloat] = Field(
        default={},
        description="learning rates relative to lr by parts of parameters' names, "
        "as {offsets: 0.1}",
    )


class Schedule(Choice):
    """The learning rate over the run: a linear warm-up, then a curve."""

    owned = {
        "constant": (),
        "cosine": ("final",),
        "flat_cosine": ("flat", "tail", "final"),
        "poly": ("final", "power"),
        "multistep": ("milestones", "gamma"),
    }

    name: Literal["cosine", "flat_cosine", "poly", "multistep", "constant"] = Field(
        default="cosine", description="the curve"
    )
    warmup: Span = Field(
        default=0.05,
        description="span of the linear rise; in steps at most 5 %, else half of the run",
    )
    final: Fraction = Field(
        default=0.0, description="cosine, flat_cosine, poly: rate at the end, relative to lr"
    )
    flat: Span = Field(default=0.5, description="flat_cosine: span before the fall")
    tail: Span = Field(default=0.05, description="flat_cosine: last span, at the final rate")
    power: PositiveFloat = Field(default=0.9, description="poly: exponent of the fall")
    milestones: tuple[Span, ...] = Field(
        default=(0.6, 0.9),
        description="multistep: spans after which the rate is multiplied by gamma",
    )
    gamma: Fraction = Field(default=0.1, description="multistep: factor at each milestone")

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        parts = [span for span in (self.flat, self.tail) if isinstance(span, float)]
        if self.name == "flat_cosine" and sum(parts) > 1:
            raise ValueError("flat: with tail it is longer than the run; lower one of them")
        return self


OF_WINDOWS = ("overlap", "blend", "batch_size")
"""Keys of `inference` that say how windows are laid."""

NO_WINDOWS = "is for windows; set inference.window too, or remove it"


class Inference(Section):
    """How semantic models predict, in training, `eval` and `predict`: windows, flips, scales."""

    window: PositiveInt | tuple[PositiveInt, PositiveInt] | None = Field(
        default=None,
        description="side, or height and width, of windows over the prepared image; null = whole",
    )
    overlap: BelowOne = Field(
        default=1 / 3, description="smallest fraction of a window that the next one covers too"
    )
    blend: Literal["flat", "gaussian", "center"] = Field(
        default="flat",
        description="where windows overlap: flat = the mean; gaussian = a mean that favours "
        "each window's middle; center = only the nearest window",
    )
    batch_size: PositiveInt = Field(default=4, description="windows computed at a time")
    flip: Bool = Field(default=False, description="average with the image mirrored")
    scales: tuple[PositiveFloat, ...] = Field(
        default=(1.0,), description="factors on the prepared image's size; predictions are averaged"
    )

    @model_validator(mode="after")
    def _some_scale(self) -> Inference:
        if not self.scales:
            raise ValueError("scales: give one or more; [1.0] is the image as it is prepared")
        return self

    @model_validator(mode="after")
    def _windows_for_their_options(self) -> Self:
        # `window: null`, as in the config.yaml of a run, says that the others are not in use
        if "window" not in self.model_fields_set:
            for key in sorted(set(OF_WINDOWS) & self.model_fields_set):
                raise ValueError(f"{key}: {NO_WINDOWS}")
        return self


class Config(Section):
    """A whole config, checked, with all defaults."""

    model: Annotated[Part, PartOf("model")] = Field(
        description="what is trained; without a name: pyramid (backbone, neck, head)"
    )
    data: Data = Field(description=Data.__doc__)
    train: Train = Field(description=Train.__doc__)
    optimizer: Optimizer = Field(default=Optimizer(), description=Optimizer.__doc__)
    schedule: Schedule = Field(default=Schedule(), description=Schedule.__doc__)
    inference: Inference = Field(default=Inference(), description=Inference.__doc__)
    metric: Annotated[Part, PartOf("metric")] | None = Field(
        default=None,
        description="what is measured; null = by the model's task: coco, miou or panoptic",
    )
    imports: list[Str] = Field(
        default_factory=list,
        description="modules that register parts of your own; they are run like a script",
    )
    output: Folder = Field(description="folder of the run; by default runs/<config name>")
    seed: Annotated[Int, Field(ge=0, lt=2**63), Words("a whole number from 0")] = Field(
        default=0, description="of all random numbers"
    )
    device: Str = Field(
        default="auto", description="auto, cpu, cuda, cuda:1, ...; auto = a GPU if any"
    )

    _name: str = PrivateAttr("config")

    @property
    def name(self) -> str:
        """The config's path below a folder `configs`, or its file's name, without suffix."""
        return self._name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and dict(self) == dict(other)


SECTIONS: dict[str, type[Section]] = {
    "data": Data,
    "train": Train,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "inference": Inference,
}
