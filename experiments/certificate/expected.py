"""What the audit must find in torchvision's classification models, read from their source.

Made by reading torchvision 0.29.1, never by running an audit: which module's output for a sample first
depends on the other samples of its micro-batch (`batch`), and which module first draws random numbers
(`random`), in the order in which the forward pass runs, in training mode, as
`TorchvisionModel(name, (3, 64, 64), 10)` builds them (no auxiliary heads, random weights).

What holds for all of them, and was read in `ops/` and `models/quantization/utils.py`:

- `Conv2dNormActivation` and `Conv3dNormActivation` are Sequentials of convolution (0), norm (1) and
  activation (2); the norm is BatchNorm unless it is told otherwise.
- `StochasticDepth` draws one number per sample where its probability is positive, and nothing where it
  is zero. Most models let the probability grow linearly from 0 in their first block, so that it is the
  second block which draws first. `nn.Dropout(0.0)` draws nothing either.
- A window is `biased` where there is a `batch` module, else `stochastic` where there is a `random`
  one, else `equivalent`.
- The quantisable models are the float ones with other containers; nothing is fused unless it is asked
  for, so that their BatchNorm is still a module of its own.
"""

from dataclasses import dataclass

from gaccum_exp.audit.result import BATCH_STATISTICS, RANDOMNESS, Culprit

STOCHASTIC_DEPTH = "StochasticDepth"
BATCH_NORM = "BatchNorm2d"


@dataclass(frozen=True, slots=True)
class Family:
    """Models that answer the question in the same way, for the reason given in `reading`."""

    source: str
    """File, below torchvision/models."""
    names: str
    reading: str
    batch: str | None = None
    """The first module that mixes samples, inside `net`, and its class."""
    random: str | None = None
    """The first module that draws random numbers, inside `net`, and its class."""
    image_size: int | None = None
    """Side in pixels to build for, where the model takes one size only and can be built for another."""
    spare_samples: bool = False
    """Whether a window has N + 1 samples and not 2N + 1: models that are large only in activations."""

    @property
    def culprits(self) -> tuple[Culprit, ...]:
        """What is to blame, the worse first."""
        found = ((self.batch, BATCH_STATISTICS), (self.random, RANDOMNESS))
        return tuple(_culprit(where, cause) for where, cause in found if where is not None)

    @property
    def verdict(self) -> str:
        """What the audit must say."""
        if self.batch is not None:
            return "biased"
        return "equivalent" if self.random is None else "stochastic"

    def samples(self, steps: int) -> int:
        """Return the size of a window that N = `steps` does not divide.

        At least two samples in every micro-batch, since BatchNorm on maps of one pixel refuses one;
        but for models whose maps stay larger and whose clips would not fit.
        """
        return steps + 1 if self.spare_samples else 2 * steps + 1


def _culprit(where: str, cause: str) -> Culprit:
    name, kind = where.split()
    return Culprit(f"net.{name}", kind, cause)


FAMILIES = (
    Family(
        "alexnet.py",
        "alexnet",
        "No norm. The classifier opens with Dropout(0.5).",
        random="classifier.0 Dropout",
    ),
    Family(
        "convnext.py",
        "convnext_tiny convnext_small convnext_base convnext_large",
        "LayerNorm. Stochastic depth in every block, with probability p × block / (blocks − 1): the "
        "first block of the first stage has 0, its second draws.",
        random=f"features.1.1.stochastic_depth {STOCHASTIC_DEPTH}",
    ),
    Family(
        "densenet.py",
        "densenet121 densenet161 densenet169 densenet201",
        "BatchNorm `norm0` after the first convolution; drop_rate is 0.",
        batch=f"features.norm0 {BATCH_NORM}",
    ),
    Family(
        "efficientnet.py",
        "efficientnet_b0",
        "BatchNorm in the stem. Stochastic depth only where a block has a residual connection (stride "
        "1, equal channels): the one block of stage 1 (32 to 16 channels) and the first of stage 2 "
        "(stride 2) have none, the second of stage 2 has. Dropout(0.2) comes later.",
        batch=f"features.0.1 {BATCH_NORM}",
        random=f"features.2.1.stochastic_depth {STOCHASTIC_DEPTH}",
    ),
    Family(
        "efficientnet.py",
        "efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 "
        "efficientnet_b6 efficientnet_b7 efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l",
        "As B0, but stage 1 has a second block (ceil(1 × depth) ≥ 2 from B1 on, two or more in V2), "
        "which has a residual connection and a probability above 0.",
        batch=f"features.0.1 {BATCH_NORM}",
        random=f"features.1.1.stochastic_depth {STOCHASTIC_DEPTH}",
    ),
    Family(
        "googlenet.py",
        "googlenet",
        "BasicConv2d is convolution and BatchNorm `bn`. Dropout(0.2) before the last layer.",
        batch=f"conv1.bn {BATCH_NORM}",
        random="dropout Dropout",
    ),
    Family(
        "inception.py",
        "inception_v3",
        "BasicConv2d as in GoogLeNet. Dropout(0.5) before the last layer.",
        batch=f"Conv2d_1a_3x3.bn {BATCH_NORM}",
        random="dropout Dropout",
    ),
    Family(
        "maxvit.py",
        "maxvit_t",
        "BatchNorm in the stem and the MBConv parts. Probabilities linspace(0, 0.2, 11) over the "
        "layers: the first layer's are 0, the second's first draw is at the end of its MBConv. Takes "
        "images of 224 pixels or a multiple only.",
        batch=f"stem.0.1 {BATCH_NORM}",
        random=f"blocks.0.layers.1.layers.MBconv.stochastic_depth {STOCHASTIC_DEPTH}",
        spare_samples=True,
    ),
    Family(
        "mnasnet.py",
        "mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3",
        "One Sequential `layers`: convolution, BatchNorm. The classifier opens with Dropout(0.2).",
        batch=f"layers.1 {BATCH_NORM}",
        random="classifier.0 Dropout",
    ),
    Family(
        "mobilenetv2.py",
        "mobilenet_v2",
        "BatchNorm in the stem. The classifier opens with Dropout(0.2).",
        batch=f"features.0.1 {BATCH_NORM}",
        random="classifier.0 Dropout",
    ),
    Family(
        "mobilenetv3.py",
        "mobilenet_v3_large mobilenet_v3_small",
        "BatchNorm in the stem. The classifier is Linear, Hardswish, Dropout(0.2), Linear.",
        batch=f"features.0.1 {BATCH_NORM}",
        random="classifier.2 Dropout",
    ),
    Family(
        "regnet.py",
        "regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf "
        "regnet_x_32gf regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf "
        "regnet_y_16gf regnet_y_32gf regnet_y_128gf",
        "The stem is itself a Conv2dNormActivation. No dropout anywhere.",
        batch=f"stem.1 {BATCH_NORM}",
    ),
    Family(
        "resnet.py",
        "resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d "
        "resnext101_64x4d wide_resnet50_2 wide_resnet101_2",
        "`bn1` after the first convolution. No dropout anywhere.",
        batch=f"bn1 {BATCH_NORM}",
    ),
    Family(
        "shufflenetv2.py",
        "shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0",
        "`conv1` is convolution, BatchNorm, ReLU. No dropout; channels are shuffled, samples are not.",
        batch=f"conv1.1 {BATCH_NORM}",
    ),
    Family(
        "squeezenet.py",
        "squeezenet1_0 squeezenet1_1",
        "No norm. The classifier opens with Dropout(0.5).",
        random="classifier.0 Dropout",
    ),
    Family(
        "swin_transformer.py",
        "swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b",
        "LayerNorm; dropout and attention dropout are 0. features.0 cuts patches, features.1 is the "
        "first stage: its first block has probability 0, its second draws.",
        random=f"features.1.1.stochastic_depth {STOCHASTIC_DEPTH}",
    ),
    Family(
        "vgg.py",
        "vgg11 vgg13 vgg16 vgg19",
        "No norm. The classifier is Linear, ReLU, Dropout(0.5), and so on.",
        random="classifier.2 Dropout",
    ),
    Family(
        "vgg.py",
        "vgg11_bn vgg13_bn vgg16_bn vgg19_bn",
        "BatchNorm after the first convolution; the classifier as without.",
        batch=f"features.1 {BATCH_NORM}",
        random="classifier.2 Dropout",
    ),
    Family(
        "vision_transformer.py",
        "vit_b_16 vit_b_32 vit_l_16 vit_l_32",
        "LayerNorm; dropout and attention dropout are 0 by default. The head starts at zero, so only "
        "its own gradient is not zero at first.",
        image_size=64,
    ),
    Family(
        "vision_transformer.py",
        "vit_h_14",
        "As the other vision transformers; 64 pixels are no multiple of its patches of 14.",
        image_size=70,
    ),
    Family(
        "video/mvit.py",
        "mvit_v1_b mvit_v2_s",
        "LayerNorm; the blocks' dropout is 0. Stochastic depth of probability 0.2 × block / 15: the "
        "first block has 0, the second draws. Takes 16 frames of 224 pixels only.",
        random=f"blocks.1.stochastic_depth {STOCHASTIC_DEPTH}",
        spare_samples=True,
    ),
    Family(
        "video/resnet.py",
        "mc3_18 r2plus1d_18 r3d_18",
        "Both kinds of stem have BatchNorm3d as their second module. No dropout. One frame.",
        batch="stem.1 BatchNorm3d",
    ),
    Family(
        "video/s3d.py",
        "s3d",
        "The first separable convolution is two Conv3dNormActivations. Dropout(0.2) in the classifier. "
        "Takes 14 frames of 224 pixels at least.",
        batch="features.0.0.1 BatchNorm3d",
        random="classifier.0 Dropout",
        spare_samples=True,
    ),
    Family(
        "video/swin_transformer.py",
        "swin3d_t swin3d_s swin3d_b",
        "As the Swin transformers, but patches are cut outside `features`, whose first element is the "
        "first stage; `pos_drop` is Dropout(0.0).",
        random=f"features.0.1.stochastic_depth {STOCHASTIC_DEPTH}",
    ),
    Family(
        "quantization/googlenet.py",
        "quantized_googlenet",
        "As GoogLeNet.",
        batch=f"conv1.bn {BATCH_NORM}",
        random="dropout Dropout",
    ),
    Family(
        "quantization/inception.py",
        "quantized_inception_v3",
        "As Inception.",
        batch=f"Conv2d_1a_3x3.bn {BATCH_NORM}",
        random="dropout Dropout",
    ),
    Family(
        "quantization/mobilenetv2.py",
        "quantized_mobilenet_v2",
        "As MobileNetV2.",
        batch=f"features.0.1 {BATCH_NORM}",
        random="classifier.0 Dropout",
    ),
    Family(
        "quantization/mobilenetv3.py",
        "quantized_mobilenet_v3_large",
        "As MobileNetV3.",
        batch=f"features.0.1 {BATCH_NORM}",
        random="classifier.2 Dropout",
    ),
    Family(
        "quantization/resnet.py",
        "quantized_resnet18 quantized_resnet50 quantized_resnext101_32x8d quantized_resnext101_64x4d",
        "As ResNet; additions are modules.",
        batch=f"bn1 {BATCH_NORM}",
    ),
    Family(
        "quantization/shufflenetv2.py",
        "quantized_shufflenet_v2_x0_5 quantized_shufflenet_v2_x1_0 quantized_shufflenet_v2_x1_5 "
        "quantized_shufflenet_v2_x2_0",
        "As ShuffleNetV2; concatenations are modules.",
        batch=f"conv1.1 {BATCH_NORM}",
    ),
)

EXPECTED = {name: family for family in FAMILIES for name in family.names.split()}

LEFT_OUT = {
    "regnet_y_128gf": "about 640 million parameters: in float64 weights and the three gradients that "
    "are compared take 20 GB, the model and two gradients in float32 8 GB more; the machine had 23 GB",
    "vit_h_14": "about 630 million parameters, as above",
    "mvit_v1_b": "takes clips of 16 frames of 224 pixels only: it does not build at 64",
    "mvit_v2_s": "as above",
}
"""Models that stand in the list above and were not audited, and why."""
