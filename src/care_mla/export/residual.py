"""The residual stream rescaled, so that every norm of the model has the one eps that all engines agree on.

RMSNorm(a x; a^2 eps) = RMSNorm(x; eps): a stream a times as large, with a^2 eps in the configuration, is the
same model. Reads the source's facts; writes nothing.
"""

from __future__ import annotations

import math

from care_mla.export.latent_norm import NORM_EPS
from care_mla.facts import ModelFacts

# Everything that adds to the stream. Norms take the scale out again before anything else reads it.
STREAM_WRITERS = ("embed_tokens", "o_proj", "down_proj")


def residual_scale(facts: ModelFacts) -> float:
    """The factor a on the residual stream that turns the source's eps into 1e-6."""
    return 1.0 if facts.rms_norm_eps == NORM_EPS else math.sqrt(NORM_EPS / facts.rms_norm_eps)


def residual_factor(name: str, facts: ModelFacts, scale: float | None = None) -> float:
    """What a source tensor of this name is multiplied by, weight or bias, for a scale of the stream.

    A tied head is the embedding and has grown by a, so the final norm takes it back.
    """
    scale = residual_scale(facts) if scale is None else scale
    module = name.split(".")[-2]
    if module in STREAM_WRITERS:
        return scale
    return 1 / scale if name == "model.norm.weight" and facts.tie_word_embeddings else 1.0
