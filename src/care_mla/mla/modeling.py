"""Language models with latent attention for transformers: each family's own, with one module replaced.

`LatentAttention` (latent_attention.py) takes the place of `self_attn` in every decoder layer. Copied as it is
into every checkpoint of the `care` profile, as remote code: it imports nothing but torch and transformers.
Runs on transformers 5.15 and later.
"""

from __future__ import annotations

from torch import nn
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    MixtralForCausalLM,
    MixtralModel,
    Olmo2ForCausalLM,
    Olmo2Model,
    Phi3ForCausalLM,
    Phi3Model,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from .configuration import (
    LatentLlamaConfig,
    LatentMistralConfig,
    LatentMixtralConfig,
    LatentOlmo2Config,
    LatentPhi3Config,
    LatentQwen2Config,
    LatentQwen3Config,
    LatentQwen3MoeConfig,
)
from .latent_attention import LatentAttention


class LatentPreTrainedModel(PreTrainedModel):
    """What differs from the source's model classes, whichever they are."""

    # Keys and values differ in width from each other and from what is cached; these backends want one width.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _keep_in_fp32_modules_strict = ["self_attn.inv_freq"]  # noqa: RUF012
    _tp_plan = None


class LatentModel(LatentPreTrainedModel):
    """The source's decoder with latent attention in every layer."""

    layers: nn.ModuleList

    def post_init(self) -> None:
        # The source's __init__ calls this last, before weights are initialised.
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = LatentAttention(self.config, layer_idx)
        super().post_init()


class LatentForCausalLM(LatentPreTrainedModel):
    """The source's language model over a decoder with latent attention."""

    model_class: type[LatentModel]

    def __init__(self, config: PreTrainedConfig) -> None:
        # Past the source's own __init__, which would build its decoder only to be thrown away.
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class LatentLlamaModel(LatentModel, LlamaModel):
    """Llama's decoder with latent attention."""

    config_class = LatentLlamaConfig
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": LatentAttention}  # noqa: RUF012


class LatentLlamaForCausalLM(LatentForCausalLM, LlamaForCausalLM):
    """Llama with latent attention."""

    config_class = LatentLlamaConfig
    model_class = LatentLlamaModel


class LatentMistralModel(LatentModel, MistralModel):
    """Mistral's decoder with latent attention."""

    config_class = LatentMistralConfig
    _can_record_outputs = {"hidden_states": MistralDecoderLayer, "attentions": LatentAttention}  # noqa: RUF012


class LatentMistralForCausalLM(LatentForCausalLM, MistralForCausalLM):
    """Mistral with latent attention."""

    config_class = LatentMistralConfig
    model_class = LatentMistralModel


class LatentSparseForCausalLM(LatentForCausalLM):
    """What the loss that balances the experts needs, beside latent attention."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok


class LatentMixtralModel(LatentModel, MixtralModel):
    """Mixtral's decoder with latent attention."""

    config_class = LatentMixtralConfig
    _can_record_outputs = {  # noqa: RUF012
        **(MixtralModel._can_record_outputs or {}),
        "attentions": LatentAttention,
    }


class LatentMixtralForCausalLM(LatentSparseForCausalLM, MixtralForCausalLM):
    """Mixtral with latent attention."""

    config_class = LatentMixtralConfig
    model_class = LatentMixtralModel


class LatentPhi3Model(LatentModel, Phi3Model):
    """Phi-3's decoder with latent attention."""

    config_class = LatentPhi3Config
    _can_record_outputs = {"hidden_states": Phi3DecoderLayer, "attentions": LatentAttention}  # noqa: RUF012


class LatentPhi3ForCausalLM(LatentForCausalLM, Phi3ForCausalLM):
    """Phi-3 with latent attention."""

    config_class = LatentPhi3Config
    model_class = LatentPhi3Model


class LatentQwen2Model(LatentModel, Qwen2Model):
    """Qwen2's decoder with latent attention."""

    config_class = LatentQwen2Config
    _can_record_outputs = {"hidden_states": Qwen2DecoderLayer, "attentions": LatentAttention}  # noqa: RUF012


class LatentQwen2ForCausalLM(LatentForCausalLM, Qwen2ForCausalLM):
    """Qwen2 with latent attention."""

    config_class = LatentQwen2Config
    model_class = LatentQwen2Model


class LatentQwen3Model(LatentModel, Qwen3Model):
    """Qwen3's decoder with latent attention."""

    config_class = LatentQwen3Config
    _can_record_outputs = {"hidden_states": Qwen3DecoderLayer, "attentions": LatentAttention}  # noqa: RUF012


class LatentQwen3ForCausalLM(LatentForCausalLM, Qwen3ForCausalLM):
    """Qwen3 with latent attention."""

    config_class = LatentQwen3Config
    model_class = LatentQwen3Model


class LatentOlmo2Model(LatentModel, Olmo2Model):
    """OLMo 2's decoder with latent attention."""

    config_class = LatentOlmo2Config
    _can_record_outputs = {"hidden_states": Olmo2DecoderLayer, "attentions": LatentAttention}  # noqa: RUF012


class LatentOlmo2ForCausalLM(LatentForCausalLM, Olmo2ForCausalLM):
    """OLMo 2 with latent attention."""

    config_class = LatentOlmo2Config
    model_class = LatentOlmo2Model


class LatentQwen3MoeModel(LatentModel, Qwen3MoeModel):
    """Qwen3-MoE's decoder with latent attention."""

    config_class = LatentQwen3MoeConfig
    _can_record_outputs = {  # noqa: RUF012
        **(Qwen3MoeModel._can_record_outputs or {}),
        "attentions": LatentAttention,
    }


class LatentQwen3MoeForCausalLM(LatentSparseForCausalLM, Qwen3MoeForCausalLM):
    """Qwen3-MoE with latent attention."""

    config_class = LatentQwen3MoeConfig
    model_class = LatentQwen3MoeModel
