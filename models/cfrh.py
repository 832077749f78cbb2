"""CFRH: CLIP-based fusion-modal reconstructing hashing. Unsupervised: labels never reach it.

Paper: M. Li, Y. Li, M. Ge, L. Ma, "CLIP-based fusion-modal reconstructing hashing for large-scale unsupervised
cross-modal retrieval", International Journal of Multimedia Information Retrieval 12(1):2, 2023,
https://doi.org/10.1007/s13735-023-00268-7.
Authors' code: https://github.com/AwakerLee/CFRH, commit 43398d9, no licence stated. It lacks the files that define the
networks, the losses and every setting, so **this is a reconstruction**: no number or checkpoint of theirs can be
matched. None of it is used here.

An autoencoder for each modality; the bottleneck of the one on frozen CLIP features and of the one on bag-of-words
vectors is the relaxed code. Cosines between codes, within and across modalities, learn a fused affinity of the inputs,
and each decoder gives back its own modality's input.

What is stated (in the framework figure, the abstract, or the code that is there):
* frozen CLIP on the image side alone, bag-of-words texts; two layers with a wide hidden one; tanh(alpha x);
* each decoder reconstructs its own modality; losses in three groups: intra-modal, cross-modal, autoencoder;
* beta weighs the images' affinity, gamma the texts', eta the product of both, swept over 2, 3, 4;
* splits and mAP cut at rank k, JDSH's (`top` in `evaluate.definitions`).
What is inherited from JDSH (Liu et al., SIGIR 2020; https://github.com/KaiserLew/JDSH), on which that code is built:
affinities 2 cos - 1, the scale mu, squared errors of cosines minus the mean cosine of pairs, alpha = sqrt(epoch + 1),
SGD for each network, batches of 32.
What is taken from other code of the same authors (AGAH, MOED, CCAH): the row-normalised form of the product, hidden
width 4096 on both sides, the default weights and the number of epochs.
What is ours, where nothing decides: mean squared reconstruction error on raw features, a decoder of one linear map
without activation on the relaxed code, which logged weight belongs to which group, eta = 2 of the sweep.

`model.fusion`: `row_normalised` is the default, since the sweep of eta only makes sense with it; `jdsh` is JDSH's
product, which lets codes collapse at eta >= 2; `mean` that of DJSRH.

Deviations from the authors' code:
1. The last partial batch of an epoch is kept; the release drops it.
2. A bit at exactly 0 counts as +1; the release's sign gives 0.
3. Pictures and splits are those of `dataset:`, alike for all methods; the release crops at random from 256 pixels and
   draws a new split at every run. JDSH's re-weighting of affinities by their distribution is left out: none of its
   constants is among the release's settings.
4. Items without a vocabulary word are kept, so that all methods search the same pairs; their affinity to all is -1.

Results reproduced: none can be; the equations below agree with values worked out independently in float64.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from common.losses import full_precision
from common.registry import MODELS
from common.similarity import cosine_similarity
from common.types import Batch, DataInfo, Progress, StepOutput
from models.base import ClipHashingModel, ClipModelConfig, ParamGroups
from models.blocks.heads import sign_codes
from utils.distributed import gather_rows

Fusion = Literal["row_normalised", "jdsh", "mean"]


class CFRHConfig(ClipModelConfig):
    """`model:` section of CFRH."""

    hidden_width: int = Field(gt=0)  # of both encoders; 4096
    fusion: Fusion  # form of the product of both affinities
    image_affinity_weight: float = Field(ge=0)  # beta
    text_affinity_weight: float = Field(ge=0)  # gamma
    fusion_weight: float = Field(ge=0)  # eta; the release sweeps 2, 3, 4
    affinity_scale: float = Field(gt=0)  # mu
    intra_weight: float = Field(ge=0)  # delta
    cross_weight: float = Field(ge=0)  # phi
    autoencoder_weight: float = Field(ge=0)  # lambda


class HashAutoencoder(nn.Module):
    """Two layers down to K values, tanh for the relaxed code, one linear map back; torch's default initialisation.

    Args:
        width: Width of the input.
        hidden_width: Width of the hidden layer.
        bits: K.

    Source:
        CFRH, framework figure. The decoder without activation on the relaxed code, so that the reconstruction trains
        the encoder too, is a completion.
    """

    def __init__(self, width: int, hidden_width: int, bits: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, hidden_width), nn.ReLU(), nn.Linear(hidden_width, bits))
        self.decoder = nn.Linear(bits, width)

    def forward(self, inputs: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
        """Inputs [B, W] -> relaxed codes tanh(sharpness x) [B, K] in (-1, 1), reconstructed inputs [B, W]; float32."""
        relaxed = (sharpness * self.encoder(inputs).float()).tanh()
        return relaxed, self.decoder(relaxed).float()


@MODELS.register("CFRH")
class CFRH(ClipHashingModel):
    """Unsupervised hashing of CLIP image features and bag-of-words texts by autoencoders and a fused affinity.

    Args:
        config: `model:` section.
        data: What is known of the training data.
    """

    Config = CFRHConfig
    fields = frozenset({"image", "bag_of_words"})
    text_fields = frozenset({"bag_of_words"})
    # No reference checkpoint exists; these are the names in the line of code that CFRH belongs to (JDSH, AGAH, CCAH).
    # CCAH's decoders give back the other modality, under names that stay unknown here: such a file is refused.
    reference_names = (
        (r"^ImgNet\.clip_image_encode\.", "backbone."),
        (r"^ImgNet\.", "image."),
        (r"^TxtNet\.", "text."),
        (r"^image\.(?:hash_layer|fc_encode)\.", "image.encoder."),
        (r"^text\.net\.", "text.encoder."),
        (r"^text\.fc1\.", "text.encoder.0."),
        (r"^text\.fc2\.", "text.encoder.2."),
    )
    reference_lacks = (r"backbone\..*", r"(image|text)\.decoder\..*")

    def __init__(self, config: CFRHConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.config = config
        self.backbone.requires_grad_(False)
        self.image = HashAutoencoder(data.clip.shape.embed_dim, config.hidden_width, config.bits)
        self.text = HashAutoencoder(data.field_shapes["bag_of_words"][0], config.hidden_width, config.bits)

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One step's loss over the global batch."""
        sharpness = math.sqrt(progress.epoch + 1)  # alpha, JDSH
        image, text = self.image_features(batch), batch["bag_of_words"]
        image_relaxed, image_decoded = self.image(image, sharpness)
        text_relaxed, text_decoded = self.text(text, sharpness)
        # Affinities and losses compare rows, so rows of all processes are gathered first.
        image, image_relaxed, image_decoded = (gather_rows(rows) for rows in (image, image_relaxed, image_decoded))
        text, text_relaxed, text_decoded = (gather_rows(rows) for rows in (text, text_relaxed, text_decoded))
        with full_precision(image.device):
            target = fused_affinity(image, text, self.config)
            terms = {
                "intra": intra_loss(image_relaxed, text_relaxed, target),
                "cross": cross_loss(image_relaxed, text_relaxed, target),
                "autoencoder": F.mse_loss(image_decoded, image) + F.mse_loss(text_decoded, text),
            }
            loss = self.objective(terms)
            terms["bit_bias"] = (bit_bias(image_relaxed) + bit_bias(text_relaxed)) / 2
        return StepOutput(loss, terms)

    def objective(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms' scalars. The three groups are stated, which weight is whose is ours."""
        c = self.config
        return (
            c.intra_weight * terms["intra"]
            + c.cross_weight * terms["cross"]
            + c.autoencoder_weight * terms["autoencoder"]
        )

    @torch.no_grad()
    def image_features(self, batch: Batch) -> Tensor:
        """Pooled features of frozen CLIP, whose layers are the same in training and evaluation mode, [B, E] float32."""
        return self.backbone.image_features(batch["image"]).float()

    def encode_image(self, batch: Batch) -> Tensor:
        """Codes of pictures, [B, K]."""
        return sign_codes(self.image.encoder(self.image_features(batch)))

    def encode_text(self, batch: Batch) -> Tensor:
        """Codes of bag-of-words vectors, [B, K]."""
        return sign_codes(self.text.encoder(batch["bag_of_words"]))

    def param_groups(self) -> ParamGroups:
        """One optimizer a network, as JDSH; CLIP is in neither."""
        return {
            "image": {"autoencoder": list(self.image.parameters())},
            "text": {"autoencoder": list(self.text.parameters())},
        }


def affinity(inputs: Tensor) -> Tensor:
    """How alike inputs are, 2 cos - 1.

    Args:
        inputs: Features or word vectors, [B, W].

    Returns:
        [B, B], values in [-3, 1]; 1 for equal rows.

    Source:
        JDSH, SIGIR 2020; negative entries in CFRH's figure agree.
    """
    return 2 * cosine_similarity(inputs, inputs) - 1


def fused_affinity(image: Tensor, text: Tensor, config: CFRHConfig) -> Tensor:
    """What cosines of codes should be: mu (beta S_I + gamma S_T + eta P), P the product of both affinities.

    Args:
        image: Image features, [B, E]; constants.
        text: Word vectors, [B, V]; constants.
        config: The weights, and the form of the product.

    Returns:
        S, symmetric, [B, B]; values may lie outside [-1, 1].

    Source:
        CFRH's figure states the three weights and the sum; mu is JDSH's.
    """
    image_affinity, text_affinity = affinity(image), affinity(text)
    return config.affinity_scale * (
        config.image_affinity_weight * image_affinity
        + config.text_affinity_weight * text_affinity
        + config.fusion_weight * affinity_product(image_affinity, text_affinity, config.fusion)
    )


def affinity_product(image_affinity: Tensor, text_affinity: Tensor, fusion: Fusion) -> Tensor:
    """Second-order affinity: two items are alike if the rest of the batch relates to them alike.

    Args:
        image_affinity: S_I, [B, B].
        text_affinity: S_T, [B, B].
        fusion: `row_normalised`: rows of S_I S_T at norm 1; `jdsh`: rows of both factors at norm 1 before the product;
            `mean`: S_I S_T / B.

    Returns:
        The product, made symmetric, [B, B].

    Source:
        CFRH's figure states a product. `row_normalised` is the form in the authors' MOED, `jdsh` JDSH's, `mean`
        DJSRH's (ICCV 2019); choosing the first is a completion.
    """
    if fusion == "row_normalised":
        product = F.normalize(image_affinity @ text_affinity, dim=1)
    elif fusion == "jdsh":
        product = F.normalize(image_affinity, dim=1) @ F.normalize(text_affinity, dim=1).T
    else:
        product = image_affinity @ text_affinity / len(image_affinity)
    return (product + product.T) / 2


def intra_loss(image_relaxed: Tensor, text_relaxed: Tensor, target: Tensor) -> Tensor:
    """Cosines between codes of one modality against the fused affinity.

    Args:
        image_relaxed: Relaxed codes of pictures, [B, K].
        text_relaxed: Relaxed codes of texts, [B, K].
        target: Fused affinity S, [B, B]; a constant.

    Returns:
        Scalar: mean squared error over the B^2 pairs, images' plus texts'.

    Source:
        CFRH's figure states the group; the form is JDSH's.
    """
    within_image = F.mse_loss(cosine_similarity(image_relaxed, image_relaxed), target)
    within_text = F.mse_loss(cosine_similarity(text_relaxed, text_relaxed), target)
    return within_image + within_text


def cross_loss(image_relaxed: Tensor, text_relaxed: Tensor, target: Tensor) -> Tensor:
    """Cosines between codes of both modalities against the fused affinity, in both directions; pairs pull together.

    Args:
        image_relaxed: Relaxed codes of pictures, [B, K].
        text_relaxed: Relaxed codes of texts, [B, K].
        target: Fused affinity S, [B, B]; a constant.

    Returns:
        Scalar: two mean squared errors over the B^2 pairs, minus the mean cosine of the B pairs.

    Source:
        CFRH's figure states the group; the form is JDSH's.
    """
    cosines = cosine_similarity(image_relaxed, text_relaxed)  # [B, B], row i column j: image i, text j
    return F.mse_loss(cosines, target) + F.mse_loss(cosines.T, target) - cosines.diagonal().mean()


@torch.no_grad()
def bit_bias(relaxed: Tensor) -> Tensor:
    """How far bits are from splitting the rows in halves: a warning of collapsing codes.

    Args:
        relaxed: Relaxed codes, [B, K].

    Returns:
        Scalar in [0, 1]: mean over bits of the absolute mean over rows; 1 where every bit is constant. Balanced random
        codes of a batch of 32 have 0.14.
    """
    return sign_codes(relaxed).mean(dim=0).abs().mean()
